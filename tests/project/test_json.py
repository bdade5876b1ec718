"""Who reads JSON that somebody else may have written reads it by one reader, and says so alike."""

import ast
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import DAMAGED_JSON, GOOD, tiny

from htfa_jax.checkpoints import integrity, weights
from htfa_jax.checkpoints.lock import LOCK, lock
from htfa_jax.config import load_config
from htfa_jax.config.io import fields_without_value
from htfa_jax.data.convert import convert
from htfa_jax.data.held_objects import build_scenes, contact_sheet
from htfa_jax.data.held_objects.scene_files import read_sidecar
from htfa_jax.data.sources import array_records
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.demo.http import read_box
from htfa_jax.errors import CheckpointError, ConfigError, DataError
from htfa_jax.evaluation.curves import read_curves
from htfa_jax.evaluation.report_html import write_report
from htfa_jax.inference.export import evaluations
from htfa_jax.inference.inputs import read_jobs
from htfa_jax.inference.kept import keep_finished
from htfa_jax.training.loss_guard import load_dump
from weights_convert.folder import CONVERSION
from weights_convert.source import Source
from weights_convert.tokenizer import convert_tokenizer
from weights_convert.verify import _family, same_files

ROOT = Path(__file__).parents[2]
SCENES = {"image_size": 32, "num_workers": 1}
# Where `json` may be called: its reader, and values of our own that go through it and back.
ALLOWED = {
    "htfa_jax/checkpoints/weights.py": "json.loads(json.dumps(fields))",
    "htfa_jax/data/convert.py": "json.loads(json.dumps(records.identity))",
}
# In a line of many, what is damaged is that line.
damaged = pytest.mark.parametrize("content", DAMAGED_JSON.values(), ids=DAMAGED_JSON)


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def whole_line(content):
    """As a line of a file: without what would make it two, or none."""
    return content.replace(b"\n", b"") + b"\n"


def of_config(folder, content):
    load_config(written(folder / "config.json", content))


def of_old_config(folder, content):
    fields_without_value(written(folder / "config.json", content))


def of_weight_folder(folder, content):
    written(folder / weights.WEIGHTS, b"")
    written(folder / weights.CONFIG, content)
    weights.read_description(folder, "vq")


def of_metrics(folder, content):
    written(folder / "evaluation/test/metrics.json", content)
    evaluations(folder, 7)


def of_tokenizer(folder, content):
    shutil.copytree(ROOT / "htfa_jax/tiny/demo/tokenizer", folder / "tokenizer")
    written(folder / "tokenizer/tokenizer_config.json", content)
    ChatTokenizer(folder / "tokenizer")


def of_manifest(folder, content):
    array_records.read_manifest(written(folder / array_records.MANIFEST, content))


def of_shard(folder, content):
    writer = array_records.open_writer(folder / "a.array_record")
    writer.write(array_records.pack(content))
    writer.close()
    array_records.ShardedRecords([folder / "a.array_record"], folder.joinpath)[0]


def of_record(folder, content):
    path = written(folder / "a.jsonl", json.dumps(GOOD).encode() + b"\n" + whole_line(content))
    if not whole_line(content).strip():
        raise DataError(f"{path}: blank")
    RecordFile(path)[1]


def of_conversion(folder, content):
    path = written(folder / "a.jsonl", json.dumps(GOOD).encode())
    written(folder / "packed" / array_records.UNFINISHED, whole_line(content))
    convert(str(path), folder / "packed")


def of_scenes(folder, content):
    written(folder / "settings.json", content)
    build_scenes(folder, "test", 1, **SCENES)


def of_scene(folder, content):
    read_sidecar(written(folder / "000000.json", content))


def of_sheet(folder, content):
    contact_sheet(written(folder / "a.jsonl", whole_line(content)), folder / "sheet.png")


def of_curves(folder, content):
    written(folder / "logs/metrics.jsonl", b'{"step": 1}\n' + (whole_line(content).strip() or b"?"))
    with (folder / "logs/metrics.jsonl").open("ab") as file:
        file.write(b'\n{"step": 2}\n')
    read_curves(folder)


def of_predictions(folder, content):
    written(folder / "predictions.jsonl", (whole_line(content).strip() or b"?") + b"\n")
    write_report(folder, "title")


def of_dump(folder, content):
    written(folder / "0_facts.json", content)
    np.savez(folder / "batch_0.npz", tokens=np.zeros(2))
    load_dump(folder)


def of_source(folder, content):
    written(folder / "config.json", content)
    Source(folder)


def of_index(folder, content):
    written(folder / "model.safetensors.index.json", content)
    Source(folder)


def of_family(folder, content):
    written(folder / weights.CONFIG, content)
    _family(folder)


def of_verified(folder, content):
    written(folder / CONVERSION, content)
    same_files(folder, None)


