"""What a checkpoint says besides its arrays, checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from htfa_jax.common.json_files import read_json
from htfa_jax.errors import CheckpointError

FILE = "meta/metadata"


class Meta(dict[str, Any]):
    """The fields by name; one that is not there is an error that names the file."""

    def __init__(self, path: Path, fields: dict[str, Any]):
        super().__init__(fields)
        self.path = path

    def __missing__(self, name: str) -> NoReturn:
        raise CheckpointError(f"{self.path} lacks {name}: take another checkpoint")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_number(value: Any) -> bool:
    # NumPy has no whole numbers of more digits.
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _are_metrics(value: Any) -> bool:
    """Those of some steps: of the same names."""
    if not isinstance(value, list) or not all(isinstance(step, dict) for step in value):
        return False
    return all(step.keys() == value[0].keys() for step in value) and all(
        _is_number(number) for step in value for number in step.values()
    )


# Fields that programs read, and what they are.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "a step"),
    "samples": (_is_count, "a number of samples"),
    "frozen": (_are_texts, "an object of folders by component"),
    "window": (_are_metrics, "a list of the metrics of steps"),
    "key": (_is_text, "a text"),
}


def read_meta(checkpoint: Path) -> Meta:
    """The meta of a complete checkpoint's folder. Raises CheckpointError if it is damaged."""
    path = checkpoint / FILE
    meta = Meta(path, read_json(path, CheckpointError, allow_nan=True))
    for name, (is_right, expected) in _FIELDS.items():
        if name in meta and not is_right(meta[name]):
            raise CheckpointError(f"{path}: {name} must be {expected}: take another checkpoint")
    if meta.get("step", int(checkpoint.name)) != int(checkpoint.name):
        raise CheckpointError(f"{path} says step {meta['step']}: was the folder renamed?")
    return meta
