"""SHA-256: of files, to notice changed bytes; of values, to name what is kept in caches."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    """64 hex digits of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_hash(value: Any) -> str:
    """16 hex digits of a value that JSON can hold; tuples count as lists.

    Folders of caches have these names: digits that change make all of them anew.
    """
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
