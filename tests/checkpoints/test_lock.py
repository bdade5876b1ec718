"""One run to a workdir."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from htfa_jax.checkpoints.lock import LOCK, lock
from htfa_jax.errors import CheckpointError, ConfigError

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
