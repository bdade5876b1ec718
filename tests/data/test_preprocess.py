from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from htfa_jax.data.preprocess import fit, load_images, placement_of, without_recon
from htfa_jax.data.records import parse_record
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.errors import DataError


def test_letterbox_keeps_the_shape_and_centres():
    wide = placement_of((200, 100), 64, "letterbox")
    assert wide.region == (0, 16, 64, 32)
    assert placement_of((100, 200), 64, "letterbox").region == (16, 0, 32, 64)
    assert placement_of((200, 100), 64, "squash").region == (0, 0, 64, 64)
    assert wide.box((50, 20, 100, 40)) == (16.0, 16 + 6.4, 32.0, 12.8)


def test_boxes_move_with_the_image():
    """A white rectangle and its box end in the same place."""
    image = np.zeros((120, 300, 3), np.uint8)
    image[30:90, 60:240] = 255
    placement = placement_of((300, 120), 100, "letterbox")
    square = fit(Image.fromarray(image), placement, 100)
    x, y, w, h = placement.box((60, 30, 180, 60))
    rows, columns = np.nonzero(square.mean(axis=-1) > 127)
    assert (columns.min(), rows.min()) == (x, y)
    assert (columns.max() + 1, rows.max() + 1) == (x + w, y + h)
    assert not square[: placement.region[1]].any()


def test_a_record_becomes_arrays(dataset):
    record = RecordFile(dataset)[0]
    sample = load_images(record, 48, "letterbox")
    with Image.open(record.image_orig) as image:
        np.testing.assert_array_equal(sample["image_orig"], np.asarray(image))
    assert sample["object_mask"].dtype == bool and sample["object_mask"].any()
    assert all(sample[k] for k in sample if k.startswith("has_"))
    np.testing.assert_array_equal(sample["bbox_orig"], [4, 5, 20, 22])
    np.testing.assert_array_equal(sample["region_orig"], [0, 0, 48, 48])
    half = load_images(record, 24, "letterbox")
    np.testing.assert_array_equal(half["bbox_recon"], [4, 3, 9, 15])


def test_what_a_record_lacks_is_zero_and_flagged(dataset):
    record = replace(
        RecordFile(dataset)[0],
        image_recon=None,
        image_target=None,
        occluder_mask=None,
        bbox_orig=None,
    )
    sample = load_images(record, 48, "letterbox")
    for name in ("recon", "target", "occluder_mask", "bbox_orig", "bbox_recon"):
        assert not sample[f"has_{name}"], name
    assert not sample["image_recon"].any() and not sample["occluder_mask"].any()
    assert sample["has_object_mask"]


def test_dropping_the_reconstruction_is_as_if_there_were_none(dataset):
    record = RecordFile(dataset)[0]
    dropped = without_recon(load_images(record, 48, "letterbox"))
    never = load_images(replace(record, image_recon=None), 48, "letterbox")
    for name in never:
        np.testing.assert_array_equal(dropped[name], never[name], err_msg=name)


def test_photographs_are_turned_upright(tmp_path):
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, :20, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    record = parse_record(
        {"image_orig": "a.png", "conversations": [{"from": "gpt", "value": "x"}]},
        "here",
        tmp_path.joinpath,
    )
    sample = load_images(record, 40, "letterbox")
    np.testing.assert_array_equal(sample["region_orig"], [10, 0, 20, 40])
    assert sample["image_orig"][5, 20, 0] == 255 and sample["image_orig"][35, 20, 0] == 0


def test_a_mask_of_another_shape_is_refused(dataset, tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(np.zeros((48, 96), np.uint8)).save(path)
    record = replace(RecordFile(dataset)[0], object_mask=path)
    with pytest.raises(DataError, match="object_mask is 96x48 but must show .* 48x48"):
        load_images(record, 48, "letterbox")


def test_masks_of_zeros_and_ones_are_masks(dataset, tmp_path):
    record = RecordFile(dataset)[0]
    expected = load_images(record, 48, "letterbox")["object_mask"]
    with Image.open(record.object_mask) as image:
        ones = np.asarray(image) // 255
    for factor, match in ((1, None), (100, "its values are .* 100 .*, its largest value is 100")):
        Image.fromarray(ones * np.uint8(factor)).save(tmp_path / "mask.png")
        changed = replace(record, object_mask=tmp_path / "mask.png")
        if match is None:
            np.testing.assert_array_equal(
                load_images(changed, 48, "letterbox")["object_mask"], expected
            )
        else:
            with pytest.raises(DataError, match=match):
                load_images(changed, 48, "letterbox")


@pytest.mark.parametrize("box", [(0.1, 0.2, 0.3, 0.4), (50.0, 4, 9, 9), (-20.0, 0, 10, 10)])
def test_boxes_that_are_not_in_their_image_are_refused(dataset, box):
    record = replace(RecordFile(dataset)[0], bbox_recon=box)
    with pytest.raises(DataError, match=r"bbox_recon=.*48x48: expected x, y, width, height in p"):
        load_images(record, 48, "letterbox")
