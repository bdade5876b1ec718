"""Checkpoints that were damaged, and the command that lists, verifies and prunes them."""

import json
import os
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from htfa_jax import checkpoint
from htfa_jax.checkpoints import integrity
from htfa_jax.checkpoints.manager import Checkpoints, load_frozen
from htfa_jax.config.io import save_config
from htfa_jax.errors import CheckpointError, Damaged, TrainingError

LIKE = {"w": jnp.zeros(500)}


def save(workdir, values, keep=9):
    """Checkpoints whose weights are their step, with a loss each."""
    save_config(tiny(), workdir / "config.json")
    with Checkpoints(workdir, keep=keep, metric="loss") as checkpoints:
        for step, loss in values.items():
            state = {"step": jnp.int32(step), "params": {"w": jnp.full(500, float(step))}}
            metrics = None if loss is None else {"loss": loss}
            checkpoints.save({**state, "opt_state": {"m": jnp.zeros(3)}}, {"frozen": {}}, metrics)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    save(workdir, {2: 1.0, 4: 0.5, 6: 0.7})
    return workdir


@pytest.fixture
def workdir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_in_any_file_that_counts_is_noticed(workdir):
    folder = workdir / "checkpoints/6"
    assert integrity.damage(folder) is None
    names = {p.relative_to(folder).as_posix() for p in files(folder)}
    assert {"params/_METADATA", "meta/metadata", "metrics/metrics"} < names
    for path in files(folder):
        if path.name in ("commit_success.txt", "_CHECKPOINT_METADATA") and path.parent == folder:
            continue  # written with the name, without weights
        before = path.read_bytes()
        flip(path)
        assert integrity.damage(folder), path
        path.write_bytes(before)
        path.unlink()
        assert path.name == "hashes.json" or "missing" in integrity.damage(folder), path
        path.write_bytes(before)
    assert integrity.damage(folder) is None


@pytest.mark.parametrize("harm", ["flip", "remove", "empty", "metrics", "truncate"])
def test_training_goes_on_from_the_newest_sound_checkpoint_and_says_so(workdir, harm, caplog):
    folder = workdir / "checkpoints/6"
    largest = max(files(folder / "params"), key=lambda p: p.stat().st_size)
    if harm == "flip":
        flip(largest)
    elif harm == "remove":
        shutil.rmtree(folder / "params")
    elif harm == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif harm == "metrics":
        (folder / "metrics/metrics").write_bytes(b"\xff{")
    else:
        os.truncate(largest, 10)
    with Checkpoints(workdir, keep=9, metric="loss") as checkpoints:
        assert checkpoints.latest_step() == 4
        found = checkpoints.restore(4, params=LIKE)
        np.testing.assert_array_equal(found["params"]["w"], np.full(500, 4.0))
    assert "checkpoint 6 is damaged" in caplog.text
    assert "newest sound checkpoint is used instead: step 4" in caplog.text
    (aside,) = (workdir / "damaged").iterdir()
    assert aside.name.startswith("6-")
    save(workdir, {6: 0.7})  # reached again
    assert integrity.damage(workdir / "checkpoints/6") is None


def test_a_run_without_a_sound_checkpoint_never_starts_afresh(workdir):
    for step in (2, 4, 6):
        flip(workdir / f"checkpoints/{step}/meta/metadata")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is sound:\n  step 6: meta"):
            Checkpoints(workdir, keep=1)
    assert integrity.steps(workdir) == [2, 4, 6]


def test_reading_a_damaged_checkpoint_is_refused_with_the_others_named(workdir):
    flip(max(files(workdir / "checkpoints/4/params"), key=lambda p: p.stat().st_size))
    with (
        Checkpoints(workdir, keep=9, metric="loss", read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"checkpoint 4 .*its hash differs.*: 2, 6"),
    ):
        checkpoints.restore(checkpoints.best_step(), params=LIKE)
    assert not (workdir / "damaged").exists()


def test_readers_leave_what_a_running_job_is_writing(workdir):
    unfinished = workdir / "checkpoints/8.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with Checkpoints(workdir, keep=1, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 6
    assert unfinished.is_dir() and integrity.steps(workdir) == [2, 4, 6]


def test_a_checkpoint_without_hashes_is_used_with_a_word(workdir, caplog):
    (workdir / "checkpoints/6/hashes.json").unlink()
    with Checkpoints(workdir, keep=9) as checkpoints:
        assert checkpoints.latest_step() == 6
    assert "has no hashes.json: whether it is sound cannot be told" in caplog.text


