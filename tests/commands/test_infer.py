"""The command: one pair, a file of pairs, restarts; and the script that a run gets."""

import json
import os
import shlex

import numpy as np
import pytest
from PIL import Image

from htfa_jax import infer
from htfa_jax.config import load_config
from htfa_jax.data.records import Record
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.inference.inputs import read_jobs
from htfa_jax.training import example


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture()
def pairs(dataset, tmp_path):
    """A file of four pairs, one of them bad, and the folder for what comes out."""
    raw = lines(dataset)
    rows = [
        {k: raw[i][k] for k in ("id", "image_orig", "image_recon")} | extra
        for i, extra in enumerate(({}, {"query": ["What color is it?", "x"]}, {"query": "y"}))
    ]
    rows.append({"id": "gone", "image_orig": "gone.png"})
    path = dataset.parent / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, tmp_path / "out"


@pytest.mark.slow
def test_one_pair(run_folder, dataset, tmp_path, capsys):
    record, out = RecordFile(dataset)[0], tmp_path / "out"
    infer.main(
        ["--checkpoint", str(run_folder), "--image_orig", str(record.image_orig),
         "--image_recon", str(record.image_recon), "--query", "What color is it?", "x",
         "--output_dir", str(out), "--visualize", "--max_new_tokens", "3",
         "--attention.layer", "1",
         "--bbox_orig", "4", "5", "20", "22", "--bbox_recon", "8", "6", "18", "30"]
    )  # fmt: skip
    (entry,) = lines(out / "predictions.jsonl")
    assert entry["id"] == "orig0" and entry["alignment"] == "boxes"
    assert [a["query"] for a in entry["answers"]] == ["What color is it?", "x"]
    assert 0 < entry["answers"][0]["confidence"] <= 1
    with Image.open(out / entry["completed"]) as completed:
        assert completed.size == (48, 48)
    kinds = ["images", "alpha", "alignment", "level2", "codes", "answer", "answer_2"]
    assert list(entry["figures"]) == kinds
    for path in entry["figures"].values():
        with Image.open(out / path) as figure:
            assert np.asarray(figure.convert("RGB")).std() > 20
    assert (out / "report.html").read_text().count("data:image/") == len(kinds)
    assert "What color is it?" in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_of_pairs_and_its_restart(run_folder, pairs, capsys):
    path, out = pairs
    arguments = ["--checkpoint", str(run_folder), "--input", str(path), "--output_dir", str(out)]
    infer.main(arguments)
    done = lines(out / "predictions.jsonl")
    assert [e["id"] for e in done] == ["r0", "r1", "r2", "gone"]
    assert [len(e["answers"]) for e in done[:3]] == [1, 2, 1]
    assert "image_orig: no file at" in done[3]["error"]
    assert "1 of 4 pairs failed" in capsys.readouterr().err

    # Killed in the middle of a line; the file that was missing is there now.
    text = (out / "predictions.jsonl").read_text().splitlines(keepends=True)
    (out / "predictions.jsonl").write_text(text[0] + text[3] + text[1][: len(text[1]) // 2])
    (path.parent / "gone.png").write_bytes((path.parent / "orig1.png").read_bytes())
    infer.main(arguments)
    (path.parent / "gone.png").unlink()
    again = lines(out / "predictions.jsonl")
    assert [e["id"] for e in again] == ["r0", "r1", "r2", "gone"]
    assert [e["answers"] for e in again[:3]] == [e["answers"] for e in done[:3]]
    assert "error" not in again[3]


@pytest.mark.parametrize(
    "rows, message",
    [
        (['{"id": "a", "image_orig": "x.png"}'] * 2, "lines 1 and 2 have the same id a"),
        (None, "no file at"),
        (["\ufeff"], "is UTF-16: save it as UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read(run_folder, tmp_path, rows, message, capsys):
    path = tmp_path / "pairs.jsonl"
    if rows:
        path.write_text("\n".join(rows), encoding="utf-16" if rows == ["\ufeff"] else "utf-8")
    with pytest.raises(SystemExit) as stopped:
        infer.main(
            ["--checkpoint", str(run_folder), "--input", str(path), "--output_dir", str(tmp_path)]
        )
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_lines_that_cannot_be_pairs_name_themselves(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = {"image_orig": "a.png", "bbox_orig": [1, 2, 3, 4]}
    rows = [good, "{", {**good, "query": 3}, {"id": "no image"}, [1]]
    rows += [{**good, "conversations": [{"from": "human", "value": "<image>\nWhy?"}]}]
    rows += [{**good, "conversations": turns} for turns in (["hello"], 5, [{"from": ["human"]}])]
    rows += [{**good, "id": "\ud800"}, '{"image_orig": "a.png", "query": ' + "[" * 200]
    rows += ['{"image_orig": "a.png", "bbox_orig": [' + "9" * 5000 + ", 1, 2, 3]}"]
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    jobs = read_jobs(path, ("Q?",))
    assert jobs[0].record.image_orig == tmp_path / "a.png" and jobs[0].queries == ("Q?",)
    assert jobs[5].queries == ("Why?",)
    for i, said in ((1, "line 2: not valid JSON"), (2, "query must be"), (3, "image_orig"),
                    (4, "must be an object"),
                    (6, "conversations[0] must be an object with from and value, it is 'hello'"),
                    (7, "conversations must be a list of turns, it is 5"),
                    (8, "conversations[0] must be an object with from and value, it is {'from': ["),
                    (9, "line 10: it holds half of a surrogate pair"),
                    (10, "line 11: not valid JSON"), (11, "more than 4300 digits")):  # fmt: skip
        assert said in str(jobs[i].record)


def test_a_line_ends_at_a_line_feed_only(tmp_path):
    """JSON may hold U+2028 and its like as they are."""
    odd = "a\u2028b\u0085c"
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"id": odd, "image_orig": "a.png"}, ensure_ascii=False) + "\n")
    assert infer.keep_finished(path) == {odd}
    (job,) = read_jobs(path, ("Q?",))
    assert job.id == odd and isinstance(job.record, Record)


def test_one_input_or_the_other(run_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        infer.main(["--checkpoint", str(run_folder), "--output_dir", str(tmp_path)])
    assert "--image_orig" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_of_a_run_works_as_it_stands(run_folder, dataset, monkeypatch):
    example.write_example(run_folder, load_config(run_folder).data, RecordFile(dataset))
    script = run_folder / "infer.sh"
    assert os.access(script, os.X_OK)
    command = script.read_text().splitlines()[-1]
    words = shlex.split(command)
    assert words[2:5] == ["-P", "-m", "htfa_jax.infer"] and words[-1] == "$@"
    monkeypatch.chdir(run_folder)
    infer.main(words[5:-1])
    (entry,) = lines(run_folder / "example" / "out" / "predictions.jsonl")
    assert entry["alignment"] == "boxes" and len(entry["answers"]) == 2
