"""Where a run begins or goes on, and what may change between two starts.

Most options may, which is said; what decides its weights may not.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import optax

from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, leaves
from htfa_jax.training.state import TrainState

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