def test_names_that_lead_elsewhere_and_links_are_refused(workdir, tmp_path):
    folder = workdir / "checkpoints/6"
    hashes = json.loads((folder / "hashes.json").read_text())
    secret = tmp_path / "secret"
    secret.write_text("x")
    for name in ("../../secret", str(secret), "..\\secret"):
        (folder / "hashes.json").write_text(json.dumps(hashes | {name: "0"}))
        assert "are missing" in integrity.damage(folder)
    for content in ("[]", '{"a": 1}', "nonsense", "\x00"):
        (folder / "hashes.json").write_text(content)
        assert integrity.damage(folder)
    (folder / "hashes.json").write_text(json.dumps(hashes))
    path = folder / "meta/metadata"
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert integrity.damage(folder) == "meta/metadata is a link, which a checkpoint does not hold"
    for name in ("../../etc", "vq-../../../etc", "vq-", ["x"], "siglip-0123456789ab"):
        with pytest.raises(CheckpointError, match="expected vq-HASH"):
            load_frozen(workdir, {"vq": name})


def test_hashing_happens_beside_the_training(tmp_path, monkeypatch):
    """`save` returns before the files are hashed; the checkpoint has no name until they are."""
    go, original = threading.Event(), integrity.write_hashes

    def slowly(folder):
        assert go.wait(60)
        original(folder)

    monkeypatch.setattr(integrity, "write_hashes", slowly)
    state = {"step": jnp.int32(1), "params": LIKE, "opt_state": {"m": jnp.zeros(3)}}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, {})
        assert integrity.steps(tmp_path) == []
        go.set()
    assert integrity.damage(tmp_path / "checkpoints/1") is None


def test_a_disk_that_refuses_ends_with_a_sentence_and_leaves_the_older_checkpoint(
    workdir, monkeypatch
):
    def full(folder):
        raise OSError(28, "No space left on device")

    state = {"step": jnp.int32(8), "params": LIKE, "opt_state": {"m": jnp.zeros(3)}}
    monkeypatch.setattr(integrity, "write_hashes", full)
    with (
        pytest.raises(TrainingError, match=r"No space left .*checkpoints there: 2, 4, 6"),
        Checkpoints(workdir, keep=9) as checkpoints,
    ):
        checkpoints.save(state, {})
    monkeypatch.undo()
    with Checkpoints(workdir, keep=9) as checkpoints:
        assert checkpoints.latest_step() == 6
        checkpoints.save(state, {})
    assert integrity.steps(workdir) == [2, 4, 6, 8]


