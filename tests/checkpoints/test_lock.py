"""One run to a workdir."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from htfa_jax.checkpoints.lock import LOCK, lock
from htfa_jax.errors import CheckpointError, ConfigError, TrainingError

HOLD = """
import sys, time
from pathlib import Path
from htfa_jax.checkpoints.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the workdir."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def elsewhere(tmp_path, beats=1):
    """A lock of a process on another host."""
    content = {"host": "node17", "boot": "another", "pid": 42, "since": "yesterday", "beats": beats}
    (tmp_path / LOCK).write_text(json.dumps(content))


def test_the_second_run_is_refused_with_the_firsts_host_and_process(tmp_path, holder):
    host = json.loads((tmp_path / LOCK).read_text())["host"]
    said = rf"in use: process {holder.pid} on host {host} has been training there since \d{{4}}-"
    with pytest.raises(ConfigError, match=said), lock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, holder, caplog):
    holder.kill()
    holder.wait()
    started = time.monotonic()
    with lock(tmp_path):
        pass
    assert time.monotonic() - started < 5
    assert f"process {holder.pid} on host" in caplog.text and "taken over" in caplog.text


def test_a_lock_that_was_given_back_is_free(tmp_path, caplog):
    for _ in range(2):
        with lock(tmp_path), pytest.raises(ConfigError), lock(tmp_path):
            pass
    assert caplog.text == ""


def test_the_lock_of_another_host_holds_while_it_shows_signs_of_life(tmp_path):
    elsewhere(tmp_path)
    alive = threading.Timer(0.2, elsewhere, (tmp_path, 2))
    alive.start()
    with pytest.raises(ConfigError, match="process 42 on host node17"), lock(tmp_path, patience=9):
        pass
    alive.join()


def test_the_lock_of_another_host_that_is_silent_is_taken_over(tmp_path, caplog):
    elsewhere(tmp_path)
    with lock(tmp_path, heartbeat=0.05, patience=0.3):
        first = json.loads((tmp_path / LOCK).read_text())
        time.sleep(0.3)
        assert json.loads((tmp_path / LOCK).read_text())["beats"] > first["beats"]
    assert "last held by process 42 on host node17" in caplog.text
    assert "taken over" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1', "\x00" * 9])
def test_a_lock_file_that_says_nothing_is_free(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_named():
    with (
        pytest.raises(CheckpointError, match="/proc/self cannot be written to"),
        lock(Path("/proc/self")),
    ):
        pass


def test_a_suspended_run_keeps_its_workdir(tmp_path, holder):
    """Which shows no sign of life, but is not dead."""
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError, match="in use"), lock(tmp_path, heartbeat=0.01, patience=0.05):
        pass
    holder.send_signal(signal.SIGCONT)


def test_a_lock_that_is_held_may_be_checked_at_any_time(tmp_path):
    with lock(tmp_path, heartbeat=0.01) as held:
        for _ in range(20):
            held.check()
            time.sleep(0.005)
    assert json.loads((tmp_path / LOCK).read_text()) == {}


def test_a_deleted_lock_is_held_again_while_nobody_else_holds_it(tmp_path, caplog):
    with lock(tmp_path, heartbeat=600) as held:
        (tmp_path / LOCK).unlink()
        held.check()
        assert "nobody else holds it: it is held again" in caplog.text
        with pytest.raises(ConfigError, match="is in use: process"), lock(tmp_path):
            pass
        content = (tmp_path / LOCK).read_bytes()
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).write_bytes(content)  # as a copy brings it back
        held.check()
        with pytest.raises(ConfigError, match="is in use: process"), lock(tmp_path):
            pass
    with lock(tmp_path):
        pass


def test_a_holder_whose_lock_was_taken_stops_and_leaves_the_others(tmp_path, caplog):
    """The first to look is the thread that gives signs of life, which stops that."""
    with lock(tmp_path, heartbeat=0.02) as first:
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).write_text(json.dumps({"host": "a", "boot": "b", "pid": 7}))
        time.sleep(0.1)
        said = r"no longer this run's: .* process 7 on host a took it\. This run stops and"
        for _ in range(2):
            with pytest.raises(TrainingError, match=said):
                first.check()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == 7
    assert caplog.text.count("no longer this run's") == 1


def test_a_second_run_that_came_and_went_is_noticed(tmp_path):
    with lock(tmp_path, heartbeat=600) as first:
        (tmp_path / LOCK).unlink()
        with lock(tmp_path), pytest.raises(TrainingError, match="process .* took it"):
            first.check()
    with lock(tmp_path, heartbeat=600) as first:
        (tmp_path / LOCK).unlink()
        with lock(tmp_path):
            pass
        with pytest.raises(TrainingError, match="another run has been there"):
            first.check()


def test_a_disk_without_locks_is_watched_by_what_the_file_says(tmp_path, monkeypatch):
    """As after 35 seconds in which another host saw no sign of life."""
    monkeypatch.setattr("htfa_jax.checkpoints.lock._take", lambda file: True)
    with lock(tmp_path, heartbeat=600) as first:
        content = {"host": "node17", "boot": "another", "pid": 42}
        with (tmp_path / LOCK).open("r+b") as file:
            file.write(json.dumps(content).encode().ljust(512))
        with pytest.raises(TrainingError, match="process 42 on host node17 took it"):
            first.check()
    assert json.loads((tmp_path / LOCK).read_text()) == content


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_workdir_that_is_renamed_is_noticed_and_named(tmp_path, made_anew):
    workdir = tmp_path / "a"
    workdir.mkdir()
    with lock(workdir, heartbeat=600) as held:
        workdir.rename(tmp_path / "b")
        if made_anew:
            workdir.mkdir()
        with pytest.raises(TrainingError, match=rf"moved to {tmp_path}/b .*--workdir {tmp_path}/b"):
            held.check()
    assert list(tmp_path.glob("a/*")) == [] and (tmp_path / "b" / LOCK).is_file()


def test_a_workdir_that_is_deleted_is_noticed(tmp_path):
    workdir = tmp_path / "a"
    workdir.mkdir()
    with lock(workdir, heartbeat=600) as held:
        shutil.rmtree(workdir)
        with pytest.raises(TrainingError, match="was moved or deleted while this run trained"):
            held.check()
    assert not workdir.exists()
