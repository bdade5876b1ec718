"""What a longer or changed run alters is said; nothing is called finished that took no step."""

import json
import re
import shutil

import pytest
from support import WORDS_ONLY, tiny, write_dataset

from htfa_jax import train as command
from htfa_jax.checkpoints.integrity import steps
from htfa_jax.config import override
from htfa_jax.config.io import save_config
from htfa_jax.data.held_out import FROM_TRAIN
from htfa_jax.data.splits import open_split
from htfa_jax.errors import ConfigError, DataError
from htfa_jax.training.dry_run import dry_run
from htfa_jax.training.trainer import train


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return tiny(
        data__train=str(write_dataset(folder, 12)),
        data__validation=None,
        data__test=None,
        data__cache_dir=str(tmp_path_factory.mktemp("cache")),
        **WORDS_ONLY,
        train__max_steps=4,
        train__log_every=1,
    )


@pytest.fixture(scope="module")
def calm(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("calm") / "a"
    train(config, workdir)
    return workdir


@pytest.fixture
def finished(calm, tmp_path):
    return shutil.copytree(calm, tmp_path / "finished")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Other records under another name."""
    return write_dataset(tmp_path_factory.mktemp("mine"), 12, seed=3)


def log_of(workdir):
    return (workdir / "logs/train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"data.train": "others"},
        {"data.sources": ((("others"), 1.0),)},
        {"optim.learning_rate": 2e-3},
        {"loss.label_smoothing": 0.1},
        {"train.accumulation_steps": 2},
        {"seed": 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_finished_run_is_not_finished_again_with_something_else(config, finished, others, change):
    name = next(iter(change))
    change = json.loads(json.dumps(change).replace("others", str(others)))
    before = (finished / "config.json").read_text()
    with pytest.raises(ConfigError) as error:
        train(override(config, change), finished)
    assert name in str(error.value)
    for said in ("complete at step 4", "--init_from", "train.max_steps", "train.epochs"):
        assert said in str(error.value), said
    assert (finished / "config.json").read_text() == before


@pytest.mark.slow
def test_a_finished_run_on_the_same_file_with_other_records(config, tmp_path):
    data = write_dataset(tmp_path / "data", 12)
    mine = override(config, {"data.train": str(data), "train.max_steps": 1})
    train(mine, tmp_path / "run")
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines[1:], lines[1].replace('"r1"', '"new"')]))
    with pytest.raises(ConfigError, match="the training data has other content"):
        train(mine, tmp_path / "run")


def test_a_finished_run_may_be_evaluated_moved_and_shortened(config, finished, tmp_path):
    """None of which trains anything, or wants to."""
    data = tmp_path / "moved/records.jsonl"
    shutil.copytree(config.data.train.rpartition("/")[0], data.parent)
    (data.parent / "data.jsonl").rename(data)
    changes = {
        "data.train": str(data), "eval.batch_size": 2, "train.max_steps": 3, "train.log_every": 2,
        "data.num_threads": 1, "train.keep_checkpoints": 1,
    }  # fmt: skip
    assert train(override(config, changes), finished) == {}
    assert "all 3 steps are done, no more are taken" in log_of(finished)


@pytest.mark.slow
def test_a_longer_schedule_s_jump_is_said(config, finished):
    train(override(config, {"train.max_steps": 6}), finished)
    said = re.search(
        r"the learning rate jumps: (\S+) at step 4, (\S+) at step 5 .* of 6 steps instead of 4",
        log_of(finished),
    )
    rates = {}
    for line in (finished / "logs/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "train/learning_rate" in row:
            rates[row["step"]] = row["train/learning_rate"]
    assert float(said[1]) == pytest.approx(rates[4], rel=1e-2)
    assert float(said[2]) == pytest.approx(rates[5], rel=1e-2)


@pytest.mark.slow
def test_a_schedule_that_stays_is_not_spoken_of(config, finished, tmp_path):
    constant = override(config, {"optim.schedule": "constant", "optim.warmup_steps": 1})
    train(constant, tmp_path / "run")
    train(override(constant, {"train.max_steps": 5}), tmp_path / "run")
    assert "jumps" not in log_of(tmp_path / "run")
    train(config, finished)
    assert "jumps" not in log_of(finished) and "training data" not in log_of(finished)


@pytest.mark.slow
def test_other_records_on_resume_are_said(config, finished, others):
    longer = {"train.max_steps": 5, "data.train": str(others)}
    train(override(config, longer), finished)
    assert "the training data has other content than up to step 4" in log_of(finished)
    few = write_dataset(finished.parent / "few", 5)
    train(override(config, {"train.max_steps": 6, "data.train": str(few)}), finished)
    assert "the training data has 5 records, it had 12 up to step 5" in log_of(finished)


@pytest.mark.slow
@pytest.mark.parametrize("command_line", [[], ["--config.data.test=None"]])
def test_own_data_brings_its_own_split(config, tmp_path, others, command_line, capsys):
    """A preset's drawn scenes say nothing about it."""
    drawn = {f"data.{split}": "held_objects" for split in ("train", "validation", "test")}
    save_config(override(config, {**drawn, "train.max_steps": 1}), tmp_path / "preset.json")
    command.main(
        ["--config", str(tmp_path / "preset.json"), "--workdir", str(tmp_path / "run"),
         f"--config.data.train={others}", *command_line]
    )  # fmt: skip
    data = json.loads((tmp_path / "run/config.json").read_text())["data"]
    said = capsys.readouterr().err
    if command_line:
        assert data["validation"] is None and data["test"] is None
        assert "data.validation of the preset is drawn scenes: left out" in said
    else:
        assert data["validation"] == data["test"] == FROM_TRAIN
        assert "a tenth each of the training data are held out" in said
        assert "8 records" in said  # 12, without 2 and 2
        scores = json.loads((tmp_path / "run/evaluation/test/metrics.json").read_text())
        assert scores["samples"] == 2


@pytest.mark.slow
def test_held_out_records_are_in_one_split_alone(config):
    splits = override(config, {"data.validation": FROM_TRAIN, "data.test": FROM_TRAIN})
    found = {s: open_split(splits, s) for s in ("train", "validation", "test")}
    ids = {s: [r[i].id for i in range(len(r))] for s, r in found.items()}
    assert ids["validation"] == ["r0", "r10"] and ids["test"] == ["r1", "r11"]
    assert sorted(sum(ids.values(), [])) == sorted(f"r{i}" for i in range(12))
    assert len({json.dumps(r.identity) for r in found.values()}) == 3
    plan = dry_run(splits, None)
    assert "2 records, one in 10 of data.train" in plan and "4 an epoch" in plan
    mixed = override(splits, {"data.sources": ((config.data.train, 1.0),)})
    assert len(open_split(mixed, "train")) == 8 and len(open_split(mixed, "test")) == 2


def test_too_few_records_to_hold_some_out(config, tmp_path):
    few = override(
        config,
        {"data.train": str(write_dataset(tmp_path, 2)), "data.validation": FROM_TRAIN,
         "data.test": FROM_TRAIN},
    )  # fmt: skip
    with pytest.raises(DataError, match="too few .* --config.data.validation=None"):
        open_split(few, "train")


@pytest.mark.slow
def test_a_run_goes_on_at_a_checkpoint_that_is_named(config, tmp_path, capsys):
    saved = override(config, {"train.save_every": 1, "train.keep_checkpoints": 9})
    save_config(saved, tmp_path / "c.json")
    arguments = ["--config", str(tmp_path / "c.json"), "--workdir", str(tmp_path / "run")]
    command.main(arguments)
    weights = {p: p.read_bytes() for p in (tmp_path / "run/checkpoints/4/params").rglob("*")
               if p.is_file()}  # fmt: skip
    command.main([*arguments, "--resume_step", "2"])
    said = capsys.readouterr().err
    assert "resuming from step 2" in said and "checkpoint 4 is now" in said
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    assert sorted(p.name.partition("-")[0] for p in (tmp_path / "run/later").iterdir()) == [
        "3",
        "4",
    ]
    names = [p.relative_to(tmp_path / "run/checkpoints/4") for p in weights]
    (later,) = (tmp_path / "run/later").glob("4-*")
    assert all((later / name).is_file() for name in names)
    with pytest.raises(SystemExit) as ended:
        command.main([*arguments, "--resume_step", "7"])
    assert ended.value.code == 2 and "it has 1, 2, 3, 4" in capsys.readouterr().err
