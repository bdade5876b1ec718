"""Files that are there whole or not at all, whenever the process that writes them ends."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file beside its place, then renames it; text as UTF-8. Raises OSError.

    Two processes that write the same file do not meet: the last one stays.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