def test_the_command_lists_verifies_and_prunes(workdir, capsys):
    (workdir / "checkpoints/7.orbax-checkpoint-tmp").mkdir()
    checkpoint.main([str(workdir)])
    said = capsys.readouterr().out
    assert "not complete: 7.orbax-checkpoint-tmp" in said
    (line,) = [line for line in said.splitlines() if line.split()[0] == "4"]
    assert line.endswith("MiB  loss 0.5000  best")
    checkpoint.main([str(workdir), "--verify"])
    assert capsys.readouterr().out.count("sound") == 3
    flip(workdir / "checkpoints/2/params/_METADATA")
    with pytest.raises(SystemExit) as ended:
        checkpoint.main([str(workdir), "--verify"])
    assert ended.value.code == 1
    assert "DAMAGED: params/_METADATA was altered" in capsys.readouterr().out
    checkpoint.main([str(workdir), "--keep", "1"])
    assert integrity.steps(workdir) == [4, 6]  # the best stays
    assert not list((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize("flags", [["--keep", "0"], ["nowhere"]])
def test_the_command_refuses_what_it_cannot_do(workdir, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        checkpoint.main([str(workdir), *flags] if flags != ["nowhere"] else flags)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("alone", [False, True])
def test_a_name_with_zeros_is_set_aside_and_not_lost(workdir, alone, caplog):
    """`0008`, which Orbax takes for 8 and then does not find."""
    checkpoints = workdir / "checkpoints"
    shutil.copytree(checkpoints / "6", checkpoints / "0008")
    if alone:
        for step in (2, 4, 6):
            shutil.rmtree(checkpoints / str(step))
        with pytest.raises(CheckpointError, match=r"step 0008: its name is not how .*: rename it"):
            Checkpoints(workdir, keep=9)
        return
    with pytest.raises(CheckpointError, match=r"holds 0008, which is not how a step is written"):
        Checkpoints(workdir, keep=9, read_only=True)
    with Checkpoints(workdir, keep=9) as found:
        assert found.latest_step() == 6
    (aside,) = (workdir / "damaged").iterdir()
    assert aside.name.startswith("0008-") and (aside / "hashes.json").is_file()
    assert "rename it, if it is to be used" in caplog.text
    assert "newest sound checkpoint" not in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        {"item_handlers": 5},
        {"commit_timestamp_nsecs": "x"},
        {"commit_timestamp_nsecs": 2**80},
        {"init_timestamp_nsecs": -1},
        {"performance_metrics": 3},
        {"custom_metadata": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [4, 6])
def test_metadata_that_orbax_does_not_take_costs_one_checkpoint(workdir, step, content, caplog):
    path = workdir / f"checkpoints/{step}/_CHECKPOINT_METADATA"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content)
    with Checkpoints(workdir, keep=9, metric="loss") as checkpoints:
        assert checkpoints.latest_step() == 10 - step
    assert f"checkpoint {step} is damaged: " in caplog.text and "_CHECKPOINT_META" in caplog.text


def test_files_that_cannot_be_read_and_have_no_hashes_are_told_from_other_models(workdir):
    """With a sentence of each, none with TensorStore's traceback."""
    folder = workdir / "checkpoints/6"
    (folder / "hashes.json").unlink()
    noticed = 0
    for path in files(folder / "params"):
        before = path.read_bytes()
        if not before:
            continue
        for at in (len(before) // 3, 2 * len(before) // 3):
            flip(path, at)
            with Checkpoints(workdir, keep=9, read_only=True) as checkpoints:
                try:
                    checkpoints.restore(6, params=LIKE)
                except CheckpointError as error:
                    noticed += isinstance(error, Damaged)
            path.write_bytes(before)
    assert noticed >= 4
    with Checkpoints(workdir, keep=9) as checkpoints:
        with pytest.raises(CheckpointError, match="does not hold the weights of this mo") as raised:
            checkpoints.restore(6, params={"other": LIKE["w"]})
        assert not isinstance(raised.value, Damaged)


def test_a_damaged_best_is_set_aside_for_the_next_best(workdir, caplog, monkeypatch):
    """A large file of an older checkpoint is not read when the run starts."""
    monkeypatch.setattr(integrity, "SMALL", 0)
    flip(max(files(workdir / "checkpoints/4/params"), key=lambda p: p.stat().st_size))
    with Checkpoints(workdir, keep=9, metric="loss") as checkpoints:
        assert checkpoints.best_step() == 4 and checkpoints.latest_step() == 6
        assert checkpoints.restore_best(6, params=LIKE) == (6, {})
        assert checkpoints.best_step() == 6
    assert "checkpoint 4 is damaged: " in caplog.text
    assert [p.name.split("-")[0] for p in (workdir / "damaged").iterdir()] == ["4"]
    with Checkpoints(workdir, keep=9, metric="loss") as checkpoints:
        step, found = checkpoints.restore_best(8, params=LIKE)
        assert step == 6
        np.testing.assert_array_equal(found["params"]["w"], np.full(500, 6.0))


def test_the_last_checkpoint_is_never_set_aside(workdir):
    with Checkpoints(workdir, keep=9) as checkpoints:
        for step in (2, 4):
            checkpoints.set_aside(step, Damaged("x", "y"))
        with pytest.raises(Damaged, match="x"):
            checkpoints.set_aside(6, Damaged("x", "y"))
    assert integrity.steps(workdir) == [6]


def test_metrics_can_come_later(workdir):
    """Killed before their hash is there, the checkpoint is sound all the same."""
    save(workdir, {8: None})
    with Checkpoints(workdir, keep=9, metric="loss") as checkpoints:
        assert checkpoints.best_step() == 4
        checkpoints.add_metrics(8, {"loss": 0.1, "other": 3.0})
        assert checkpoints.best_step() == 8
        checkpoints.add_metrics(8, {"other": 3.0})
        checkpoints.add_metrics(9, {"loss": 0.1})
    folder = workdir / "checkpoints/8"
    assert integrity.damage(folder) is None
    assert "metrics/metrics" in json.loads((folder / "hashes.json").read_text())
    hashes = json.loads((folder / "hashes.json").read_text())
    del hashes["metrics/metrics"]
    (folder / "hashes.json").write_text(json.dumps(hashes))
    assert integrity.damage(folder) is None
    with Checkpoints(workdir, keep=9, metric="loss") as checkpoints:
        assert checkpoints.best_step() == 8


def test_nothing_is_written_to_a_workdir_that_is_another_runs(workdir):
    def lost():
        raise TrainingError("another run's")

    before = {p: p.read_bytes() for p in files(workdir)}
    state = {"step": jnp.int32(8), "params": LIKE, "opt_state": {"m": jnp.zeros(3)}}
    with Checkpoints(workdir, keep=9, metric="loss", check=lost) as checkpoints:
        for write in (
            lambda: checkpoints.save(state, {}),
            lambda: checkpoints.add_metrics(6, {"loss": 0.0}),
            lambda: checkpoints.set_aside(6, Damaged("x", "y")),
        ):
            with pytest.raises(TrainingError, match="another run's"):
                write()
    assert {p: p.read_bytes() for p in files(workdir)} == before
