"""Runs in processes of their own that are killed, stopped, short of disk, in odd surroundings."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_aims import ALL
from reliability.kill_runs import (
    Runs,
    clock_ahead,
    differences,
    no_file_above,
    outcome,
    survive,
    undisturbed,
)
from reliability.move_runs import moved
from support import write_kill_config, write_whole_kill_config

from htfa_jax.checkpoints import integrity

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Starts training processes; the variables that they need are gone afterwards."""
    before = dict(os.environ)
    yield Runs(tmp_path_factory.mktemp("runs"))
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def config(dataset, tmp_path_factory):
    return write_kill_config(tmp_path_factory.mktemp("kills") / "config.json", dataset)


@pytest.fixture(scope="module")
def calm(runs, config, tmp_path_factory):
    """What comes of a run that nobody disturbs, twice the same, and the seconds it takes."""
    return undisturbed(runs, config, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def expected(calm):
    return calm[0]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def stopped(runs, config, expected, tmp_path_factory):
    """The workdir of a run that SIGTERM stopped in the middle."""
    workdir = tmp_path_factory.mktemp("stopped")
    with runs.started(config, workdir) as process:
        wait_for(lambda: integrity.steps(workdir))
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 0, runs.said()[-3000:]
    assert "SIGTERM: finishing this step and saving" in runs.said()
    assert f"everything is saved. Go on with --workdir {workdir}" in runs.said()
    assert f"stopped: {workdir}" in runs.said()
    step = integrity.steps(workdir)[-1]
    assert step < 12 and integrity.damage(workdir / f"checkpoints/{step}") is None
    return workdir


@pytest.mark.slow
def test_ten_kills_change_nothing(runs, config, calm, tmp_path):
    counts = survive(runs, config, tmp_path / "run", *calm, kills=10)
    assert counts["saving"] and counts["anywhere"] and counts["unfinished"], counts


@pytest.mark.slow
@pytest.mark.skipif("HTFA_LONG_TESTS" not in os.environ, reason="takes five minutes")
def test_fifty_kills_change_nothing(runs, config, calm, tmp_path):
    counts = survive(runs, config, tmp_path / "run", *calm, kills=50, seed=1)
    assert counts["saving"] > 9 and counts["anywhere"] > 9 and counts["unfinished"] > 9, counts


@pytest.mark.slow
def test_a_stopped_run_goes_on_a_day_earlier(runs, config, expected, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "a")
    runs.finish(config, workdir, prepare=functools.partial(clock_ahead, -86400.0))
    assert differences(expected, outcome(workdir)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,environment,umask",
    [
        ("mit Leerzeichen und Größe 木", {"LC_ALL": "C", "HOME": "/proc/none"}, 0o022),
        ("a", {"LC_ALL": "tr_TR.UTF-8"}, 0o077),
    ],
)
def test_a_stopped_run_goes_on_anywhere(
    config, expected, stopped, runs, tmp_path, name, environment, umask
):
    """In the C locale, with odd names and no home to write to; in Turkish, for nobody else."""
    workdir = shutil.copytree(stopped, tmp_path / name)
    command = [sys.executable, "-m", "htfa_jax.train", "--config", config, "--workdir", workdir]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        umask=umask,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:].decode(errors="replace")
    assert b"Logging error" not in done.stderr, done.stderr
    assert differences(expected, outcome(workdir)) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_save_ends_the_run_and_loses_nothing(
    runs, config, expected, stopped, tmp_path
):
    workdir = shutil.copytree(stopped, tmp_path / "a")
    before = integrity.steps(workdir)
    runs.output.write_bytes(b"")  # which must not grow as large itself
    with runs.started(
        config, workdir, prepare=functools.partial(no_file_above, 100_000)
    ) as process:
        process.join(120)
        assert process.exitcode == 1, runs.said()[-3000:]
    said = runs.said()
    assert re.search(r"^error: .* cannot be written; is the disk full\?", said, re.M), said[-3000:]
    after = integrity.steps(workdir)
    assert re.search(r"Complete checkpoints there: \d+", said)
    assert after[-1] >= before[-1] and after[-1] < 12
    assert not any(integrity.damage(workdir / f"checkpoints/{step}") for step in after)
    runs.finish(config, workdir)
    assert differences(expected, outcome(workdir)) == []


@pytest.mark.slow
def test_two_runs_in_one_workdir(runs, config, tmp_path):
    with runs.started(config, tmp_path / "a") as first:
        wait_for((tmp_path / "a/logs/train.log").exists)
        with runs.started(config, tmp_path / "a") as second:
            second.join(60)
            assert second.exitcode == 2
    assert f"is in use: process {first.pid} on host " in runs.said()


@pytest.mark.slow
@pytest.mark.parametrize("workdir", ["/proc/x", "/dev/null/x"])
def test_a_workdir_that_cannot_be_is_said(runs, config, workdir):
    with runs.started(config, Path(workdir)) as process:
        process.join(60)
        assert process.exitcode == 2
    assert f"error: --workdir {workdir} cannot be a folder" in runs.said()


@pytest.mark.slow
def test_a_stopped_run_goes_on_elsewhere_bit_for_bit_and_on_other_devices(runs, config, tmp_path):
    """In another folder, home and cache; eight devices add up in another order."""
    elsewhere, devices = moved(
        runs, config, tmp_path, ("all of these", "8 devices, 1 sample on each")
    )
    assert elsewhere.same and not elsewhere.difference
    assert devices.difference < 1e-2, devices


@pytest.mark.slow
@pytest.mark.skipif("HTFA_LONG_TESTS" not in os.environ, reason="takes ten minutes")
def test_aimed_kills_change_nothing(runs, tmp_path):
    config = write_whole_kill_config(tmp_path / "config.json")
    calm = undisturbed(runs, config, tmp_path)
    counts = survive(runs, config, tmp_path / "run", *calm, kills=20, seed=2, aims=ALL)
    assert sum(counts[aim.name] > 0 for aim in ALL) >= 5, counts
