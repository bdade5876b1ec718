"""Files and folders that are there whole or not at all, whenever the process that writes them ends.

Both are filled beside their place, under a name of their own, so that any number of writers do not
meet. What an error leaves is removed; what a killed process leaves begins with a dot.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

import filelock

from htfa_jax.errors import ConfigError, HTFAError

log = logging.getLogger(__name__)

# No space left, a quota, a limit of a file's size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PARTIAL = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}")


@contextlib.contextmanager
def whole_file(
    path: Path, mode: Literal["w", "wb"] = "w", *, durable: bool = False
) -> Iterator[IO]:
    """A file to write to, beside its place, to which it moves when the block ends without an error.

    Text is UTF-8. Two processes that write the same file do not meet: the last one stays. Raises
    OSError.

    Args:
      path: of the file.
      mode: of text or of bytes.
      durable: wait until the disk holds it and its name, or a power cut may leave an empty file in
        its place, or the older one. Not for thousands of small images: drawing scenes took 13 to
        54 % longer.
    """
    encoding = None if mode == "wb" else "utf-8"
    with (
        whole_path(path, durable=durable) as partial,
        partial.open(mode, encoding=encoding) as file,
    ):
        yield file


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Gives the path; errors of its disk name it.

    What a full disk refuses is a write to a file that is open: its error names none.
    """
    try:
        yield path
    except OSError as error:
        raise named(error, path) from error


def disk_advice(error: BaseException | None) -> str | None:
    """What to do about an error of a disk that takes no more; None for any other."""
    if not isinstance(error, OSError) or error.errno not in FULL:
        return None
    return (
        "its disk takes no more (full, a quota, or a limit such as `ulimit -f`): free space there, "
        "or name another folder, and give the same command again"
    )


def make_folder(path: Path, option: str) -> Path:
    """Makes a folder if it is not there. Raises ConfigError that names the option if it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be a folder: {error.strerror}") from error
    return path


def named(error: OSError, path: Path) -> OSError:
    """An error of a file, with the file's name if it has none, as `whole_path` raises it."""
    if error.filename is not None or error.errno is None:
        return error
    return OSError(error.errno, error.strerror, str(path))


@contextlib.contextmanager
def whole_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """As `whole_file`, for what opens a file by its name: the path to make it at."""
    partial = _beside(path)
    try:
        yield partial
        if durable:
            _flush(partial)
        os.replace(partial, path)
        if durable:
            _flush_names(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        hidden = error.filename in (None, str(partial))  # a name that nobody knows
        if hidden and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Writes a file by `whole_file`."""
    with whole_file(path, "wb", durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(folder: Path, error: type[HTFAError]) -> Iterator[Path]:
    """A folder to fill, which takes its place when the block ends without an error.

    One that is there already stays until then, and goes. The disk holds all files and their names
    before, and the folder's own name when this returns.

    Args:
      folder: its place; folders above it are made.
      error: what is raised if it cannot be written.
    """
    partial = _beside(folder)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _flush(path)
            elif path.is_dir():
                _flush_names(path)
        _flush_names(partial)
        _replace_folder(partial, folder)
        _flush_names(folder.parent)
    except OSError as problem:
        said = f"{folder} cannot be written: {problem.strerror or problem}"
        if advice := disk_advice(problem):
            said += f": {advice}"
        raise error(said) from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; no system call replaces a folder that holds something."""
    moved: list[Path] = []
    try:
        while True:
            try:
                os.rename(new, folder)
                return
            except OSError as problem:
                if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            moved.append(_beside(folder))
            with contextlib.suppress(FileNotFoundError):  # another writer has moved it
                os.rename(folder, moved[-1])
    except BaseException:
        if moved:
            with contextlib.suppress(OSError):  # another writer has put its own there
                os.rename(moved[-1], folder)
        raise
    finally:
        for old in moved:
            shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A name that nothing else has, for what will be at `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _flush(path: Path) -> None:
    """Waits until the disk holds a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    """Waits until the disk holds the names in a folder, where its file system can say so."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network disks refuse, and their servers flush
            os.fsync(number)
    finally:
        os.close(number)


def drop_partials(folder: Path, name: str | None = None) -> None:
    """Deletes what killed processes left in a folder of the file or folder `name`, None: of all.

    Only for those who know that nobody else is writing there: inside of a lock.
    """
    for path in folder.iterdir():
        found = _PARTIAL.fullmatch(path.name)
        if found and name in (None, found["name"]):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def made_once(path: Path, what: str, make: Callable[[], None], *, holds: str = "") -> None:
    """Has a file or folder of a cache made unless it is there; of several processes one makes it.

    Args:
      path: of the file or folder.
      what: its name in log lines.
      make: makes it whole or not at all.
      holds: a file without which a folder counts as not there.

    Raises OSError if no lock can be written beside it.
    """
    if (path / holds).exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(path, what):
        if not (path / holds).exists():
            drop_partials(path.parent, path.name)
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
