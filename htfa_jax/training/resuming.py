"""Where a run begins or goes on, and what may change between two starts.

Most options may, which is said; what decides its weights may not.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import optax

from htfa_jax.common.hashing import short_hash
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, leaves
from htfa_jax.config.places import SPLITS
from htfa_jax.data.records import Dataset
from htfa_jax.errors import ConfigError, DataError
from htfa_jax.training.optim import learning_rate
from htfa_jax.training.state import TrainState

# In a checkpoint's meta: what its training data was, and of how many steps its schedule is.
DATA, STEPS = "data", "num_steps"
# Records that are looked at, spread evenly: all of a small dataset, some of a large one.
LOOKED_AT = 512
# What a finished run may take up without training anew: where it reads, how it saves and evaluates.
_HARMLESS = (
    "eval.",
    "sharding.",
    "data.validation",
    "data.test",
    "data.default_query",
    "data.num_",
    "data.cache_",
    "data.max_bad_records",
    "data.on_error",
    "train.log_every",
    "train.save",
    "train.keep_checkpoints",
    "train.best_",
    "train.watchdog_seconds",
    "train.profile_steps",
    "train.on_nonfinite",
    "train.max_skipped",
    "train.remat",
    "vq_train.",
    "data.image_root",
)
# Fewer steps are a wish that is granted.
_LENGTH = ("train.max_steps", "train.epochs")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where the steps of a run begin.

    Attributes:
      state: training state; its step is the last one that was taken.
      frozen: frozen weights, laid out.
      frozen_names: of the folders that hold them, with their hashes.
      samples: that were seen before.
      window: metrics since the last line of means; see `Loop`.
      late: whether the evaluation of that step was interrupted, and comes first.
      num_steps: of the whole run.
      schedule: of the learning rate.
      optimizer: with that schedule.
    """

    state: TrainState
    frozen: Flat
    frozen_names: dict[str, str]
    samples: int
    window: list[dict[str, float]]
    late: bool
    num_steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation


def say_changes(before: Config, config: Config, new: Sequence[str]) -> None:
    """Logs which options are not what the workdir was made with.

    Args:
      before: what it was made with.
      config: what is asked for now.
      new: names of options that there were not then.
    """
    old = dict(leaves(before))
    for name, value in leaves(config):
        if name in new:
            log.warning("%s is new since this workdir was made; it is %s", name, value)
        elif old[name] != value:
            log.warning("%s was %s in this workdir and is now %s", name, old[name], value)


def data_facts(records: Dataset) -> dict[str, Any]:
    """What tells the training data from others in any place: its number of records, and a hash."""
    count = len(records)
    numbers = sorted({round(i * (count - 1) / LOOKED_AT) for i in range(LOOKED_AT + 1)})
    return {"records": count, "hash": short_hash([count, *(_text(records, i) for i in numbers)])}


def _text(records: Dataset, number: int) -> str:
    try:
        return repr(sorted(records[number].raw.items(), key=lambda item: item[0]))
    except DataError as error:
        return type(error).__name__


def say_data(before: Any, now: Mapping[str, Any], step: int) -> bool:
    """Logs how the training data differs from a checkpoint's. Returns whether it does.

    Args:
      before: `data_facts` of the checkpoint's meta; anything else tells nothing.
      now: those of today.
      step: of the checkpoint.
    """
    if not isinstance(before, dict) or before.get("hash") == now["hash"]:
        return False
    old, new = before.get("records"), now["records"]
    if old != new:
        log.warning(
            "the training data has %s records, it had %s up to step %d: its order is another one "
            "from here on, so that in the epoch under way some may come twice and some not at all",
            new,
            old,
            step,
        )
    else:
        log.warning("the training data has other content than up to step %d", step)
    return True


def compare(
    before: Config,
    config: Config,
    meta: Mapping[str, Any],
    now: Mapping[str, Any],
    schedule: optax.Schedule,
    num_steps: int,
) -> None:
    """Says, or refuses, what is not as it was when a checkpoint was saved.

    Args:
      before, config: configuration until now, and that the run goes on with.
      meta: of the checkpoint.
      now: `data_facts` of today.
      schedule, num_steps: of the run from now on.

    Raises ConfigError if there is nothing left to train on what was changed.
    """
    step, facts = int(meta["step"]), meta.get(DATA)
    differs = say_data(facts, now, step)
    same_data = not differs if isinstance(facts, dict) else None
    refuse_empty_range(before, config, step, num_steps, same_data)
    say_schedule(before, meta.get(STEPS), schedule, num_steps, step)


def say_schedule(
    before: Config, old_steps: Any, schedule: optax.Schedule, num_steps: int, at: int
) -> None:
    """Logs where the learning rate jumps because the schedule is another one.

    Args:
      before: configuration until now.
      old_steps: of the run until now; None if the checkpoint does not say.
      schedule, num_steps: of the run from now on.
      at: step that is behind it.
    """
    if not isinstance(old_steps, int) or not 0 < old_steps < 2**31 or at >= num_steps or at < 1:
        return
    old_schedule = learning_rate(before.optim, old_steps)
    expected, now = float(old_schedule(at)), float(schedule(at))
    if math.isclose(expected, now, rel_tol=1e-5):
        return
    last = float(old_schedule(at - 1))
    why = "with other options"
    if num_steps != old_steps:
        why = f"of {num_steps} steps instead of {old_steps}"
    log.warning(
        "the learning rate jumps: %.3g at step %d, %.3g at step %d (%.3g times as much; %.3g until "
        "now), because the schedule is %s. optim.schedule=constant has no such jump",
        last,
        at,
        now,
        at + 1,
        now / last if last else math.inf,
        expected,
        why,
    )


def refuse_empty_range(
    before: Config, config: Config, at: int, num_steps: int, same_data: bool | None
) -> None:
    """A run that is complete takes no step; asking it to train on something else is a mistake.

    Args:
      before: configuration until now.
      config: that it should go on with.
      at: step that is behind it.
      num_steps: at which it is complete.
      same_data: whether the training data has the content of before; None if that is not known.

    Raises ConfigError that names what was changed, and the ways to train on it.
    """
    if at < num_steps:
        return
    old = dict(leaves(before))
    changed = [
        f"{name} was {old[name]} and is now {value}"
        for name, value in leaves(config)
        if old[name] != value
        and not name.startswith((*_HARMLESS, *_LENGTH))
        and not _same_place(name, old[name], value, same_data)
    ]
    if same_data is False and not any(c.startswith("data.") for c in changed):
        changed.append("the training data has other content")
    if changed:
        raise ConfigError(
            f"this workdir's run is complete at step {num_steps}: nothing would be trained with "
            f"what is changed ({'; '.join(changed)}). To train on from its weights: another "
            "--workdir, and --init_from THIS_WORKDIR; to lengthen this run: a higher "
            "train.max_steps (or train.epochs)"
        )


def _same_place(name: str, before: Any, now: Any, same_data: bool | None) -> bool:
    """Whether a source only moved."""
    if name not in SPLITS and name != "data.sources":
        return False
    if same_data is not None:
        return same_data
    return isinstance(before, str) and PurePath(before).name == PurePath(str(now)).name
