"""One run to a workdir: a lock that says who holds it and survives nobody's death.

The kernel frees a file lock when its process ends, however it ends, so on one machine there are
no stale ones. Not every shared disk carries such locks from host to host: what another host wrote
into `lock.json` counts as long as its holder goes on rewriting it.

A holder can lose its workdir while it trains: somebody deletes `lock.json` and starts another run,
another host thinks it dead, the folder is renamed. So it looks before each step and each save
(`Held.check`), and stops before it writes where another run may be writing.

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
from htfa_jax.errors import CheckpointError, ConfigError, TrainingError

log = logging.getLogger(__name__)

LOCK = "lock.json"
# Seconds between signs of life, and without one after which another host's lock is stale.
HEARTBEAT, PATIENCE = 10.0, 35.0
# Bytes of the file, always the same.
LENGTH = 512


@contextlib.contextmanager
def lock(workdir: Path, heartbeat: float = HEARTBEAT, patience: float = PATIENCE) -> Iterator[Held]:
    """Holds a workdir against other runs. Gives what tells whether it is still held.

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
        folder = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(f"{workdir} cannot be written to: {error}") from error
    try:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(f"{workdir} cannot be written to: {error}") from error
        held = Held(workdir, folder, file)
        try:
            before = _read(path)
            if not _take(file) or _lives(path, before, patience):
                raise ConfigError(
                    f"{workdir} is in use: {_named(before)} has been training there since "
                    f"{before.get('since', '?')}. Stop it, or use another --workdir"
                )
            if before:
                log.warning("%s ended without a word; its run is taken over", _named(before))
            with held.kept_alive(heartbeat):
                yield held
        finally:
            held.close()
    finally:
        os.close(folder)


class Held:
    """A workdir that this process holds, as far as it knows.

    Args:
      workdir: its path.
      folder: number of the open folder.
      file: number of the open lock file; closed by `close`.
    """

    def __init__(self, workdir: Path, folder: int, file: int):
        self.workdir, self._folder, self._file = workdir, folder, file
        self._me = {**_self(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._beats, self._lost, self._guard = 0, "", threading.Lock()

    def check(self) -> None:
        """Raises TrainingError if the workdir is no longer this process's: nothing may be written.

        Two system calls on a local disk: cheap enough for every step.
        """
        with self._guard:
            self._lost = self._lost or self._look()
        if self._lost:
            raise TrainingError(self._lost)

    @contextlib.contextmanager
    def kept_alive(self, heartbeat: float) -> Iterator[None]:
        """Signs of life inside of the block, from its beginning on."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(heartbeat):
                try:
                    self.check()
                except TrainingError as error:
                    log.warning("%s", error)  # the step or the evaluation under way may be long
                    return
                self._sign()

        self._sign()  # before anything else is done: whoever comes must find a name
        thread = threading.Thread(target=beat, name="lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with contextlib.suppress(TrainingError):  # another's lock stays as it is
                self.check()
                _write(self._file, {})

    def close(self) -> None:
        """Frees the kernel's lock."""
        os.close(self._file)

    def _sign(self) -> None:
        with self._guard:
            self._beats += 1
            _write(self._file, {**self._me, "beats": self._beats})

    def _look(self) -> str:
        """Why the workdir is lost; nothing if it is not."""
        try:
            if not _same(self._folder, self.workdir):
                return self._moved()
            if not _same(self._file, path := self.workdir / LOCK):
                return self._take_again(path)
            found = _read(path)
        except OSError:  # a network disk that is away for a moment; a save will say if it stays so
            return ""
        return self._others(found) if found and not self._mine(found) else ""

    def _take_again(self, path: Path) -> str:
        """Locks a file that is not the one it was: deleted, or put back from a copy."""
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        found = _read(path)
        # One that was given back says {}: its run has come and gone, and has written here.
        given_back = not found and os.fstat(file).st_size > 0
        if (found and not self._mine(found)) or given_back or not _take(file):
            os.close(file)
            return self._others(_read(path))
        os.close(self._file)
        self._file = file
        _write(file, {**self._me, "beats": self._beats})
        log.warning("%s was deleted or replaced; nobody else holds it: it is held again", path)
        return ""

    def _mine(self, content: dict[str, Any]) -> bool:
        return all(content.get(name) == value for name, value in self._me.items())

    def _others(self, content: dict[str, Any]) -> str:
        who = f"{_named(content)} took it" if content else "another run has been there"
        return (
            f"{self.workdir} is no longer this run's: {LOCK} in it was replaced, and {who}. "
            "This run stops and writes nothing more. Let the other one go on, or stop it and start "
            "this command again: it goes on from the newest checkpoint"
        )

    def _moved(self) -> str:
        now = Path(f"/proc/self/fd/{self._folder}")
        place = os.readlink(now) if now.is_symlink() else ""
        gone = not place or place.endswith(" (deleted)")
        where = "was moved or deleted" if gone else f"was moved to {place}"
        return (
            f"{self.workdir} {where} while this run trained there. It stops and makes no second "
            f"one at the old place. Go on with --workdir {'ITS NEW PLACE' if gone else place}: "
            "from the newest checkpoint in it"
        )


def _same(number: int, path: Path) -> bool:
    """Whether an open file or folder is still the one at its path. Raises OSError."""
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _named(content: dict[str, Any]) -> str:
    return f"process {content.get('pid', '?')} on host {content.get('host', '?')}"


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
        "%s was last held by %s: waiting up to %.0f s for a sign of life of it",
        path,
        _named(before),
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
