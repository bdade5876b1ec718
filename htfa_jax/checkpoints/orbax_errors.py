"""What Orbax and TensorStore raise while they read a checkpoint, as one sentence of our classes."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from htfa_jax.checkpoints.integrity import HASHES
from htfa_jax.errors import CheckpointError, Damaged

# What they say of files that they cannot read, apart from files of other models.
_UNREADABLE = re.compile("DATA_LOSS|[Ee]rror (while )?(reading|decoding|opening)|out of range")


def explained(checkpoint: Path, error: Exception) -> Exception:
    """The error to raise for what reading a checkpoint raised; itself if files are not its cause.

    Args:
      checkpoint: its folder; its files have their hashes, if it has any.
      error: has no class of its own.
    """
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    name = f"checkpoint {checkpoint.name} in {checkpoint.parent}"
    unreadable = isinstance(error, json.JSONDecodeError) or _UNREADABLE.search(str(error))
    if unreadable and not (checkpoint / HASHES).exists():
        reason = f"it has no {HASHES}, and cannot be read: {said}"
        return Damaged(f"{name} is damaged: {reason}", reason)
    if isinstance(error, (ValueError, KeyError, FileNotFoundError)):
        return CheckpointError(
            f"{name} does not fit this model; was the configuration changed since? {said}"
        )
    return error  # no memory is left, for example


@contextlib.contextmanager
def no_pages() -> Iterator[None]:
    """Inside, what Orbax leaves unfinished after an error is dropped without a page of each."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before
