"""Files that are there whole or not at all, whenever the process that writes them ends."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal


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
