"""Records what the devices do during some steps, for TensorBoard's profile page."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)

# Steps before the recorded ones: the first is compiled, the second still waits for its data.
WARM = 2


def recorded(step_fn: Callable[..., Any], folder: Path, steps: int) -> Callable[..., Any]:
    """A step function of whose calls JAX's profiler records `steps`, after the first two.

    Args:
      step_fn: what to record.
      folder: TensorBoard's; the recording goes to `plugins/profile` in it.
      steps: how many calls; 0 records nothing. With fewer calls nothing is written.
    """
    if not steps:
        return step_fn
    calls = itertools.count(1)

    def step(*args: Any) -> Any:
        call = next(calls)
        if call == WARM + 1:
            jax.profiler.start_trace(str(folder))
        result = step_fn(*args)
        if call == WARM + steps:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            log.info("profile of %d steps: %s", steps, folder / "plugins" / "profile")
        return result

    return step
