"""The tokenizer of a run belongs to its weights: each checkpoint says what its files were.

With other merges or another chat template training would go on and learn from other numbers, and
answers would be nonsense, both without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from htfa_jax.common.hashing import file_sha256
from htfa_jax.errors import CheckpointError

FOLDER, KEY = "tokenizer", "tokenizer"
NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def tokenizer_hashes(workdir: Path) -> dict[str, str]:
    """SHA-256 of each file of a run's tokenizer. Raises OSError."""
    paths = [workdir / FOLDER / name for name in NAMES]
    return {path.name: file_sha256(path) for path in paths if path.is_file()}


def check_tokenizer(workdir: Path, meta: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless a run's tokenizer is the one of a checkpoint with this meta.

    Checkpoints that were saved before this was noted say nothing, and fit any.
    """
    expected = meta.get(KEY)
    if not isinstance(expected, dict):
        return
    found = tokenizer_hashes(workdir)
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{workdir / FOLDER / name} is not what checkpoint {meta.get('step')} was trained "
                f"with: {_said(expected.get(name))} expected, {_said(found.get(name))} found. "
                "Bring it back from a copy of the run"
            )


def _said(digits: Any) -> str:
    return f"SHA-256 {str(digits)[:12]}..." if digits else "no such file"