def of_foreign_tokenizer(folder, content):
    files = {"tokenizer_config.json": written(folder / "tokenizer_config.json", content)}
    convert_tokenizer(files, folder / "out")


READERS = [
    (of_config, ConfigError),
    (of_old_config, ConfigError),
    (of_weight_folder, CheckpointError),
    (of_metrics, CheckpointError),
    (of_tokenizer, DataError),
    (of_manifest, DataError),
    (of_shard, DataError),
    (of_record, DataError),
    (of_conversion, DataError),
    (of_scenes, DataError),
    (of_scene, DataError),
    (of_sheet, DataError),
    (of_curves, DataError),
    (of_predictions, DataError),
    (of_dump, DataError),
    (of_source, CheckpointError),
    (of_index, CheckpointError),
    (of_family, CheckpointError),
    (of_verified, CheckpointError),
    (of_foreign_tokenizer, CheckpointError),
]


@damaged
@pytest.mark.parametrize("read,error", READERS, ids=[read.__name__ for read, _ in READERS])
def test_a_damaged_file_is_named_by_the_error_of_its_reader(tmp_path, read, error, content):
    with pytest.raises(error, match=str(tmp_path)):
        read(tmp_path, content)


@damaged
def test_a_damaged_description_makes_a_checkpoint_damaged(tmp_path, content):
    for name in ("meta", "params"):
        (tmp_path / name).mkdir()
    for name in (integrity.HASHES, "_CHECKPOINT_METADATA"):
        path = written(tmp_path / name, content)
        assert str(path) in integrity.damage(tmp_path)
        path.unlink()
    assert integrity.damage(tmp_path) is None


@damaged
def test_a_checkpoint_whose_facts_are_damaged_is_listed(tmp_path, content):
    folder = tmp_path / "checkpoints/3"
    written(folder / "metrics/metrics", content)
    written(folder / "_CHECKPOINT_METADATA", content)
    (saved,) = integrity.listing(tmp_path)
    assert saved.step == 3 and saved.metrics == {}


@damaged
def test_a_damaged_lock_file_is_free(tmp_path, content):
    written(tmp_path / LOCK, content)
    with lock(tmp_path):
        pass


@damaged
def test_a_damaged_line_of_pairs_spoils_its_own_result_only(tmp_path, content):
    good = json.dumps({"image_orig": "a.png", "query": "Q?"}).encode()
    line = whole_line(content).strip() or b"?"
    if content.startswith(b"\xff\xfe"):
        line = line[2:]  # the mark would be in the middle of a file
    jobs = read_jobs(written(tmp_path / "pairs.jsonl", b"\n".join([good, line, good])), ())
    assert [type(job.record).__name__ for job in jobs] == ["Record", "DataError", "Record"]
    assert f"{tmp_path}/pairs.jsonl, line 2: " in str(jobs[1].record)


@damaged
def test_a_damaged_line_of_predictions_is_answered_again(tmp_path, content):
    good = b'{"id": "a"}'
    line = whole_line(content).strip() or b"?"
    path = written(tmp_path / "predictions.jsonl", b"\n".join([good, line, b'{"answers": []}']))
    assert keep_finished(path) == {"a"}
    assert path.read_bytes() == good + b"\n"


BOXES = ["[" * 50_000, "9" * 5000, "NaN,1,2,3", "1e999,1,2,3", "1,2,3", "x", "'1',2,3,4", "{", "\0"]


@pytest.mark.parametrize("text", BOXES, ids=range(len(BOXES)))
def test_a_box_that_is_none_is_told_by_its_name(text):
    for sent in (text, f"[{text}]"):
        try:
            assert isinstance(read_box(sent, "bbox_orig"), list)
        except DataError as error:
            assert str(error).startswith("bbox_orig=") and "four numbers" in str(error)


@pytest.mark.slow
def test_nothing_else_calls_json():
    found = {}
    for path in itertools.chain(ROOT.glob("htfa_jax/**/*.py"), ROOT.glob("weights_convert/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = path.relative_to(ROOT).as_posix()
            assert not (isinstance(node, ast.ImportFrom) and node.module == "json"), name
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load"):
                found[name] = ast.unparse(node)
    assert found == ALLOWED


def test_what_is_not_damaged_is_read(tmp_path):
    assert load_config(written(tmp_path / "config.json", b"{}")) is not None
    weights.save_component(tmp_path / "vq", "vq", tiny().vq, {"a": np.zeros(2)})
    assert weights.read_description(tmp_path / "vq", "vq")["family"] == "vq"
    assert read_box("1, 2, 3.5, 4", "x") == read_box(" [1, 2, 3.5, 4]", "x") == [1, 2, 3.5, 4]
    assert read_box(" ", "x") is None
