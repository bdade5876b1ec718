"""Records in the forms that people have: read as this project's own, or explained shortly."""

import base64
import csv
import io
import json
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from htfa_jax.config import Config
from htfa_jax.data.check import as_line
from htfa_jax.data.convert import main as convert
from htfa_jax.data.decode import decode_field, load_image, upright_size
from htfa_jax.data.image_values import run_lengths
from htfa_jax.data.masks import load_mask
from htfa_jax.data.records import Turn
from htfa_jax.data.sources.open import open_source
from htfa_jax.errors import DataError
from htfa_jax.inference.inputs import as_record, read_jobs

TALK = (Turn("user", "What is it?"), Turn("assistant", "bottle"))
OWN = {"conversations": [{"from": "human", "value": "What is it?"},
                         {"from": "gpt", "value": "bottle"}]}  # fmt: skip
INSIDE = np.zeros((48, 64), bool)
INSIDE[10:38, 20:44] = True


def png(color="red"):
    file = io.BytesIO()
    Image.new("RGB", (64, 48), color).save(file, "PNG")
    return file.getvalue()


def uri(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    (data / "pics").mkdir(parents=True)
    for name in ("orig.png", "recon.png", "pics/orig.png"):
        (data / name).write_bytes(png())
    return data


def opened(path, tmp, **options):
    data = replace(Config().data, cache_dir=str(tmp / "cache"), **options)
    return open_source(str(path), data)


def written(folder, *records, name="train.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def only(folder, record, **options):
    records = opened(written(folder, record), folder.parent, **options)
    assert len(records) == 1
    return records[0]


PARTS = [
    {"role": "user", "content": [{"type": "image", "image": "orig.png"},
                                 {"type": "image_url", "image_url": {"url": "recon.png"}},
                                 {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "bottle"}]},
]  # fmt: skip
MESSAGES = [
    {"role": "user", "content": "<image><image>What is it?"},
    {"role": "assistant", "content": "bottle"},
]
FORMS = {
    "own": {"image_orig": "orig.png", "image_recon": "recon.png", **OWN},
    "InternVL": {"image": ["orig.png", "recon.png"], **OWN},
    "ms-swift": {"images": ["orig.png", "recon.png"], "messages": MESSAGES},
    "images as objects": {
        "images": [{"path": "orig.png", "bytes": None}, {"path": "recon.png"}],
        "messages": MESSAGES,
    },
    "content in parts": {"messages": PARTS},
    "roles in conversations": {"images": ["orig.png", "recon.png"], "conversations": MESSAGES},
    "question and answer": {
        "image_orig": "orig.png", "image_recon": "recon.png", "question": "<image>\nWhat is it?",
        "answer": "bottle",
    },
    "preferences": {
        "image": ["orig.png", "recon.png"], "question": "What is it?", "chosen": "bottle",
        "rejected": "jar",
    },
    "image folder": {"file_name": "orig.png", "image_recon_file_name": "recon.png", **OWN},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_record_of_each_form(folder, form):
    record = only(folder, FORMS[form])
    assert record.turns == TALK
    assert (record.image_orig, record.image_recon) == (folder / "orig.png", folder / "recon.png")
    # The same file asks the same question of `infer`.
    (job,) = read_jobs(folder / "train.jsonl", ("another",))
    assert job.queries == ("What is it?",) and job.record.image_recon == record.image_recon
    # And it can be written as this project's own.
    again = json.loads(as_line(record, folder))
    assert again["image_orig"] == "orig.png" and again["conversations"][1]["value"] == "bottle"


def test_a_message_lists_forms_and_fields(folder):
    with pytest.raises(DataError, match="image_orig is missing: .*images.* has photo, convers"):
        only(folder, {"photo": "orig.png", **OWN})
    with pytest.raises(DataError, match="conversations is missing: .*messages.* has image_orig"):
        only(folder, {"image_orig": "orig.png"})
    with pytest.raises(DataError, match=r"messages\[0\].content\[0\] must be a text or an image"):
        only(folder, {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a"}]}]})


RECORDS = [{"id": str(i), **FORMS["own"]} for i in range(3)]


@pytest.mark.parametrize(
    "text,count",
    [
        (json.dumps({"version": 1, "data": RECORDS}), 3),
        (json.dumps({"version": 1, "data": RECORDS}, indent=2), 3),
        (json.dumps(RECORDS, indent=2), 3),
        (json.dumps(RECORDS[0], indent=2), 1),
        (json.dumps(RECORDS[0]), 1),
        ("\n".join(json.dumps(r, indent=1) for r in RECORDS), 3),
        ("\n\n" + "\n".join(map(json.dumps, RECORDS)) + "\n\n", 3),
    ],
)
@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_records_under_a_key_and_over_many_lines(folder, tmp_path, text, count, name):
    path = folder / name
    path.write_text(text)
    records = opened(path, tmp_path)
    assert [records[i].id for i in range(len(records))] == [str(i) for i in range(count)]
    assert [job.id for job in read_jobs(path, ())] == [str(i) for i in range(count)]


@pytest.mark.parametrize(
    "value,reason",
    [
        ({"a": {"root": "pics", "annotation": "a.jsonl"}}, "data.train=a.jsonl, data.image_root"),
        ({"images": [{}], "annotations": [{}], "categories": [{}]}, "is in COCO's form"),
        ({"train": [{"a": 1}], "test": [{"a": 1}]}, "lists of objects under train, test"),
    ],
)
def test_what_holds_no_records_is_explained(folder, tmp_path, value, reason):
    for indent in (None, 2):
        (folder / "a.json").write_text(json.dumps(value, indent=indent))
        with pytest.raises(DataError, match=reason):
            opened(folder / "a.json", tmp_path)


def test_a_damaged_line_is_that_lines_alone(folder, tmp_path):
    lines = [json.dumps(r) for r in RECORDS]
    (folder / "a.jsonl").write_text("\n".join([lines[0][:40], *lines]))
    jobs = read_jobs(folder / "a.jsonl", ())
    assert [isinstance(job.record, DataError) for job in jobs] == [True, False, False, False]
    records = opened(folder / "a.jsonl", tmp_path)
    assert len(records) == 4 and records[3].id == "2"
    with pytest.raises(DataError, match="record 0: not valid JSON"):
        records[0]


def test_tables(folder, tmp_path):
    with (folder / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "question", "answer", "bbox_orig"])
        table.writerow(["a", "orig.png", "What is it?", "bottle", "[1, 2, 3, 4]"])
        table.writerow(["b", "orig.png", "Is it red,\nor not?", 'a "red" one', ""])
    records = opened(folder / "a.csv", tmp_path)
    assert records[0].turns == TALK and records[0].bbox_orig == (1, 2, 3, 4)
    assert records[1].turns[0].text == "Is it red,\nor not?" and records[1].bbox_orig is None
    assert [job.queries for job in read_jobs(folder / "a.csv", ())][0] == ("What is it?",)
    (folder / "a.csv").write_text("image,question\norig.png,a,b,c\n")
    with pytest.raises(DataError, match="line 2 has more cells"):
        opened(folder / "a.csv", tmp_path)


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("split", ["", "train"])
def test_image_folders(folder, tmp_path, metadata, split):
    inner = folder / "pics"
    (inner / split).mkdir(exist_ok=True)
    (inner / split / "orig.png").write_bytes(png())
    row = {"file_name": "orig.png", "question": "What is it?", "answer": "bottle"}
    if metadata.endswith("csv"):
        (inner / split / metadata).write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    else:
        written(inner / split, row, name=metadata)
    record = opened(inner, tmp_path)[0]
    assert record.turns == TALK and record.image_orig == inner / split / "orig.png"


def test_parquet_and_folders_of_datasets(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    image = {"bytes": png("blue"), "path": None}
    path = {"bytes": None, "path": "orig.png"}
    rows = [
        {"id": "a", "images": [image, image], "messages": MESSAGES},
        {"id": "b", "images": [path], "messages": MESSAGES},
    ]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / "train-00000.parquet")
    saved = folder / "saved"
    saved.mkdir()
    with ipc.new_stream(str(saved / "data-0.arrow"), table.schema) as writer:
        writer.write_table(table)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    (saved / "orig.png").write_bytes(png())
    for name in ("train-00000.parquet", "", "saved"):
        records = opened(folder / name, tmp_path)
        assert len(records) == 2 and records[0].turns == TALK
        for field in ("image_orig", "image_recon"):
            found = decode_field(records[0], field, load_image)
            assert np.asarray(found)[0, 0].tolist() == [0, 0, 255]
        assert decode_field(records[1], "image_orig", load_image).size == (64, 48)
    assert [job.id for job in read_jobs(folder / "train-00000.parquet", ())] == ["a", "b"]
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(DataError, match="does not list the files"):
        opened(saved, tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        uri(png()),
        {"bytes": base64.b64encode(png()).decode(), "path": "x.png"},
        {"bytes": None, "path": "orig.png"},
        {"url": uri(png())},
    ],
    ids=["data:", "bytes", "path", "url"],
)
def test_images_inside_records(folder, tmp_path, value):
    record = only(folder, {"image_orig": value, "object_mask": None, **OWN})
    assert np.asarray(decode_field(record, "image_orig", load_image))[0, 0].tolist() == [255, 0, 0]
    # Packed and written anew they are the same.
    convert([str(folder / "train.jsonl"), str(tmp_path / "packed")])
    packed = opened(tmp_path / "packed", tmp_path)[0]
    assert decode_field(packed, "image_orig", load_image).size == (64, 48)
    (folder / "again.jsonl").write_text(as_line(record, folder))
    again = opened(folder / "again.jsonl", tmp_path)[0]
    assert decode_field(again, "image_orig", load_image).size == (64, 48)


@pytest.mark.parametrize(
    "value,reason",
    [
        (uri(png())[:-30] + "!", "base64 that is damaged"),
        (uri(bytes(20_000)), "is no image that can be read"),
        ("data:image/png," + "a" * 20_000, "without base64"),
        ("https://example.org/a.png", "is an address of the web"),
        ({"bytes": 5 * [1]}, "no base64 text"),
        ({"other": "a" * 20_000}, "must have bytes or a path"),
        ("a" * 20_000 + ".png", "is no path: it has 20004 characters"),
        ("D:\\set\\pics\\orig.png", "is a path of Windows: copy the images to"),
        ("\\\\server\\share\\orig.png", "is a path of Windows"),
        ("..\\..\\orig.png", "leads out of"),
    ],
)
def test_what_is_wrong_is_said_shortly(folder, value, reason):
    with pytest.raises(DataError, match=reason) as caught:
        decode_field(only(folder, {"image_orig": value, **OWN}), "image_orig", load_image)
    assert len(str(caught.value).replace(str(folder), "")) < 700


def coco_text(mask):
    """COCO's compressed run lengths, as its own C code writes them."""
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [2]])
    ends = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], ends])).tolist()
    text = ""
    for i, count in enumerate(counts):
        number = count - (counts[i - 2] if i > 2 else 0)
        more = True
        while more:
            digit = number & 31
            number >>= 5
            more = number != (-1 if digit & 16 else 0)
            text += chr((digit | (32 if more else 0)) + 48)
    return counts, text


