"""Where files are: in a folder, behind a URL, or packed with their record.

A URL of `SCHEMES` can stand wherever a path can. Images stay inside one root: paths in a dataset
come from whoever wrote it.
"""

from __future__ import annotations

import abc
import contextlib
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from htfa_jax.common.names import checked_name, inside
from htfa_jax.data.file_kinds import as_written
from htfa_jax.errors import DataError

# What a URL may begin with. fsspec knows more: some read archives, render templates or open shells.
SCHEMES = ("file", "gs", "gcs", "s3", "s3a", "https", "hf", "memory")
LONGEST = 4096  # characters of a path; Linux takes no more
# A drive, or another machine's folder.
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
# What must be installed to read a scheme: an extra of this package.
EXTRAS = {"gs": "gs", "gcs": "gs", "s3": "s3", "s3a": "s3"}


class StoredImage(abc.ABC):
    """An image that is no local file; the methods are those of a `Path`."""

    name: str  # as messages call it

    @abc.abstractmethod
    def read_bytes(self) -> bytes:
        """The file's content. Raises OSError."""

    @abc.abstractmethod
    def is_file(self) -> bool:
        """Whether it is there."""

    @property
    def suffix(self) -> str:
        """The ending of its name, with the dot."""
        return PurePosixPath(self.name).suffix

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class RemoteImage(StoredImage):
    """An image behind a URL."""

    name: str

    def read_bytes(self) -> bytes:
        with remote(self.name) as (files, path):
            return files.cat_file(path)

    def is_file(self) -> bool:
        with remote(self.name) as (files, path):
            return files.isfile(path)


@dataclass(frozen=True)
class PackedImage(StoredImage):
    """An image whose content came with its record."""

    name: str
    content: bytes

    def read_bytes(self) -> bytes:
        return self.content

    def is_file(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"PackedImage({self.name}, {len(self.content)} bytes)"


@dataclass(frozen=True)
class ImageRoot:
    """Finds a record's images in a folder or under a URL, and nowhere else.

    A relative path must stay inside; an absolute one, or a URL, must lie inside a root that the
    user gave. Links out of the folder are followed only there: whoever wrote a dataset may have
    put them beside it.

    Attributes:
      folder: a local folder, or a URL.
      given: whether the user named it; else it is where the records are.
      option: what it is named with, for messages.
    """

    folder: str
    given: bool = False
    option: str = "data.image_root"

    def __call__(self, name: str) -> Path | RemoteImage:
        """The image of that path. Raises ValueError that says why it may not be read."""
        if "\0" in name:
            raise ValueError("is no path: it has a zero byte")
        if len(name) > LONGEST:
            raise ValueError(f"is no path: it has {len(name)} characters")
        if WINDOWS.match(name):
            raise ValueError(
                f"is a path of Windows: copy the images to {self.folder} and write it relative "
                "to that folder, with / between names"
            )
        if name.startswith(("http://", "https://")) and not is_url(self.folder):
            raise ValueError(
                "is an address of the web, from which images are not fetched one by one: copy it "
                f"to {self.folder} and write its path there"
            )
        if "\\" in name and not is_url(name):
            name = name.replace("\\", "/")  # as Windows writes folders
        absolute = is_url(name) or name.startswith("/")
        if absolute and not self.given:
            raise ValueError(
                f"is an absolute path: set {self.option} to a folder that holds it, or write it "
                f"relative to {self.folder}"
            )
        where = f"{self.folder}, where the dataset's images are"
        within = self._inside(name) if absolute else posixpath.normpath(name)
        if within is None:
            raise ValueError(f"leads out of {where}")
        if is_url(self.folder):
            return RemoteImage(f"{self._root}/{checked_name(within, where)}")
        within = as_written(self._local, checked_name(within, where))
        if self.given:
            return self._local / within
        return inside(self._local, within, f"{where} ({self.option} names another)")

    def _inside(self, name: str) -> str | None:
        """The part of an absolute path that is behind the root; None if it is elsewhere."""
        if is_url(name) != is_url(self.folder):
            return None
        plain = name if is_url(name) else os.path.normpath(name)
        start = self._root.rstrip("/") + "/"
        return posixpath.normpath(plain.removeprefix(start)) if plain.startswith(start) else None

    @cached_property
    def _local(self) -> Path:
        return Path(self.folder).expanduser()

    @cached_property
    def _root(self) -> str:
        if is_url(self.folder):
            return self.folder.rstrip("/")
        return os.path.abspath(self._local)


def image_root(given: str | Path | None, beside: str, option: str = ImageRoot.option) -> ImageRoot:
    """The root that the user named with `option`, else the folder of the record file `beside`."""
    if given is not None:
        return ImageRoot(_local(str(given)), given=True, option=option)
    beside = _local(beside)
    if is_url(beside):
        return ImageRoot(beside.rpartition("/")[0], option=option)
    return ImageRoot(str(Path(beside).parent), option=option)


def _local(name: str) -> str:
    """A `file://` URL as the path that it is: links count there as on any disk."""
    return name.removeprefix("file://")


def is_url(name: str) -> bool:
    """Whether a name is for fsspec; all others are local paths."""
    return "://" in name


@contextlib.contextmanager
def remote(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path in it.

    What goes wrong inside is raised as OSError. Raises DataError if the scheme is not among
    `SCHEMES`, for a chain of several, and if what reads it is not installed.
    """
    scheme = url.partition("://")[0] if is_url(url) else "file"
    if "::" in url:
        raise DataError(f"{url}: '::' would open a file through another one: name the file itself")
    if scheme not in SCHEMES:
        raise DataError(
            f"{url}: {scheme}:// is not read; a URL begins with {', '.join(SCHEMES)}, and other "
            "files have to be copied to a disk first"
        )
    import fsspec  # a tenth of a second that only remote files need

    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        mend = f"pip install 'htfa-jax[{extra}]'" if extra else str(error)
        raise DataError(f"{url}: reading {scheme}:// needs more packages: {mend}") from error
    except ValueError as error:
        raise DataError(f"{url}: {error}") from error
    try:
        yield files, path
    except (OSError, DataError):
        raise
    except Exception as error:  # each service has its own
        raise OSError(f"{type(error).__name__}: {error}") from error
