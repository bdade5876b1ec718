"""Parameter paths and regex tables: the one addressing scheme of the whole code.

Parameters live in flat dictionaries `{path: array}`, with dotted paths such as
`decoder.layers.attention.q_proj.kernel`. Freezing, weight decay, learning-rate factors and
weight conversion are tables of (regex, value); a regex must match the whole path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Flat = dict[str, Any]


def flatten(tree: Any) -> Flat:
    """A module's state, or a nested dictionary, as `{dotted path: leaf}`."""
    from flax import nnx, traverse_util  # not by commands that only look at files

    if isinstance(tree, nnx.State):
        tree = nnx.to_pure_dict(tree)
    flat = traverse_util.flatten_dict(tree)
    return {".".join(map(str, path)): leaf for path, leaf in flat.items()}


def unflatten(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """The reverse of `flatten`, as `nnx.merge` takes it (elements of lists have number keys)."""
    from flax import traverse_util

    parts = {
        tuple(int(p) if p.isdigit() else p for p in path.split(".")): leaf
        for path, leaf in flat.items()
    }
    return traverse_util.unflatten_dict(parts)


def is_stacked(path: str) -> bool:
    """Whether a parameter's first axis is the layers that it belongs to."""
    return ".layers." in path


def first_match(table: Iterable[tuple[str, Any]], path: str, default: Any) -> Any:
    """The value of the first regex in `table` that matches the whole of `path`."""
    for pattern, value in table:
        if re.fullmatch(pattern, path):
            return value
    return default


def split(flat: Mapping[str, Any], pattern: str) -> tuple[Flat, Flat]:
    """Two dictionaries: the paths that `pattern` matches whole, and the others."""
    inside = {k: v for k, v in flat.items() if re.fullmatch(pattern, k)}
    return inside, {k: v for k, v in flat.items() if k not in inside}
