from pathlib import Path

import pytest
from support import GOOD

from htfa_jax.data.records import MAX_CHARACTERS, Turn, parse_record
from htfa_jax.errors import DataError


def parse(**changes):
    raw = {k: v for k, v in {**GOOD, **changes}.items() if v is not ...}
    return parse_record(raw, "data.jsonl, record 3", Path("/root").joinpath)


def test_a_record_is_read():
    record = parse(occlusion_mask="m.png", bbox_orig=[1, 2, 3, 4.5], meta={"occlusion": 0.4})
    assert record.image_orig == Path("/root/a.jpg") and record.image_target is None
    assert record.object_mask == Path("/root/m.png")
    assert record.bbox_orig == (1.0, 2.0, 3.0, 4.5) and record.bbox_recon is None
    assert record.turns == (
        Turn("user", "What is it?", "category"),
        Turn("assistant", "A cup.", None),
    )
    assert record.meta == {"occlusion": 0.4}


def test_role_names_are_interchangeable():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "user", "value": "Hi"},
        {"from": "assistant", "value": "Yes"},
    ]
    assert [t.role for t in parse(conversations=turns).turns] == ["system", "user", "assistant"]


def talk(*turns):
    return {"conversations": [dict(zip(("from", "value"), t, strict=False)) for t in turns]}


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"image_orig": ...}, "image_orig is missing"),
        ({"image_recon": 5}, "image_recon must be a path, it is 5"),
        ({"image_orig": ""}, "image_orig must be a path"),
        ({"bbox_orig": [1, 2, 3]}, r"bbox_orig must be \[x, y, w, h\]"),
        ({"bbox_orig": [1, 2, float("nan"), 3]}, r"bbox_orig=\[1, 2, nan, 3\] must be finite"),
        ({"bbox_orig": [1, 2, 4, 10**400]}, "bbox_orig=.* must be finite numbers"),
        ({"bbox_recon": [1, 2, 0, 3]}, r"bbox_recon=\[1, 2, 0, 3\] has no area"),
        ({"bbox_recon": [1, 2, 5, -3]}, "bbox_recon=.* has no area"),
        ({"bbox_orig": "1234"}, "bbox_orig must be"),
        (
            {"conversations": ...},
            "conversations is missing: a record has .* this one has id, image",
        ),
        ({"conversations": []}, "conversations must be a list"),
        (talk(("human", "hi")), "conversations has no assistant turn"),
        (talk(("robot", "hi"), ("gpt", "x")), r"conversations\[0\].from='robot', expected one of"),
        (talk(("human", "hi"), ("gpt", "  ")), r"conversations\[1\].value is empty"),
        (talk(("human", 3), ("gpt", "x")), r"conversations\[0\].value must be text"),
        (
            talk(("human", "hi"), ("gpt", "x"), ("gpt", "y")),
            r"conversations\[1\] and \[2\] are two assistant turns in a row",
        ),
        (
            talk(("human", "hi"), ("gpt", "y" * 200_000)),
            r"conversations\[1\].value has 200000 characters, more than 100000",
        ),
        (
            talk(("human", "hi"), ("gpt", "\ud83d")),
            r"conversations\[1\].* half of a surrogate",
        ),
        ({"meta": 3}, "meta must be an object"),
        (
            {"image_orig": ..., "image": ["a", "b", "c"]},
            "image has 3 images, expected one or two",
        ),
        ({"image_orig": ..., "image": []}, "image has 0 images"),
        ({"image_orig": ..., "image": ["a", "b"]}, "image has a second image and image_recon"),
        ({"image_orig": ..., "image": None}, "image_orig is missing"),
    ],
)
def test_a_bad_record_says_where_and_why(changes, reason):
    with pytest.raises(DataError, match=r"data.jsonl, record 3 \(id 7\): " + reason):
        parse(**changes)


def test_the_longest_answer_is_read():
    text = "y" * MAX_CHARACTERS
    assert parse(**talk(("human", "hi"), ("gpt", text))).turns[1].text == text


@pytest.mark.parametrize(
    "text,left",
    [
        ("<image>\nWhat is it?", "What is it?"),
        ("What's the object in the hand?\n<image>", "What's the object in the hand?"),
        ("Image-1: <image>\nImage-2: <image>\nCompare.", "Compare."),
        ("What does <image> show?\n  Be brief.", "What does show?\n  Be brief."),
        ("Is <image> like <image>?", "Is like?"),
        ("x  <b>\n\n y", "x  <b>\n\n y"),
    ],
)
def test_markers_may_stand_anywhere(text, left):
    assert parse(**talk(("human", text), ("gpt", "x"))).turns[0].text == left


TALK = [{"from": "human", "value": "What's in the hand?\n<image>"}, {"from": "gpt", "value": "A."}]


def read(raw, template=None):
    return parse_record(raw, "here", Path("/root").joinpath, template)


def test_internvl_s_form():
    raw = {"id": 3, "image": ["o.jpg", "r.png"], "conversations": TALK, "width_list": [4, 4]}
    record = read(raw)
    assert (record.image_orig, record.image_recon) == (Path("/root/o.jpg"), Path("/root/r.png"))
    assert record.id == "3" and record.raw["width_list"] == [4, 4] and "image" not in record.raw
    assert read({**raw, "image": ["o.jpg"]}).image_recon is None


def test_llava_s_form():
    record = read({"id": "c/1", "image": "coco/1.jpg", "conversations": TALK})
    assert record.image_orig == Path("/root/coco/1.jpg") and record.image_recon is None


def test_a_template_finds_the_reconstruction():
    """OCC-MLLM's records and MOHO's file names."""
    raw = {"id": "00007561", "image": "00007561.jpg", "conversations": TALK}
    template = "views/{id}_0_obman_test_rgb_{id}.jpg.png"
    found = Path("/root/views/00007561_0_obman_test_rgb_00007561.jpg.png")
    assert read(raw, template).image_recon == found
    assert read(raw, template).raw["image_recon"] == str(found.relative_to("/root"))
    assert read({**raw, "meta": {"view": "04"}}, "{view}/{image}").image_recon == Path(
        "/root/04/00007561.jpg"
    )


def test_a_record_s_own_reconstruction_goes_before_the_template():
    assert parse_record(GOOD, "here", Path, "{id}.png").image_recon == Path("b.png")
    none = {**GOOD, "image_recon": None}
    assert parse_record(none, "here", Path, "{id}.png").image_recon is None


def test_a_template_that_does_not_fit_says_so():
    raw = {"id": "7", "image": "a.jpg", "conversations": TALK}
    with pytest.raises(DataError, match=r"needs the field name, .* it has id, image"):
        read(raw, "{name}.png")
    with pytest.raises(DataError, match="is no template: {id} has a conversion or a format"):
        read(raw, "{id:03d}.png")
