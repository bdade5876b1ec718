"""Files that are there whole or not at all, whenever the process that writes them ends."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

import filelock

log = logging.getLogger(__name__)


@contextlib.contextmanager
def whole_file(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO]:
    """A file to write to, beside its place, to which it moves when the block ends without an error.

    Text is UTF-8. Two processes that write the same file do not meet: the last one stays. Raises
    OSError.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open(mode, encoding=None if mode == "wb" else "utf-8") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file by `whole_file`."""
    with whole_file(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def made_once(path: Path, what: str, make: Callable[[], None]) -> None:
    """Has a file or folder of a cache made unless it is there; of several processes one makes it.

    Args:
      path: of the file or folder.
      what: its name in log lines.
      make: makes it, at another name first.

    Raises OSError if no lock can be written beside it.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(path, what):
        if not path.exists():
            make()


@contextlib.contextmanager
def one_at_a_time(path: Path, what: str) -> Iterator[None]:
    """A block that one process at a time is in; the others wait, and say so.

    Args:
      path: of the file or folder that is made there; the lock is beside it.
      what: its name in log lines.

    Raises OSError if the lock cannot be written.
    """
    lock = filelock.FileLock(path.with_name(path.name + ".lock"), mode=0o666)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("waiting for another process, which makes %s", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
