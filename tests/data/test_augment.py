import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support import tiny

from htfa_jax.config import AugmentConfig
from htfa_jax.data.augment import Change, draw
from htfa_jax.data.pipeline import SampleLoader
from htfa_jax.data.preprocess import WHOLE, load_images
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.errors import ConfigError, DataError

SIZE = 60


def ruler(width, height):
    """An image whose red says where a pixel is from left to right, green from top to bottom."""
    x, y = (np.arange(n) + 0.5 for n in (width, height))
    image = np.zeros((height, width, 3))
    image[..., 0], image[..., 1] = x / width * 240, y[:, None] / height * 240
    return image.round().astype(np.uint8)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Images of a scene in three sizes, and a reconstruction of another shape."""
    folder = tmp_path_factory.mktemp("scene")
    for name, size in (("orig", (240, 160)), ("target", (480, 320)), ("recon", (120, 160))):
        Image.fromarray(ruler(*size)).save(folder / f"{name}.png")
    mask = np.zeros((80, 120), np.uint8)
    mask[20:60, 30:75] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    line = {
        "id": "a",
        "image_orig": "orig.png",
        "image_recon": "recon.png",
        "image_target": "target.png",
        "object_mask": "mask.png",
        "occluder_mask": "mask.png",
        "bbox_orig": [60, 40, 90, 80],
        "bbox_recon": [24, 40, 60, 72],
        "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
    }
    (folder / "data.jsonl").write_text(json.dumps(line) + "\n")
    return RecordFile(folder / "data.jsonl")[0]


def loaded(record, change, resize="letterbox"):
    return change.applied(load_images(record, SIZE, resize, change.window))


@pytest.mark.parametrize("resize", ["letterbox", "squash"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("corner", [(0.0, 0.0), (0.3, 0.9), (1.0, 1.0)])
def test_all_images_masks_and_boxes_change_alike(record, resize, flip, corner):
    """Every pixel says where it was: a box's edges are found there, masks and regions too."""
    change = Change(side=0.7, corner=corner, flip=flip)
    sample = loaded(record, change, resize)
    # The object is from 0.2 to 0.7 of the width and 0.25 to 0.75 of the height, so that a window
    # of 0.7 begins at 0 to 0.2 and at 0.05 to 0.25.
    left, top = 0.2 * corner[0], 0.05 + 0.2 * corner[1]
    for name, box in (("orig", (60 / 240, 40 / 160, 90 / 240, 80 / 160)),
                      ("recon", (24 / 120, 40 / 160, 60 / 120, 72 / 160))):  # fmt: skip
        x, y, w, h = sample[f"region_{name}"].astype(int)
        image = sample[f"image_{name}"][y : y + h, x : x + w].astype(float)
        assert not sample[f"image_{name}"][:y].any() and not sample[f"image_{name}"][:, :x].any()
        across = left + 0.7 * (np.arange(w) + 0.5) / w
        down = top + 0.7 * (np.arange(h) + 0.5) / h
        across = across[::-1] if flip else across
        inner = slice(2, -2)  # at the edges of a whole image bicubic filters see less of it
        assert np.abs(image[inner, inner, 0] - 240 * across[inner]).max() < 4
        assert np.abs(image[inner, inner, 1] - 240 * down[inner, None]).max() < 4
        # The box, by its relative place in what is seen.
        start = (box[0] - left) / 0.7
        start = 1 - start - box[2] / 0.7 if flip else start
        expected = (x + start * w, y + (box[1] - top) / 0.7 * h, box[2] / 0.7 * w, box[3] / 0.7 * h)
        np.testing.assert_allclose(sample[f"bbox_{name}"], expected, rtol=1e-5, atol=1e-5)
    difference = sample["image_target"].astype(int) - sample["image_orig"]
    assert np.abs(difference[2:-2, 2:-2]).max() < 4
    # The mask covers 0.25 to 0.625 of the width and 0.25 to 0.75 of the height.
    rows, columns = np.nonzero(sample["object_mask"])
    x, y, w, h = sample["region_orig"]
    edges = [(0.25 - left) / 0.7, (0.625 - left) / 0.7]
    edges = [1 - edge for edge in edges[::-1]] if flip else edges
    found = [columns.min() - x, columns.max() + 1 - x]
    np.testing.assert_allclose(found, np.array(edges) * w, atol=1)
    np.testing.assert_allclose(rows.min() - y, (0.25 - top) / 0.7 * h, atol=1)
    np.testing.assert_array_equal(sample["object_mask"], sample["occluder_mask"])


def test_whatever_is_drawn_the_objects_box_is_seen_whole(record):
    config, rng, sides = AugmentConfig(crop=0.9, flip=0.5), np.random.default_rng(0), set()
    for _ in range(60):
        change = draw(config, rng)
        objects = [tuple(np.r_[rng.uniform(0, 0.5, 2), rng.uniform(0.1, 0.5, 2)]) for _ in range(2)]
        x, y, w, h = change.window(objects)
        assert x >= 0 and x + w <= 1 + 1e-9 and y >= 0 and y + h <= 1 + 1e-9 and w == h
        for a, b, c, d in objects:
            assert x <= a + 1e-9 and a + c <= x + w + 1e-9
            assert y <= b + 1e-9 and b + d <= y + h + 1e-9
        sides.add(round(w, 1))
        sample = loaded(record, change)
        for name in ("orig", "recon"):
            box, region = sample[f"bbox_{name}"], sample[f"region_{name}"]
            assert (box[:2] >= region[:2] - 1e-3).all()
            assert (box[:2] + box[2:] <= region[:2] + region[2:] + 1e-3).all()
    assert len(sides) > 3


