"""The command: one pair, a file of pairs, restarts; and the script that a run gets."""

import dataclasses
import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from htfa_jax import infer
from htfa_jax.config import load_config
from htfa_jax.data.records import Record
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.inference import engine
from htfa_jax.inference.inputs import read_jobs
from htfa_jax.inference.kept import keep_finished
from htfa_jax.inference.results import Result
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
    assert keep_finished(path) == {odd}
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


def test_data_that_is_away_after_the_last_step_fails_no_run(run_folder, tmp_path, caplog):
    class Away:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise OSError("the bucket is away")

    example.write_example(tmp_path, load_config(run_folder).data, Away())
    assert "no infer.sh was written: the bucket is away" in caplog.text


class Answering:
    """An engine that says which image it saw and what it was asked."""

    def __init__(self, *args, **options):
        pass

    def iterate(self, pairs, queries, **options):
        for pair, asked in zip(pairs, queries, strict=True):
            said = Path(pair.image_orig).read_bytes().hex()[:80]
            results = [Result(answer=said, query=q or "default", confidence=0.5) for q in asked]
            image = Image.open(pair.image_orig).convert("RGB")
            results[0] = dataclasses.replace(results[0], completed=image, alignment="none")
            yield results


@pytest.fixture()
def asked(run_folder, tmp_path, monkeypatch):
    """Calls the command on rows of pairs; gives the predictions and what was logged of them."""
    monkeypatch.setattr(engine, "HTFAInference", Answering)
    for name, color in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")

    def ask(rows, *more, run=run_folder, name="pairs"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = ["--output_dir", str(tmp_path / "out"), "--input", str(path)]
        infer.main(["--checkpoint", str(run), *out, *more])
        return lines(tmp_path / "out/predictions.jsonl")

    return ask


def answers(entries):
    return [(e["id"], e["answers"][0]["query"], e["answers"][0]["answer"]) for e in entries]


def test_another_input_is_not_answered_with_the_last_one_s_results(asked, tmp_path, capsys):
    first = asked([{"image_orig": f"{n}.png"} for n in "abc"])
    second = asked([{"image_orig": "b.png"}], name="second")
    assert answers(second) == [("0", "default", answers(first)[1][2])]
    said = capsys.readouterr().err
    assert "3 results in" in said and "1 of another pair" in said
    assert "2 of pairs that are not in this input" in said
    assert [p.name for p in (tmp_path / "out/completed").iterdir()] == ["000000_0.png"]
    with Image.open(tmp_path / "out/completed/000000_0.png") as image:
        assert image.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("change", ["image", "box", "query", "option", "model", "mask"])
def test_what_a_result_was_made_from_counts_and_its_place_does_not(
    asked, tmp_path, run_folder, change
):
    rows, more, run = (
        [{"id": "x", "image_orig": "a.png"}, {"id": "y", "image_orig": "b.png"}],
        [],
        {},
    )
    before = asked(rows)
    times = (tmp_path / "out/completed/000000_x.png").stat().st_mtime_ns
    (tmp_path / "out/report.html").write_text("of before")
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / "moved/other.png")
    again = asked([{**rows[0], "image_orig": "moved/other.png"}, rows[1]])
    assert again == before  # the same bytes elsewhere
    assert (tmp_path / "out/completed/000000_x.png").stat().st_mtime_ns == times
    if change == "image":
        shutil.copy(tmp_path / "c.png", tmp_path / "a.png")  # replaced under its name
    elif change == "box":
        rows[0]["bbox_orig"] = [1, 1, 4, 4]
    elif change == "mask":
        rows[0]["object_mask"] = "c.png"
    elif change == "query":
        more = ["--query", "What else?"]
    elif change == "option":
        more = ["--temperature", "0.5"]
    else:
        run["run"] = shutil.copytree(run_folder, tmp_path / "run")
        config = json.loads((run["run"] / "config.json").read_text())
        config["level2"]["intensity_threshold"] = 0.02
        (run["run"] / "config.json").write_text(json.dumps(config))
    after = asked(rows, *more, **run)
    assert sorted(e["id"] for e in after) == ["x", "y"]
    made = {e["id"]: e["made_from"] for e in after}
    changed = [e["id"] for e in before if e["made_from"] != made[e["id"]]]
    assert changed == (["x"] if change in ("image", "box", "mask") else ["x", "y"])
    assert not (tmp_path / "out/report.html").exists()


def test_results_that_do_not_say_what_they_are_of_are_made_again(asked, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "victim.png").write_bytes(b"somebody's")
    entry = {"id": "0", "answers": [], "completed": "../victim.png", "figures": {"a": "/etc/x"}}
    (tmp_path / "out/predictions.jsonl").write_text(json.dumps(entry) + "\n")
    (found,) = asked([{"image_orig": "a.png"}])
    assert found["answers"] and "an earlier version" in capsys.readouterr().err
    assert (tmp_path / "victim.png").read_bytes() == b"somebody's"


def test_one_pair_leaves_nothing_of_earlier_calls(asked, run_folder, tmp_path):
    asked([{"image_orig": f"{n}.png"} for n in "ab"])
    (tmp_path / "out/report.html").write_text("of before")
    infer.main(["--checkpoint", str(run_folder), "--output_dir", str(tmp_path / "out"),
                "--image_orig", str(tmp_path / "c.png")])  # fmt: skip
    (entry,) = lines(tmp_path / "out/predictions.jsonl")
    assert entry["id"] == "c"
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == [
        "000000_c.png", "completed", "predictions.jsonl",
    ]  # fmt: skip
