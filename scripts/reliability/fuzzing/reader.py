"""What a reader of files is, to whoever feeds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any


@dataclasses.dataclass(frozen=True)
class Reader:
    """Something that reads what others wrote.

    Attributes:
      make: an input of a source of randomness.
      read: reads it; may raise the project's own errors.
    """

    make: Callable[[Random], Any]
    read: Callable[[Any], Any]


def written(path: Path, content: bytes) -> Path:
    """A file of some content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