def test_a_box_that_sticks_out_is_seen_as_far_as_there_is_a_image():
    assert Change(side=0.5, corner=(1.0, 1.0)).window([(-0.2, 0.8, 0.6, 0.5)]) == (0, 0.5, 0.5, 0.5)


def test_the_mask_tells_where_the_object_is_if_no_box_does(record):
    seen = []
    by_mask = replace(record, bbox_orig=None)
    load_images(by_mask, SIZE, "letterbox", lambda objects: (seen.append(objects), WHOLE)[1])
    assert seen == [[(30 / 120, 20 / 80, 45 / 120, 40 / 80), (24 / 120, 0.25, 0.5, 72 / 160)]]


@pytest.mark.parametrize(
    "missing", [{"bbox_recon": None}, {"bbox_orig": None, "object_mask": None}]
)
def test_a_crop_that_could_lose_the_object_is_refused(record, missing):
    with pytest.raises(DataError, match=r"record 0 \(id a\): augment.crop does not know where"):
        load_images(replace(record, **missing), SIZE, "letterbox", Change().window)
    loaded = load_images(replace(record, image_recon=None), SIZE, "letterbox", Change().window)
    assert not loaded["has_recon"]


def test_nothing_to_change_changes_nothing(record):
    plain = load_images(record, SIZE, "letterbox")
    for name, value in loaded(record, Change()).items():
        np.testing.assert_array_equal(value, plain[name], err_msg=name)
    assert draw(AugmentConfig(), np.random.default_rng(0)) is None


def test_flipping_twice_is_nothing(record):
    plain = load_images(record, SIZE, "letterbox")
    twice = Change(flip=True).applied(Change(flip=True).applied(plain))
    for name, value in twice.items():
        np.testing.assert_array_equal(value, plain[name], err_msg=name)


def test_colors_are_those_of_the_closed_form(record):
    plain = load_images(record, SIZE, "letterbox")
    values = plain["image_orig"].astype(float)
    brighter = Change(brightness=1.3).applied(plain)["image_orig"]
    np.testing.assert_allclose(brighter, np.minimum(values * 1.3, 255), atol=0.51)
    darker = Change(gamma=1.5).applied(plain)["image_orig"]
    np.testing.assert_allclose(darker, 255 * (values / 255) ** 1.5, atol=0.51)
    grey = values @ np.array([0.299, 0.587, 0.114])
    pale = Change(saturation=0.4).applied(plain)["image_orig"]
    np.testing.assert_allclose(pale, grey[..., None] + 0.4 * (values - grey[..., None]), atol=1.2)


def test_colors_change_alike_and_black_stays_black(record):
    plain = load_images(record, SIZE, "letterbox")
    plain["image_recon"] = plain["image_target"] = plain["image_orig"]
    changed = Change(brightness=0.8, gamma=0.7, saturation=1.4).applied(plain)
    assert not np.array_equal(changed["image_orig"], plain["image_orig"])
    np.testing.assert_array_equal(changed["image_recon"], changed["image_orig"])
    np.testing.assert_array_equal(changed["image_target"], changed["image_orig"])
    x, y, w, h = plain["region_orig"].astype(int)
    assert y > 0 and not changed["image_orig"][:y].any()
    for name in ("object_mask", "bbox_orig", "region_orig"):
        np.testing.assert_array_equal(changed[name], plain[name])


def test_a_record_without_a_part_stays_without(record):
    bare = replace(record, image_recon=None, image_target=None, occluder_mask=None)
    sample = loaded(bare, Change(side=0.8, flip=True, brightness=1.5))
    for name in ("image_recon", "region_recon", "bbox_recon", "image_target", "occluder_mask"):
        assert not sample[name].any(), name


def test_strengths_bound_what_is_drawn():
    config = AugmentConfig(crop=0.3, flip=0.25, brightness=0.2, gamma=0.1, saturation=0.5)
    rng = np.random.default_rng(0)
    drawn = [draw(config, rng) for _ in range(400)]
    for name, low, high in (("side", 0.7, 1), ("brightness", 0.8, 1.2), ("gamma", 0.9, 1.1),
                            ("saturation", 0.5, 1.5)):  # fmt: skip
        values = [getattr(change, name) for change in drawn]
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    assert 0.15 < np.mean([change.flip for change in drawn]) < 0.35


def test_only_training_is_augmented(dataset):
    loader = SampleLoader(RecordFile(dataset), None, tiny(augment__brightness=0.9))
    plain = SampleLoader(RecordFile(dataset), None, tiny())(3)
    np.testing.assert_array_equal(loader(3)["image_orig"], plain["image_orig"])
    trained = loader.for_training(3, np.random.default_rng(0))["image_orig"]
    assert not np.array_equal(trained, plain["image_orig"])


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"augment.flip=1.5 must be in \[0, 1\)"):
        tiny(augment__flip=1.5)
    with pytest.raises(ConfigError, match="cache_codes would keep .* augment.crop=0.2 changes"):
        tiny(data__cache_codes=True, augment__crop=0.2)
