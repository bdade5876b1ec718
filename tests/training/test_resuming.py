"""What can happen to a run while it trains and between two starts: it goes on, or says why not."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from support import WORDS_ONLY, tiny

from htfa_jax.checkpoints import integrity
from htfa_jax.checkpoints.loading import load_run
from htfa_jax.checkpoints.lock import LOCK
from htfa_jax.checkpoints.manager import open_checkpoints
from htfa_jax.config import override
from htfa_jax.errors import CheckpointError, TrainingError
from htfa_jax.evaluation.evaluator import Evaluator
from htfa_jax.models.factory import build_model
from htfa_jax.training import trainer
from htfa_jax.training.trainer import train


@pytest.fixture(scope="module")
def config(dataset, tmp_path_factory):
    """Words only, evaluated and saved after every second step; the first of them is the best."""
    return tiny(
        data__train=str(dataset),
        data__validation=str(dataset),
        data__test=None,
        data__cache_dir=str(tmp_path_factory.mktemp("cache")),
        data__drop_recon=0.3,
        decoder__dropout=0.1,
        **WORDS_ONLY,
        train__max_steps=4,
        train__save_every=2,
        train__log_every=1,
        train__best_mode="max",
        train__keep_checkpoints=9,
        eval__during_training="steps",
        eval__every=2,
        eval__max_samples=3,
        eval__batch_size=1,
        eval__panel_samples=1,
    )


@pytest.fixture(scope="module")
def calm(config, tmp_path_factory):
    """The workdir of a run that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("calm") / "a"
    assert train(config, workdir)["step"] == 2
    return workdir


@pytest.fixture
def finished(calm, tmp_path):
    """A copy of it."""
    return shutil.copytree(calm, tmp_path / "finished")


def outcome(workdir):
    """Best weights and step, and all numbers of each step, without times."""
    _, params, step, _ = load_run(workdir, lambda config: build_model(config).shapes)
    logged = {}
    for line in (workdir / "logs/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {k: v for k, v in row.items() if "/" in k and "per_second" not in k}
        logged.setdefault(row["step"], {}).update(kept)
    return {k: np.asarray(v).tobytes() for k, v in params.items()}, step, logged


def before_batch(monkeypatch, at, how):
    """Calls `how` before the training takes its `at`-th batch."""
    original = trainer.training_batches

    def batches(*args):
        for i, loaded in enumerate(original(*args), start=1):
            if i == at:
                how()
            yield loaded

    monkeypatch.setattr(trainer, "training_batches", batches)


def log_of(workdir):
    return (workdir / "logs/train.log").read_text()


def wait_for_saves(workdir):
    """What was begun is written by its path, whatever is there by then."""
    while list(workdir.glob("checkpoints/*tmp*")):
        time.sleep(0.01)


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 4])
def test_a_signal_in_an_evaluation_saves_at_once_and_changes_nothing(
    config, calm, tmp_path, monkeypatch, at
):
    workdir, seen = tmp_path / "a", []
    original = Evaluator._batches

    def batches(self, *args):
        for loaded in original(self, *args):
            seen.append(1)
            if len(seen) == (2 if at == 2 else 5):  # the second of three
                os.kill(os.getpid(), signal.SIGTERM)
            yield loaded

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_batches", batches)
        assert train(config, workdir) is None
    assert len(seen) == (2 if at == 2 else 5)
    assert f"step {at} is saved now and evaluated when the run goes on" in log_of(workdir)
    assert integrity.steps(workdir) == [2, 4][: at // 2]
    assert not (workdir / f"checkpoints/{at}/metrics").exists()
    assert train(config, workdir)["step"] == 2
    assert outcome(workdir) == outcome(calm)
    assert (workdir / f"logs/panels/step_{at:07d}.png").is_file()
    found = {s.step: s.metrics for s in integrity.listing(workdir)}
    assert found == {s.step: s.metrics for s in integrity.listing(calm)} and all(found.values())


@pytest.mark.slow
def test_a_finished_run_with_a_damaged_best_finishes_with_the_next_best(
    config, finished, monkeypatch
):
    monkeypatch.setattr(integrity, "SMALL", 0)  # it is not read when the run starts
    files = [p for p in (finished / "checkpoints/2/params").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-99] + bytes([content[-99] ^ 1]) + content[-98:])
    shutil.rmtree(finished / "evaluation")
    (finished / "infer.sh").unlink()
    assert train(config, finished)["step"] == 4
    assert (finished / "evaluation/validation/metrics.json").is_file()
    assert (finished / "infer.sh").is_file()
    (aside,) = (finished / "damaged").iterdir()
    assert aside.name.startswith("2-") and "checkpoint 2 is damaged" in log_of(finished)