@pytest.mark.slow
def test_masks_as_coco_writes_them(folder, tmp_path):
    counts, text = coco_text(INSIDE)
    polygon = [20, 10, 43, 10, 43, 37, 20, 37]
    for value in (
        {"size": [48, 64], "counts": counts},
        {"size": [48, 64], "counts": text},
        [polygon],
        polygon,
    ):
        record = only(folder, {"image_orig": "orig.png", "object_mask": value, **OWN})
        found = np.asarray(decode_field(record, "object_mask", load_mask)) > 127
        np.testing.assert_array_equal(found, INSIDE)
        convert([str(folder / "train.jsonl"), str(tmp_path / f"packed{id(value)}")])
        packed = opened(tmp_path / f"packed{id(value)}", tmp_path)[0]
        np.testing.assert_array_equal(
            np.asarray(decode_field(packed, "object_mask", load_mask)) > 127, INSIDE
        )
        assert json.loads(as_line(record, folder))["object_mask"]


def test_run_lengths_of_many_shapes():
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.5, 1):
        mask = rng.random((37, 53)) < density
        for counts in coco_text(mask):
            found = run_lengths({"size": [37, 53], "counts": counts})
            np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize(
    "value,reason",
    [
        ({"size": [48, 64], "counts": "abc" * 9000}, "object_mask has run lengths"),
        ({"size": [48, 64], "counts": [1, 2]}, "has run lengths of 3 pixels"),
        ({"size": [10**9, 64], "counts": [1, 2]}, "has run lengths of size"),
        ([[1, 2, 3, 4]], "has a polygon that is not"),
        ([1, 2, 3, 4, 5, None], "has a polygon that is not"),
    ],
)
def test_masks_that_are_none(folder, value, reason):
    with pytest.raises(DataError, match=reason) as caught:
        only(folder, {"image_orig": "orig.png", "object_mask": value, **OWN})
    assert len(str(caught.value).replace(str(folder), "")) < 500


