"""One run to a workdir: a lock that says who holds it and survives nobody's death.

The kernel frees a file lock when its process ends, however it ends, so on one machine there are
no stale ones. Not every shared disk carries such locks from host to host: what another host wrote
into `lock.json` counts as long as its holder goes on rewriting it.

Neither lock of `filelock`, which guards the caches, does both. `FileLock` is the kernel's lock
alone: on a network disk where it succeeds on every host, two hosts hold it. `SoftFileLease` is
signs of life alone: a run that is suspended (SIGSTOP, a laptop that sleeps) for longer than its
lease loses it to another on the same machine, where the kernel's lock stays. It does not say since
when it is held, and came with filelock 3.30, after the oldest release that this package takes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from htfa_jax.common.json_files import read_json
from htfa_jax.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

LOCK = "lock.json"
# Seconds between signs of life, and without one after which another host's lock is stale.
HEARTBEAT, PATIENCE = 10.0, 35.0
# Bytes of the file, always the same.
LENGTH = 512


@contextlib.contextmanager
def lock(workdir: Path, heartbeat: float = HEARTBEAT, patience: float = PATIENCE) -> Iterator[None]:
    """Holds a workdir against other runs.

    Args:
      workdir: an existing folder.
      heartbeat: seconds between signs of life.
      patience: seconds to wait for a sign of life of another host's process.

    Raises:
      ConfigError: another process trains there; it is named.
      CheckpointError: the folder cannot be written to.
    """
    path = workdir / LOCK
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"{workdir} cannot be written to: {error}") from error
    try:
        before = _read(path)
        if not _take(file) or _lives(path, before, patience):
            raise ConfigError(
                f"{workdir} is in use: process {before.get('pid', '?')} on host "
                f"{before.get('host', '?')} has been training there since "
                f"{before.get('since', '?')}. Stop it, or use another --workdir"
            )
        if before:
            log.warning(
                "process %s on host %s ended without a word; its run is taken over",
                before.get("pid"),
                before.get("host"),
            )
        since, over = time.strftime("%Y-%m-%d %H:%M:%S"), threading.Event()

        def sign(beats: int) -> None:
            _write(file, {**_self(), "since": since, "beats": beats})

        def beat() -> None:
            beats = 1
            while not over.wait(heartbeat):
                sign(beats := beats + 1)

        sign(1)  # before anything else is done: whoever comes must find a name
        thread = threading.Thread(target=beat, name="lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            _write(file, {})
    finally:
        os.close(file)


def _self() -> dict[str, Any]:
    """Who this process is. Hosts are told apart by their boot: names may be the same."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.is_file() else "",
        "pid": os.getpid(),
    }


def _take(file: int) -> bool:
    """Whether no other process holds the file; True too where the disk knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("two runs in one workdir may go unnoticed: its disk has no locks (%s)", error)
    return True


def _lives(path: Path, before: dict[str, Any], patience: float) -> bool:
    """Whether a process of another host, which this kernel knows nothing of, holds the lock."""
    if not before or before.get("boot") == _self()["boot"]:
        return False
    log.warning(
        "%s was last held by process %s on host %s: waiting up to %.0f s for a sign of life of it",
        path,
        before.get("pid"),
        before.get("host"),
        patience,
    )
    end = time.monotonic() + patience
    while time.monotonic() < end:
        time.sleep(min(1.0, patience / 10))
        if (now := _read(path)) != before:
            return bool(now)  # an empty one was given back meanwhile
    return False


def _read(path: Path) -> dict[str, Any]:
    """What a lock file says; {} if it is free."""
    with contextlib.suppress(CheckpointError):
        return read_json(path, CheckpointError)
    return {}


def _write(file: int, content: dict[str, Any]) -> None:
    """Replaces what the file says at one stroke: no reader finds half of it."""
    with contextlib.suppress(OSError):  # a full disk is for those to report who lose by it
        os.pwrite(file, json.dumps(content).encode().ljust(LENGTH), 0)
