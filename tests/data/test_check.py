import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support import tiny, write_dataset

from htfa_jax.config import override
from htfa_jax.config.io import save_config
from htfa_jax.data import check as check_module
from htfa_jax.data.check import check, findings_table, main
from htfa_jax.data.examine import Examiner, examine
from htfa_jax.data.pipeline import evaluation_batches
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.data.splits import open_tokenizer
from htfa_jax.errors import DataError

NUM = 40


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A dataset of 40 records, some of them bad in known ways, and its configuration file."""
    folder = tmp_path_factory.mktemp("damaged")
    path = write_dataset(folder, NUM)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (folder / "orig3.png").unlink()
    (folder / "recon5.png").write_bytes(b"")
    content = (folder / "target7.png").read_bytes()
    (folder / "target7.png").write_bytes(content[: len(content) // 2])
    Image.fromarray(np.zeros((48, 96), np.uint8)).save(folder / "mask9.png")
    lines[11]["bbox_orig"] = [400, 400, 10, 10]
    lines[13]["conversations"][0]["from"] = "robot"
    lines[15]["conversations"][1]["value"] = " ".join(map(str, range(300, 500)))
    lines[15]["bbox_recon"] = [0.1, 0.1, 0.2, 0.2]  # two problems in one record
    lines[17]["conversations"][3]["value"] = " ".join(
        map(str, range(200))
    )  # only this answer is cut
    lines[19]["id"] = "r0"
    lines[21]["image_target"] = None
    text = [json.dumps(line) + "\n" for line in lines]
    text[23] = text[23][:50] + "\n"
    path.write_text("".join(text))
    Image.new("RGB", (96, 48)).save(folder / "orig25.png")
    for name in ("target", "mask", "hand"):
        Image.new("L", (96, 48), 255).save(folder / f"{name}25.png")
    save_config(tiny(data__max_text_length=100, data__text_buckets=(100,)), folder / "config.json")
    return path


BAD = [3, 5, 7, 9, 11, 13, 15, 23]


@pytest.fixture(scope="module")
def config(damaged):
    return tiny(data__max_text_length=100, data__text_buckets=(100,))


@pytest.fixture(scope="module")
def report(config, damaged):
    return check(config, str(damaged), num_workers=1)


def test_every_problem_is_counted_with_its_record_and_reason(report):
    found = {
        kind: [(e["record"], e["id"]) for e in problem["examples"]]
        for kind, problem in report["problems"].items()
    }
    assert found == {
        "missing image": [(3, "r3")],
        "empty image": [(5, "r5")],
        "damaged image": [(7, "r7")],
        "another frame": [(9, "r9")],
        "box outside": [(11, "r11"), (15, "r15")],
        "record": [(13, None), (23, None)],
        "too long a text": [(15, "r15")],
    }
    assert report["bad_records"] == len(BAD) and report["training_would_stop"]
    example = report["problems"]["missing image"]["examples"][0]
    assert example["file"] == report["source"]
    assert "record 3 (id r3): image_orig: no file at" in example["reason"]
    assert "put it there, or correct the path" in example["reason"]


def test_what_the_data_is_like(report, config, damaged, tmp_path):
    assert report["records"] == report["checked"] == NUM
    # Two lines cannot be read, one original is missing.
    assert report["image_sizes"] == {"48x48": NUM - 4, "96x48": 1}
    assert report["fields"]["image_target"] == NUM - 3
    assert report["duplicate_ids"] == {
        "count": 1,
        "examples": [{"id": "r0", "records": [0, 19]}],
    }
    assert report["answers"] == {"count": 2 * (NUM - 2), "cut": 3, "cut_share": 3 / 76}
    colors = report["labels"]["color"]
    assert sum(colors["most_common"].values()) == NUM - 2 and colors["different"] == 3
    # The histogram against a count by hand.
    records = RecordFile(damaged)
    tokenizer = open_tokenizer(override(config, {"data.on_error": "skip"}), tmp_path, records)
    lengths = [
        len(tokenizer.encode(records[i].turns).tokens) for i in range(NUM) if i not in (13, 23)
    ]
    for edge, count in report["tokens"]["up_to"].items():
        assert count == sum(int(edge) / 2 < length <= int(edge) for length in lengths)
    assert report["tokens"]["longest"] == max(lengths)
    assert report["tokens"]["median"] == np.median(lengths)


def test_workers_find_the_same(report, config, damaged, monkeypatch):
    monkeypatch.setattr("htfa_jax.data.examine.CHUNK", 7)
    assert check(config, str(damaged), num_workers=2) == report


def test_the_command_prints_writes_and_exits_with_1(damaged, tmp_path, capsys):
    out, clean = tmp_path / "report.json", damaged.parent / "clean.jsonl"
    options = ["--config", str(damaged.parent / "config.json"), "--num_workers", "1"]
    with pytest.raises(SystemExit) as end:
        main([str(damaged), *options, "--report", str(out), "--drop", str(clean)])
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert findings_table(json.loads(out.read_text())) in printed
    assert "8 bad records: training would stop" in printed
    assert f"32 good records written to {clean}" in printed
    # The clean one is clean, and gives what the good records gave.
    main([str(clean), *options])
    printed = capsys.readouterr().out
    assert "0 bad records: training would not stop" in printed
    # One original of it is black, and its mask white everywhere.
    assert "image_orig has one colour alone: 1 records" in printed
    config = tiny(data__max_text_length=100, data__text_buckets=(100,))
    good = [i for i in range(NUM) if i not in BAD]
    before, after = RecordFile(damaged), RecordFile(clean)
    assert len(after) == len(good)
    tokenizer = open_tokenizer(config, tmp_path / "run", after)
    batches = evaluation_batches(override(config, {"eval.batch_size": 8}), after, tokenizer)
    assert sum(loaded.batch.weight.sum() for loaded in batches) == len(good)
    for i, j in enumerate(good):
        assert replace(after[i], where="") == replace(before[j], where="")
    with pytest.raises(SystemExit) as end:
        main([str(damaged), *options, "--drop", str(clean)])
    assert end.value.code == 2 and "exists already" in capsys.readouterr().err


def test_a_dataset_elsewhere_is_named_by_absolute_paths(config, damaged, tmp_path):
    check(config, str(damaged), limit=3, drop=tmp_path / "few.jsonl", num_workers=1)
    first = RecordFile(tmp_path / "few.jsonl", image_root="/")[0]
    assert first.image_orig == damaged.parent / "orig0.png" and first.image_orig.is_file()


def test_a_few_bad_records_do_not_stop_a_run_that_skips_them(config, damaged):
    few = override(config, {"data.on_error": "skip", "data.max_bad_records": 8})
    assert not check(few, str(damaged), num_workers=1)["training_would_stop"]
    fewer = override(few, {"data.max_bad_records": 7})
    assert check(fewer, str(damaged), num_workers=1)["training_would_stop"]


def test_the_first_records_only(config, damaged):
    found = check(config, str(damaged), limit=3, num_workers=1)
    assert (found["checked"], found["records"], found["bad_records"]) == (3, NUM, 0)


def test_a_crop_that_needs_boxes_is_checked_too(config, damaged):
    crops = override(config, {"augment.crop": 0.2})
    path = damaged.parent / "boxless.jsonl"
    line = json.loads(damaged.read_text().splitlines()[0])
    path.write_text(json.dumps({**line, "bbox_recon": None}) + "\n")
    assert "box missing" in check(crops, str(path), num_workers=1)["problems"]
    assert not check(config, str(path), num_workers=1)["problems"]


class Deadly:
    """A dataset whose tenth record kills the process that reads it."""

    def __init__(self, path):
        self.records = RecordFile(path)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        if index == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.records[index]


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_it_with_the_reason(config, damaged, tmp_path, monkeypatch):
    monkeypatch.setattr("htfa_jax.data.examine.CHUNK", 4)
    lenient = override(config, {"data.on_error": "skip"})
    tokenizer = open_tokenizer(lenient, tmp_path, RecordFile(damaged))
    with pytest.raises(DataError, match="was killed, perhaps out of memory: try fewer"):
        list(examine(Examiner(Deadly(damaged), tokenizer, config), NUM, 2))


def test_many_different_answers_are_not_all_kept(config, damaged, monkeypatch):
    monkeypatch.setattr(check_module, "MAX_LABELS", 2)
    found = check(config, str(damaged), num_workers=1)["labels"]["occlusion_ratio"]
    assert found["different"] == 3
    assert sum(found["most_common"].values()) == NUM - 2
