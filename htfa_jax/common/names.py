"""Names that lie in a folder: the one place that says which of them may be used.

Records, archives, buckets, manifests and checkpoints hold names that somebody else has written.
None of them may lead to a file outside of the folder that they are said to be in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def checked_name(name: str, where: str = "its folder") -> str:
    """The name as it is: parts between slashes, each of which is a file's or a folder's own name.

    Args:
      name: relative to a folder, or behind a URL.
      where: that folder, for messages.

    Raises ValueError that says why it may not be used.
    """
    if "\0" in name:
        raise ValueError("is no path: it has a zero byte")
    if "\\" in name:
        raise ValueError("has a backslash, which is no part of a name here: write / for folders")
    if name.startswith("/"):
        raise ValueError(f"is an absolute path: write it relative to {where}")
    parts = name.split("/")
    if ".." in parts:
        raise ValueError(f"leads out of {where}")
    if "" in parts or "." in parts:
        raise ValueError("has an empty part: write one name, or names with one / in between")
    return name


def inside(folder: Path, name: str, where: str = "its folder") -> Path:
    """The path of a name in a folder; nothing has to be there yet.

    Args:
      folder: may itself be reached through links.
      name, where: as `checked_name` takes them.

    Raises ValueError that says why it may not be used; a link that leads out is a reason.
    """
    path = folder / checked_name(name, where)
    if _has_link(folder, name) and not _is_below(path, folder):
        raise ValueError(f"is, or is behind, a link that leads out of {where}")
    return path


def links(folder: Path) -> Iterator[str]:
    """Names of all links in a folder and the folders below it; no link is followed."""
    for place, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(place, name)
            if path.is_symlink():
                yield path.relative_to(folder).as_posix()


def links_out(folder: Path) -> list[str]:
    """Names of the links in a folder that lead to a place outside of it."""
    return [name for name in links(folder) if not _is_below(folder / name, folder)]


def _has_link(folder: Path, name: str) -> bool:
    """Whether a part of a name is a link; quicker than to resolve a million records' paths."""
    at = os.fspath(folder)
    for part in name.split("/"):
        at = f"{at}/{part}"
        if os.path.islink(at):
            return True
    return False


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
