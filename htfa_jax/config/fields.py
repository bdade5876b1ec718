"""The fields of a configuration by dotted name, such as `train.batch_size`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every field that is not itself a dataclass."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def get(config: Any, name: str) -> Any:
    """The value of a dotted name."""
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
