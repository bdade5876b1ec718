"""ObMan's layout, made small, as records; pickles that run nothing."""

import contextlib
import json
import os
import pickle

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from htfa_jax.config import Config
from htfa_jax.data import obman, safe_pickle
from htfa_jax.data.preprocess import load_images
from htfa_jax.data.sources.open import open_source
from htfa_jax.errors import DataError


def meta_of(number):
    """What a sample's meta holds, as far as types go."""
    classes = list(obman.CATEGORIES)
    return {
        "class_id": classes[number % len(classes)],
        "sample_id": "1ffd7113492d375593202bf99dddc268",
        "coords_2d": np.arange(42, dtype=np.float32).reshape(21, 2),
        "affine_transform": np.eye(4),
        "obj_scale": np.float64(0.2),
        "depth_min": 0.41,
        "side": "right",
        "z": [1, (2, 3), None, True],
    }


@pytest.fixture
def layout(tmp_path):
    """(ObMan's folder, that of the views) of four samples; the third has no view."""
    rng, root = np.random.default_rng(0), tmp_path / "obman"
    for name in ("rgb", "rgb_obj", "segm", "meta", "views"):
        (root / "test" / name).mkdir(parents=True)
    for i in range(4):
        name = f"{7 * i:08d}"
        for kind in ("rgb", "rgb_obj"):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "test" / kind / f"{name}.jpg")
        segm = np.zeros((32, 32, 3), np.uint8)
        segm[8:18, 4:24, 0] = segm[8:18, 4:24, 2] = 100  # 10 rows of 20
        segm[:, 18:28, 1] = 24
        segm[:, 18:28, 2] = 24  # hides 6 of 20 columns
        segm[25:, 18:28, 2] = 3  # the arm
        Image.fromarray(segm).save(root / "test" / "segm" / f"{name}.png")
        content = pickle.dumps(meta_of(i), protocol=2)
        if i % 2:  # as NumPy 1 named it
            content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (root / "test" / "meta" / f"{name}.pkl").write_bytes(content)
        if i != 2:
            view = f"{name}_0_obman_test_rgb_{name}.jpg.png"
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "test" / "views" / view)
    return root, root / "test" / "views"


def test_records(layout, tmp_path, capsys):
    root, views = layout
    arguments = [str(root), str(tmp_path / "out"), "--split", "test", "--views", str(views)]
    obman.main(arguments)
    said = capsys.readouterr().out
    assert "00000014: no reconstructed view at" in said and "1 samples left out" in said
    records = open_source(str(tmp_path / "out" / "test.jsonl"), Config().data)
    assert [records[i].id for i in range(3)] == ["00000000", "00000007", "00000021"]
    record = records[1]
    assert [(t.role, t.text) for t in record.turns] == [
        ("user", "What's the object in the hand?"),
        ("assistant", "The object is bowl."),
        ("user", "Is it clear to identify the object in the hand?"),
        ("assistant", "Yes."),
    ]
    assert record.meta == {"category": "bowl", "occlusion": 0.3}
    assert record.bbox_orig == (4, 8, 20, 10)
    copied = {
        "image_orig": root / "test" / "rgb" / "00000007.jpg",
        "image_target": root / "test" / "rgb_obj" / "00000007.jpg",
        "image_recon": views / "00000007_0_obman_test_rgb_00000007.jpg.png",
    }
    for field, source in copied.items():
        assert getattr(record, field).read_bytes() == source.read_bytes()
    sample = load_images(record, 32, "letterbox")
    whole, person = np.zeros((32, 32), bool), np.zeros((32, 32), bool)
    whole[8:18, 4:24] = person[:, 18:28] = True
    np.testing.assert_array_equal(sample["object_mask"], whole)
    np.testing.assert_array_equal(sample["occluder_mask"], person)
    obman.main(arguments)  # again: the same
    assert len(open_source(str(tmp_path / "out" / "test.jsonl"), Config().data)) == 3


def test_flags_reach_the_records(layout, tmp_path, capsys):
    root, views = layout
    flags = ["--split", "test", "--questions", "clear", "category", "--answers", "word"]
    obman.main([str(root), str(tmp_path), "--views", str(views), *flags, "--limit", "1"])
    (line,) = map(json.loads, (tmp_path / "test.jsonl").read_text().splitlines())
    assert [t["kind"] for t in line["conversations"][::2]] == ["clear", "category"]
    assert line["conversations"][3]["value"] == "bottle"
    for wrong in (["--questions"], ["--questions", "color"], ["--split", "validation"]):
        with pytest.raises(SystemExit) as ended:
            obman.main([str(root), str(tmp_path), "--views", str(views), *wrong])
        assert ended.value.code == 2
    assert "--questions names none" in capsys.readouterr().err


