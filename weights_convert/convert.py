"""The conversion engine: tables of rules, applied strictly.

A rule says from which tensor of the checkpoint a parameter comes, and how. Parameters of stacked
layers take one tensor per layer. Every parameter has exactly one rule, every tensor is used or
ignored for a reason, and shapes must agree.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from htfa_jax.errors import CheckpointError
from htfa_jax.paths import Flat

Transform = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where a parameter comes from.

    Attributes:
      path: regex of our parameter paths, matching the whole path.
      key: name of the tensor; `\\1` are the regex's groups, `{layer}` is the number of the
        layer, over which the tensors are stacked.
      transform: from the (one layer's) tensor to our layout.
    """

    path: str
    key: str
    transform: Transform


def same(x: np.ndarray) -> np.ndarray:
    """As it is."""
    return x


def linear(x: np.ndarray) -> np.ndarray:
    """[out, in] -> [in, out]."""
    return x.T


def conv(x: np.ndarray) -> np.ndarray:
    """[out, in, height, width] -> [height, width, in, out]."""
    return x.transpose(2, 3, 1, 0)


def convert(
    shapes: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    rules: Iterable[Rule],
    ignored: Mapping[str, str],
) -> Flat:
    """Converts a checkpoint.

    Args:
      shapes: `{path: anything with .shape}` of the parameters to fill.
      tensors: `{key: tensor}` of the checkpoint.
      rules: the family's table.
      ignored: {regex of keys: why they are not needed}.

    Returns:
      `{path: array}`, in the tensors' own types.

    Raises:
      CheckpointError: a parameter without or with two rules, a missing or unused tensor, a wrong
        shape; all of them in one message.
    """
    params, problems, used = {}, [], set()
    for path, shape in shapes.items():
        matches = [(m, r) for r in rules if (m := re.fullmatch(r.path, path))]
        if len(matches) != 1:
            problems.append(f"{path}: {len(matches)} rules match it, expected one")
            continue
        match, rule = matches[0]
        keys = [match.expand(rule.key)]
        if "{layer}" in keys[0]:
            keys = [keys[0].replace("{layer}", str(i)) for i in range(shape.shape[0])]
        used.update(keys)
        missing = [key for key in keys if key not in tensors]
        if missing:
            problems.append(f"{path}: no tensor {missing[0]}{_nearest(missing[0], tensors)}")
            continue
        arrays = [rule.transform(np.asarray(tensors[key])) for key in keys]
        value = np.stack(arrays) if "{layer}" in rule.key else arrays[0]
        if value.shape != tuple(shape.shape):
            problems.append(f"{path} {tuple(shape.shape)} <- {keys[0]} {value.shape}")
        params[path] = value
    for key in tensors:
        if key not in used and not any(re.fullmatch(p, key) for p in ignored):
            problems.append(f"tensor {key} is not used")
    if problems:
        shown = problems[:30] + ([f"and {len(problems) - 30} more"] if len(problems) > 30 else [])
        raise CheckpointError("the checkpoint does not fit:\n  " + "\n  ".join(shown))
    return params


def _nearest(key: str, tensors: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, tensors, n=1)
    return f"; nearest is {close[0]}" if close else ""