@pytest.mark.slow
def test_a_changed_digit_of_the_metrics_is_noticed(config, finished):
    said = "metrics.jsonl is not what this run wrote"
    longer = override(config, {"train.max_steps": 5})
    train(longer, finished)
    assert said not in log_of(finished)
    path = finished / "logs/metrics.jsonl"
    content = path.read_bytes()
    digit = content.index(b"loss") + content[content.index(b"loss") :].index(b".") + 1
    other = b"8" if content[digit : digit + 1] != b"8" else b"3"
    path.write_bytes(content[:digit] + other + content[digit + 1 :])
    train(override(config, {"train.max_steps": 6}), finished)
    assert said in log_of(finished)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_and_has_no_hashes_is_set_aside(config, finished):
    folder = finished / "checkpoints/4"
    (folder / "hashes.json").unlink()
    for path in folder.glob("opt_state/d/*"):
        path.write_bytes(path.read_bytes()[::-1])
    train(config, finished)
    assert "checkpoint 4 is damaged: it has no hashes.json, and cannot be read" in log_of(finished)
    assert "resuming from step 2" in log_of(finished)
    assert integrity.steps(finished) == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_another_tokenizer_is_refused_by_training_and_by_readers(config, finished, name):
    path = finished / "tokenizer" / name
    settings = json.loads(path.read_text())
    if name == "tokenizer.json":
        settings["model"]["merges"].reverse()
    else:
        settings["chat_template"] = settings["chat_template"].replace("<|im_end|>", "<|im_e")
    path.write_text(json.dumps(settings))
    said = rf"tokenizer/{name} is not what checkpoint \d was trained with: SHA-256 .* Bring it back"
    for start in (
        lambda: train(config, finished),
        lambda: load_run(finished, lambda config: build_model(config).shapes),
    ):
        with pytest.raises(CheckpointError, match=said):
            start()


@pytest.mark.slow
def test_a_tokenizer_that_was_deleted_is_made_again(config, calm, finished):
    shutil.rmtree(finished / "tokenizer")
    train(config, finished)
    for path in (calm / "tokenizer").iterdir():
        assert (finished / "tokenizer" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "save"])
def test_a_run_whose_lock_another_has_taken_stops_before_it_writes(
    config, tmp_path, monkeypatch, stage
):
    """As after `rsync --delete` and a second start, which is deep in its own steps by now."""
    workdir, taken = tmp_path / "a", {}

    def take():
        if taken:
            return
        wait_for_saves(workdir)
        (workdir / LOCK).unlink()
        (workdir / LOCK).write_text('{"host": "b", "pid": 7}')
        (workdir / "checkpoints/4.orbax-checkpoint-tmp").mkdir()  # of the other run
        taken.update({p: c for p, c in contents(workdir).items() if p.name != "train.log"})

    if stage == "train":
        before_batch(monkeypatch, 3, take)
    else:
        original = trainer.Run.save

        def save(self, state, *args):
            if int(state["step"]) == 4:
                take()
            original(self, state, *args)

        monkeypatch.setattr(trainer.Run, "save", save)
    with pytest.raises(TrainingError, match=r"no longer this run's: .* process 7 on host b took"):
        train(config, workdir)
    left = {p: c for p, c in contents(workdir).items() if p.name != "train.log"}
    changed = {p.name for p in left.keys() | taken.keys() if left.get(p) != taken.get(p)}
    # The step under way was reported; nothing else.
    assert not changed - {"metrics.jsonl"} - {p.name for p in left if "tfevents" in p.name}
    assert integrity.steps(workdir) == [2]
    assert (workdir / "checkpoints/4.orbax-checkpoint-tmp").is_dir()
    assert "no longer this run's" in log_of(workdir)


@pytest.mark.slow
def test_a_run_whose_lock_was_deleted_goes_on(config, calm, tmp_path, monkeypatch):
    workdir = tmp_path / "a"
    before_batch(monkeypatch, 3, lambda: (workdir / LOCK).unlink())
    assert train(config, workdir)["step"] == 2
    assert outcome(workdir) == outcome(calm)
    assert json.loads((workdir / LOCK).read_text()) == {}


@pytest.mark.slow
def test_a_workdir_that_is_renamed_under_way_stops_the_run_and_makes_no_second_one(
    config, calm, tmp_path, monkeypatch
):
    workdir, moved = tmp_path / "a", tmp_path / "b"

    def rename():
        wait_for_saves(workdir)
        workdir.rename(moved)

    with monkeypatch.context() as patch:
        before_batch(patch, 3, rename)
        with pytest.raises(TrainingError, match=rf"a was moved to {moved} .*--workdir {moved}"):
            train(config, workdir)
    assert not workdir.exists()
    assert train(config, moved)["step"] == 2
    assert outcome(moved) == outcome(calm)


def test_a_checkpoint_says_what_its_tokenizer_is(config, calm):
    with open_checkpoints(calm, config.train, read_only=True) as checkpoints:
        meta = checkpoints.restore(4)["meta"]
    assert set(meta["tokenizer"]) == {"tokenizer.json", "tokenizer_config.json"}
    assert meta["late"] is False