def test_without_images_of_the_object_alone(layout, tmp_path):
    root, views = layout
    (root / "test" / "rgb_obj").rename(tmp_path / "away")
    path, _ = obman.write_records(root, tmp_path / "out", "test", views, answers="word", limit=1)
    (line,) = map(json.loads, path.read_text().splitlines())
    assert "image_target" not in line and line["conversations"][1]["value"] == "bottle"


def test_what_is_wrong_is_said(layout, tmp_path):
    root, views = layout
    out = tmp_path / "out"
    with pytest.raises(DataError, match="is no ObMan: there is no train/rgb"):
        obman.write_records(root, out, "train", views)
    with pytest.raises(DataError, match="not one of 4 samples can be used. The first: 00000000"):
        obman.write_records(root, out, "test", tmp_path)
    assert not (out / "test.jsonl").exists()
    meta = root / "test" / "meta" / "00000007.pkl"
    meta.write_bytes(pickle.dumps({"class_id": "1"}))
    with pytest.raises(DataError, match="sample 00000007: class_id='1' is none of"):
        obman.write_records(root, out, "test", views)
    meta.write_bytes(pickle.dumps({"class_id": [["1"]]}))
    with pytest.raises(DataError, match="sample 00000007: class_id=a list is none of"):
        obman.write_records(root, out, "test", views)
    deep = b"]" * 50_000 + b"a" * 49_999
    meta.write_bytes(b"\x80\x02}X\x08\0\0\0class_id" + deep + b"s.")
    with pytest.raises(DataError, match="00000007.pkl cannot be read: .* lists inside each other"):
        obman.write_records(root, out, "test", views)
    (root / "test" / "segm" / "00000000.png").write_bytes(b"x")
    with pytest.raises(DataError, match="sample 00000000: .*00000000.png is no image that can"):
        obman.write_records(root, out, "test", views)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def test_masks_start_no_program(layout, tmp_path, monkeypatch):
    """Pillow hands an EPS to Ghostscript, whatever the file is called."""
    root, views = layout
    called = tmp_path / "called"
    fake = tmp_path / "bin" / "gs"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ntouch {called}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    segm = root / "test" / "segm" / "00000000.png"
    segm.write_bytes(EPS)
    with pytest.raises(DataError, match="sample 00000000: .*00000000.png is no image that can"):
        obman.write_records(root, tmp_path / "out", "test", views)
    assert not called.exists()
    with contextlib.suppress(OSError), Image.open(segm) as image:
        image.load()
    assert called.exists(), "the image is one that starts it"


def test_masks_are_not_decoded_if_they_are_too_large(layout, tmp_path):
    root, views = layout
    for side in (13_000, 20_000):  # the second one is a DecompressionBombError of Pillow's
        Image.new("1", (side, side)).save(root / "test" / "segm" / "00000000.png")
        with pytest.raises(DataError, match="sample 00000000: .* more than 64 mebipixels"):
            obman.write_records(root, tmp_path / "out", "test", views)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read(tmp_path, protocol):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(meta_of(3), protocol=protocol))
    found = safe_pickle.load(path)
    assert found.keys() == meta_of(3).keys()
    for key, value in meta_of(3).items():
        np.testing.assert_equal(found[key], value)
        assert type(found[key]) is type(value)


class Runs:
    """Pickled, a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_cannot_run_anything(tmp_path, protocol):
    path, touched = tmp_path / "a.pkl", tmp_path / "touched"
    for evil in (Runs(os.mkdir, str(touched)), Runs(eval, "1"), Runs(getattr, {}, "get")):
        path.write_bytes(pickle.dumps({"class_id": evil}, protocol=protocol))
        with pytest.raises(DataError, match="a.pkl cannot be read: it names .*could run a program"):
            safe_pickle.load(path)
    assert not touched.exists()
    pickle.loads(pickle.dumps(Runs(os.mkdir, str(touched))))
    assert touched.exists(), "the pickle is one that runs"


def test_a_damaged_pickle(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(meta_of(1))[:-40])
    with pytest.raises(DataError, match="a.pkl cannot be read"):
        safe_pickle.load(path)
    with pytest.raises(DataError, match="no file at"):
        safe_pickle.load(tmp_path / "none.pkl")