@pytest.mark.parametrize("name", ["pics\\orig.png", ".\\pics\\orig.png", "pics/orig.png"])
def test_backslashes_are_slashes(folder, name):
    assert only(folder, {"image_orig": name, **OWN}).image_orig == folder / "pics/orig.png"
    record = only(folder, {"image_orig": name, **OWN}, image_root=str(folder))
    assert record.image_orig == folder / "pics/orig.png"


@pytest.mark.parametrize("form,other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_other_systems(folder, tmp_path, form, other):
    (folder / unicodedata.normalize(form, "Krüge")).mkdir()
    there = folder / unicodedata.normalize(form, "Krüge/café.png")
    there.write_bytes(png())
    name = unicodedata.normalize(other, "Krüge/café.png")
    for options in ({}, {"image_root": str(folder)}):
        record = only(folder, {"image_orig": name, **OWN}, **options)
        assert record.image_orig == there
    # A link that leads out is none in the other form either.
    there.unlink()
    (tmp_path / "secret.png").write_bytes(png())
    there.symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="link that leads out"):
        only(folder, {"image_orig": name, **OWN})


def test_a_missing_file_names_what_is_there(folder):
    (folder / "IMG_1.JPG").write_bytes(png())
    for name, reason in (("img_1.jpg", "IMG_1.JPG is there: capital and small letters differ"),
                         ("IMG_1.png", "IMG_1.JPG is there"),
                         ("none/a.png", "there is no folder none")):  # fmt: skip
        with pytest.raises(DataError, match=rf"no file at .*{reason}"):
            decode_field(only(folder, {"image_orig": name, **OWN}), "image_orig", load_image)


