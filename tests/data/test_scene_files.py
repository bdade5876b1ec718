"""Drawn scenes in the cache: what is damaged is drawn again, with the same bytes."""

import json
import pickle

import pytest

from htfa_jax.config import HeldObjectsConfig
from htfa_jax.data.check import as_line
from htfa_jax.data.held_objects import builder
from htfa_jax.data.held_objects.builder import drawn_scenes
from htfa_jax.errors import DataError

FIELDS = ("image_orig", "image_target", "image_recon", "object_mask", "occluder_mask")
HELD = HeldObjectsConfig(num_train=2, num_validation=1, num_test=1)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Files of a split of two scenes by their path in the cache."""
    folder = tmp_path_factory.mktemp("original")
    drawn_scenes(HELD, 32, "train", folder)
    paths = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


@pytest.fixture
def cache(original, tmp_path):
    for name, content in original.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def pick(original, part):
    (name,) = [name for name in original if part in name]
    return name


def flipped(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("folder", ["orig", "target", "recon", "mask", "hand", "meta"])
@pytest.mark.parametrize("harm", [flipped, lambda x: b"", lambda x: b"{}", lambda x: None])
def test_a_damaged_file_is_drawn_again_when_it_is_read(cache, original, folder, harm, caplog):
    records = drawn_scenes(HELD, 32, "train", cache)
    name = pick(original, f"/{folder}/000001")
    (cache / name).unlink()
    if (content := harm(original[name])) is not None:
        (cache / name).write_bytes(content)
    record = pickle.loads(pickle.dumps(records))[1]  # as in a worker process
    for field in FIELDS:
        image = getattr(record, field)
        expected = original[pick(original, f"{image.path.parent.name}/000001")]
        assert image.is_file() or harm(b"x" * 9) is None
        assert image.read_bytes() == expected, field
    assert (cache / name).read_bytes() == original[name]
    assert caplog.text.count("scene 1 is drawn again") == 1 and name in caplog.text


def test_damaged_records_are_written_again(cache, original, caplog):
    name = pick(original, "train-2-word.jsonl.sha256").removesuffix(".sha256")
    (cache / name).write_bytes(original[name].replace(b"bbox", b"bbux", 1))
    sidecar = pick(original, "/meta/000000")
    (cache / sidecar).write_bytes(original[sidecar].replace(b"occlusion", b"occlusien"))
    records = drawn_scenes(HELD, 32, "train", cache)
    assert len(records) == 2 and records[0].bbox_orig
    assert {n: (cache / n).read_bytes() for n in original} == original
    assert "train-2-word.jsonl is damaged" in caplog.text and "scene 0 is drawn" in caplog.text


def test_what_an_older_version_drew_is_taken_as_it_is(cache, original, monkeypatch):
    for name in original:
        if "/meta/" in name:
            older = json.loads(original[name])
            del older["sha256"], older["seal"]
            (cache / name).write_text(json.dumps(older))
    (cache / pick(original, ".sha256")).unlink()
    monkeypatch.setattr(builder, "make_scene", None)
    records = drawn_scenes(HELD, 32, "train", cache)
    for field in FIELDS:
        assert getattr(records[1], field).read_bytes()


def test_what_cannot_be_drawn_again_is_said(cache, original, monkeypatch):
    records = drawn_scenes(HELD, 32, "train", cache)
    name = pick(original, "/orig/000001")
    (cache / name).write_bytes(b"")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builder, "write_whole", full)
    with pytest.raises(DataError, match=r"000001.jpg is damaged.* cannot be drawn again: .*space"):
        records[1].image_orig.read_bytes()


def test_a_drawn_record_can_be_written_as_a_line(cache):
    record = drawn_scenes(HELD, 32, "train", cache)[0]
    folder = cache / "held_objects/32px-seed0"
    assert json.loads(as_line(record, folder))["image_orig"] == "train/orig/000000.jpg"
