import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from htfa_jax.data.records import RecordFile, Turn, parse_record
from htfa_jax.errors import DataError

GOOD = {
    "id": "7",
    "image_orig": "a.jpg",
    "image_recon": "b.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?", "kind": "category"},
        {"from": "gpt", "value": "A cup."},
    ],
}


def parse(**changes):
    raw = {k: v for k, v in {**GOOD, **changes}.items() if v is not ...}
    return parse_record(raw, "data.jsonl, record 3", Path("/root"))


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
        ({"bbox_orig": [1, 2, float("nan"), 3]}, "bbox_orig must be"),
        ({"bbox_recon": [1, 2, 0, 3]}, "bbox_recon=.* has no area"),
        ({"bbox_orig": "1234"}, "bbox_orig must be"),
        ({"conversations": ...}, "conversations must be a list"),
        ({"conversations": []}, "conversations must be a list"),
        (talk(("human", "hi")), "conversations has no assistant turn"),
        (talk(("robot", "hi"), ("gpt", "x")), r"conversations\[0\].from='robot', expected one of"),
        (talk(("human", "hi"), ("gpt", "  ")), r"conversations\[1\].value is empty"),
        (talk(("human", 3), ("gpt", "x")), r"conversations\[0\].value must be text"),
        ({"meta": 3}, "meta must be an object"),
    ],
)
def test_a_bad_record_says_where_and_why(changes, reason):
    with pytest.raises(DataError, match=r"data.jsonl, record 3 \(id 7\): " + reason):
        parse(**changes)


def write(path, records, array=False):
    text = json.dumps(records) if array else "".join(json.dumps(r) + "\n" for r in records)
    path.write_text(text, encoding="utf-8")
    return path


def many(num):
    return [{**GOOD, "id": str(i), "note": "ü" * (i % 7)} for i in range(num)]


@pytest.mark.parametrize("array", [False, True])
def test_files_are_read_at_random(tmp_path, array):
    records = RecordFile(write(tmp_path / "d.json", many(40), array))
    assert len(records) == 40
    assert [records[i].id for i in (39, 0, 17)] == ["39", "0", "17"]
    assert records[0].image_orig == tmp_path / "a.jpg"
    assert RecordFile(records.path, "/pictures")[0].image_orig == Path("/pictures/a.jpg")


def test_threads_and_processes_read_the_right_lines(tmp_path):
    records = RecordFile(write(tmp_path / "d.jsonl", many(300)))
    assert records[5].id == "5"
    copy = pickle.loads(pickle.dumps(records))
    with ThreadPoolExecutor(8) as pool:
        for source in (records, copy):
            ids = pool.map(lambda i, s=source: s[i].id, range(300))
            assert list(ids) == [str(i) for i in range(300)]


def test_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n" + json.dumps(GOOD) + "\n\n  \n" + json.dumps(GOOD), encoding="utf-8")
    assert len(RecordFile(path)) == 2


def test_bad_files_say_so(tmp_path):
    with pytest.raises(DataError, match="no dataset at"):
        RecordFile(tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="holds no records"):
        RecordFile(empty)
    broken = tmp_path / "broken.json"
    broken.write_text("[{]")
    with pytest.raises(DataError, match="broken.json is not valid JSON"):
        RecordFile(broken)
    half = tmp_path / "half.jsonl"
    half.write_text(json.dumps(GOOD) + '\n{"id": ')
    with pytest.raises(DataError, match="half.jsonl, record 1: not valid JSON"):
        RecordFile(half)[1]
