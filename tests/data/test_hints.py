"""What data.check says of data that stops no run but may be meant otherwise."""

import json

import numpy as np
import pytest
from PIL import Image
from support import tiny

from htfa_jax.data.check import check, findings_table
from htfa_jax.data.forms import meant_by

TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
MASK = np.zeros((48, 64), np.uint8)
MASK[10:38, 20:44] = 255


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(tmp_path / "orig.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    Image.fromarray(255 - MASK).save(tmp_path / "inverted.png")
    Image.fromarray(0 * MASK).save(tmp_path / "empty.png")
    Image.new("RGB", (64, 48), "grey").save(tmp_path / "grey.png")
    return tmp_path


def found(folder, *records):
    rows = [{"id": str(i), "image_orig": "orig.png", "conversations": TALK, **record}
            for i, record in enumerate(records)]  # fmt: skip
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check(tiny(), str(folder / "a.jsonl"), num_workers=1)
    assert not report["training_would_stop"]
    return report, findings_table(report)


RIGHT = {"object_mask": "mask.png", "bbox_orig": [20, 10, 24, 28]}


def test_what_is_right_is_not_odd(folder):
    report, table = found(folder, RIGHT, {}, {"meta": {"a": 1}})
    assert "nothing wrong" in table and "otherwise" not in table
    assert report["masks"]["object_mask"]["share"]["median"] == pytest.approx(0.219, abs=0.03)
    assert "object_mask: 1, share of the image that is true: least 2" in table


def test_corners(folder):
    corners = {"object_mask": "mask.png", "bbox_orig": [20, 10, 44, 38]}
    report, table = found(folder, corners, RIGHT, {"bbox_orig": [40, 10, 60, 38]})
    assert report["boxes"]["look_like_corners"] == {"bbox_orig": 2}
    assert report["boxes"]["leave_their_image"] == {"bbox_orig": 1}
    assert "bbox_orig looks like corners (x, y, x, y): 2 records" in table
    assert "nothing wrong" not in table


def test_a_box_elsewhere_than_its_mask(folder):
    report, table = found(folder, {"object_mask": "mask.png", "bbox_orig": [0, 0, 8, 6]})
    assert report["boxes"]["elsewhere_than_object_mask"] == 1
    assert "bbox_orig is elsewhere than object_mask: 1 records" in table


def test_masks_and_images_of_nothing(folder):
    report, table = found(
        folder, {"object_mask": "empty.png"}, {"object_mask": "inverted.png"},
        {"image_recon": "grey.png", "object_mask": "inverted.png"},
    )  # fmt: skip
    assert report["masks"]["object_mask"]["empty"] == 1
    assert report["images_of_one_colour"] == {"image_recon": 1}
    for line in ("object_mask is true nowhere: 1", "is it inverted?",
                 "image_recon has one colour alone: 1"):  # fmt: skip
        assert line in table


def test_fields_that_nothing_reads(folder):
    odd = {"image_reconstruction": "orig.png", "mask": "mask.png", "bbox": [1, 2, 3, 4], "who": 1}
    report, table = found(folder, odd, odd)
    assert report["unread_fields"]["who"] == {"count": 2, "meant": None}
    for name, meant in (("image_reconstruction", "image_recon"), ("mask", "object_mask"),
                        ("bbox", "bbox_orig")):  # fmt: skip
        assert f"field {name} is not read: 2 records; did you mean {meant}?" in table


@pytest.mark.parametrize(
    "name,meant",
    [("image_tgt", "image_target"), ("imge_orig", "image_orig"), ("Reconstruction", "image_recon"),
     ("bbox_original", "bbox_orig"), ("mask_object", None), ("split", None)],
)  # fmt: skip
def test_names_that_are_near(name, meant):
    assert meant_by(name) == meant


def test_boxes_in_parts_of_the_sides(folder):
    (folder / "a.jsonl").write_text(json.dumps(
        {"image_orig": "orig.png", "conversations": TALK, "bbox_orig": [0.2, 0.2, 0.5, 0.5]}
    ))  # fmt: skip
    table = findings_table(check(tiny(), str(folder / "a.jsonl"), num_workers=1))
    assert "these look like parts of its sides (0 to 1)" in table
