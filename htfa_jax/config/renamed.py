"""Names that changed. An old one goes on working, with one line that says the new one.

This is the only place that knows old names. Import paths are another matter: the modules
`htfa_jax.config_io`, `.look_inside`, `.answer_attention` and `.curves` stand for what moved.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

# Fields of the configuration, in config.json and as --config.NAME.
FIELDS = {
    "loss.hidden_cell_weight": "loss.occluded_cell_weight",
    "pretrained.random_parts": "pretrained.random_components",
}
# Kinds of questions in records, and what is scored beside them.
KINDS = {"hidden_share": "occlusion_ratio", "both_right": "joint"}
# Metrics by short names, as `train.best_metric` and logs have them.
METRICS = {
    **{f"accuracy/{old}": f"accuracy/{new}" for old, new in KINDS.items()},
    **{
        f"{metric}/{old}": f"{metric}/{new}"
        for metric in ("psnr", "ssim")
        for old, new in (("covered", "occluder"), ("hidden", "occluded"))
    },
}
# Keys of an evaluation's metrics.json.
SCORES = {"pictures": "images", "covered": "occluder", "hidden": "occluded"} | KINDS
# Flags of commands.
FLAGS = {
    "--limits.new_words": "--limits.max_new_tokens",
    "--limits.visits": "--limits.sessions",
    "--completion.passes": "--completion.refinement_steps",
}
# Parameters of the Python API and of the HTTP API's forms.
PARAMETERS = {"passes": "refinement_steps"}
# Of the PyTorch original's inference class: they stay, without a word.
ORIGINAL = {
    "img_orig": "image_orig",
    "img_recon": "image_recon",
    "image_pairs": "pairs",
}
# Attributes of what the Python API gives.
ATTRIBUTES = {
    "can_paint": "can_complete",
    "need_painting": "need_completion",
    "passes": "refinement_steps",
    "hidden_HW": "occluded_HW",
    "words": "tokens",
    "over_pictures": "over_images",
}

_said: set[str] = set()


def current(table: Mapping[str, str], name: str, what: str = "") -> str:
    """The name of today; says so, once, if it is another.

    Args:
      table: one of this module's.
      name: old or new.
      what: is named, for the message.
    """
    if name not in table:
        return name
    if name not in _said:
        _said.add(name)
        log.warning("%s%s is now called %s", what and f"{what} ", name, table[name])
    return table[name]


def names_of(table: Mapping[str, str], name: str) -> list[str]:
    """A name of today, and the old ones that it had."""
    return [name, *(old for old, new in table.items() if new == name)]


def with_current_names(table: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds by the names of today; files keep what they have, so nothing is said."""
    return {table.get(name, name): value for name, value in values.items()}


def current_scores(scores: Any) -> Any:
    """The content of a metrics.json by the names of today."""
    if not isinstance(scores, Mapping):
        return scores
    return {SCORES.get(name, name): current_scores(value) for name, value in scores.items()}


def current_flags(argv: Sequence[str]) -> list[str]:
    """A command line with the flags of today."""
    names = FLAGS | {f"--config.{old}": f"--config.{new}" for old, new in FIELDS.items()}
    out: list[str] = []
    flag = ""
    for argument in argv:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            argument = current(names, flag) + equals + value
        elif flag == "--questions":
            argument = current(KINDS, argument, "kind of question")
        out.append(argument)
    return out


def current_parameters(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments by the names of today."""
    return {current(PARAMETERS, name, "parameter"): value for name, value in options.items()}


def takes_original_names(method: Callable[..., T]) -> Callable[..., T]:
    """A decorator of methods that take the original's names of parameters too."""

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> T:
        named = {ORIGINAL.get(name, name): value for name, value in options.items()}
        if len(named) < len(options):
            raise TypeError(f"{method.__name__}() got an argument under two names: {[*options]}")
        return method(*args, **named)

    return call


def takes_old_names(cls: type[T]) -> type[T]:
    """A class decorator: the constructor takes old parameters, instances have old attributes."""
    made = cls.__init__  # type: ignore[misc]

    @functools.wraps(made)
    def init(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **current_parameters(options))

    def find(self: Any, name: str) -> Any:
        new = ATTRIBUTES.get(name)
        if new is not None and (new in vars(self) or hasattr(type(self), new)):
            return getattr(self, current(ATTRIBUTES, name, f"{cls.__name__}'s attribute"))
        raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")

    cls.__init__ = init  # type: ignore[method-assign, misc]
    cls.__getattr__ = find  # type: ignore[attr-defined]
    return cls
