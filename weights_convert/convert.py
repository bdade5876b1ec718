"""The conversion engine: tables of rules, applied strictly.

A rule says from which tensor of the checkpoint a parameter comes, and how. Parameters of stacked
layers take one tensor per layer. Every parameter has exactly one rule, every tensor is used or
ignored for a reason, and shapes must agree. All of that is checked before a tensor is read; then
each is read once, and written where it belongs.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from htfa_jax.common.param_paths import Flat
from htfa_jax.errors import CheckpointError

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


class Tensors(Protocol):
    """What the engine asks of a checkpoint; `source.Source` is one."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of all tensors."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, key: str) -> np.dtype:
        """Type of a tensor."""

    def read(self, key: str) -> np.ndarray:
        """A tensor."""


class Checkpoint(Tensors, Protocol):
    """What writing a weight folder asks of a checkpoint beside its tensors."""

    name: str
    revision: str | None

    def hashes(self, keys: list[str]) -> list[dict[str, str]]:
        """Name and SHA-256 of the files that hold some tensors."""


class InMemory:
    """Tensors that are all there already."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors = {key: np.asarray(value) for key, value in tensors.items()}

    @property
    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.tensors[key].shape

    def dtype(self, key: str) -> np.dtype:
        """Type of a tensor."""
        return self.tensors[key].dtype

    def read(self, key: str) -> np.ndarray:
        """A tensor."""
        return self.tensors[key]


@dataclasses.dataclass(frozen=True)
class ConversionSpec:
    """How one sort of checkpoint becomes one component of the model.

    Attributes:
      family: of the weight folder: "siglip", "vq", "internlm2".
      variant: what the checkpoint is, as text.
      sizes: the component's configuration dataclass.
      shapes: `{path: anything with .shape}` of its parameters.
      rules: the table; its keys stand behind `prefix`.
      prefix: of the keys in this checkpoint.
      ignored: {regex of whole keys: why they are not needed}.
      notes: more entries of the weight folder's config.json.
    """

    family: str
    variant: str
    sizes: Any
    shapes: Mapping[str, Any]
    rules: Sequence[Rule]
    prefix: str = ""
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Step:
    """One tensor on its way to one parameter.

    Attributes:
      key: of the tensor.
      path: of the parameter.
      layer: its place in the stack; None if the tensor is the whole parameter.
      transform: to our layout.
    """

    key: str
    path: str
    layer: int | None
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


def plan(
    shapes: Mapping[str, Any],
    tensors: Tensors,
    rules: Iterable[Rule],
    ignored: Mapping[str, str],
    prefix: str = "",
) -> list[Step]:
    """Who goes where; nothing is read.

    Args:
      shapes: `{path: anything with .shape}` of the parameters to fill.
      tensors: the checkpoint.
      rules: the family's table.
      ignored: {regex of whole keys: why they are not needed}.
      prefix: of the keys that the rules name.

    Raises:
      CheckpointError: a parameter without or with two rules, a missing or unused tensor, a wrong
        shape; all of them in one message.
    """
    steps, problems = [], []
    known = {key: None for key in tensors.keys}  # noqa: SIM118
    for path, parameter in shapes.items():
        matches = [(m, r) for r in rules if (m := re.fullmatch(r.path, path))]
        if len(matches) != 1:
            problems.append(f"{path}: {len(matches)} rules match it, expected one")
            continue
        match, rule = matches[0]
        key, expected = prefix + match.expand(rule.key), tuple(parameter.shape)
        stacked = "{layer}" in key
        for layer in range(expected[0]) if stacked else [None]:
            one = key.replace("{layer}", str(layer))
            if one not in known:
                problems.append(f"{path}: no tensor {one}{_nearest(one, known)}")
                break
            steps.append(Step(one, path, layer, rule.transform))
            found = shape_after(rule.transform, tensors.shape(one))
            if found != expected[stacked:]:
                problems.append(f"{path} {expected[stacked:]} <- {one} {found}")
                break
    used = {step.key for step in steps}
    for key in known:
        if key not in used and not any(re.fullmatch(p, key) for p in ignored):
            problems.append(f"tensor {key} is not used")
    if problems:
        shown = problems[:30] + ([f"and {len(problems) - 30} more"] if len(problems) > 30 else [])
        raise CheckpointError("the checkpoint does not fit:\n  " + "\n  ".join(shown))
    return steps


def shape_after(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape that a transform gives a tensor of some shape."""
    try:
        return transform(np.broadcast_to(np.int8(0), shape)).shape
    except (ValueError, IndexError):
        return shape  # of a tensor that the transform cannot even take


def arrays(steps: Iterable[Step], tensors: Tensors) -> Iterator[tuple[Step, np.ndarray]]:
    """Reads each tensor once, in the checkpoint's order, and gives it to all that want it.

    Raises:
      CheckpointError: infinite or undefined values, naming every tensor that holds some.
    """
    wanted: dict[str, list[Step]] = {}
    for step in steps:
        wanted.setdefault(step.key, []).append(step)
    broken = []
    for key in tensors.keys:  # noqa: SIM118
        if key not in wanted:
            continue
        tensor = tensors.read(key)
        if not np.isfinite(tensor).all():
            broken.append(key)
        for step in wanted[key]:
            yield step, np.ascontiguousarray(step.transform(tensor))
    if broken:
        raise CheckpointError(
            "the checkpoint holds values that are not finite; it is damaged or its training "
            "failed: " + ", ".join(broken[:10]) + (" ..." if len(broken) > 10 else "")
        )


def convert(
    shapes: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    rules: Iterable[Rule],
    ignored: Mapping[str, str],
) -> Flat:
    """Converts tensors that are in memory: `{path: array}`. See `plan` for the arguments."""
    source = InMemory(tensors)
    params: Flat = {}
    for step, array in arrays(plan(shapes, source, rules, ignored), source):
        if step.layer is None:
            params[step.path] = array
        else:
            stack = params.setdefault(step.path, np.empty(shapes[step.path].shape, array.dtype))
            stack[step.layer] = array
    return params


def _nearest(key: str, tensors: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, tensors, n=1)
    return f"; nearest is {close[0]}" if close else ""