@pytest.mark.parametrize(
    "content,reason",
    [
        (b"\0\0\0\x18ftypheic" + bytes(60), "is HEIC, as phones write it, .*: save it as one of"),
        (b"\0\0\0\x18ftypavif" + bytes(60), "is AVIF"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
        (b"<!DOCTYPE html><html>404", "is a page of the web"),
        (b"<svg xmlns=''/>", "SVG"),
    ],
)
def test_what_is_no_image_is_named(folder, content, reason):
    (folder / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        decode_field(only(folder, {"image_orig": "a.png", **OWN}), "image_orig", load_image)


@pytest.mark.parametrize("kind", ["iTXt", "zTXt", "profile", "many", "behind"])
def test_a_png_with_long_texts_is_read(folder, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    info, options = PngImagePlugin.PngInfo(), {}
    long = "workflow " * 250_000
    if kind == "profile":
        options["icc_profile"] = bytes(3_000_000)
    elif kind == "many":
        for i in range(80):
            info.add_text(f"part {i}", "x" * 1_000_000, zip=True)
    else:
        info.add_itxt("workflow", long, zip=True) if kind != "zTXt" else info.add_text(
            "workflow", long, zip=True
        )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info, **options)
    content = file.getvalue()
    if kind == "behind":  # of the pixels
        at = content.index(b"iTXt") - 4
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        tail = content.index(b"IEND") - 4
        content = content[:at] + content[end:tail] + content[at:end] + content[tail:]
    (folder / "long.png").write_bytes(content)
    record = only(folder, {"image_orig": "long.png", **OWN})
    np.testing.assert_array_equal(
        np.asarray(decode_field(record, "image_orig", load_image)), pixels
    )
    assert upright_size(content) == (64, 48)


def test_a_program_may_give_them_too(folder):
    polygon = [20, 10, 43, 10, 43, 37, 20, 37]
    record = as_record({"image_orig": uri(png()), "image_recon": png("blue"),
                        "object_mask": [polygon]}, "here")  # fmt: skip
    for field in ("image_orig", "image_recon"):
        assert decode_field(record, field, load_image).size == (64, 48)
    record = as_record({"image_orig": str(folder / "orig.png"), "object_mask": polygon}, "here")
    found = np.asarray(decode_field(record, "object_mask", load_mask)) > 127
    np.testing.assert_array_equal(found, INSIDE)
    for value in (uri(bytes(9000))[:-40] + "!", "https://example.org/" + "a" * 9000 + ".png", 5):
        with pytest.raises(DataError, match="image_orig") as caught:
            as_record({"image_orig": value}, "here")
        assert len(str(caught.value)) < 300
