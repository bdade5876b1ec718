"""What a run does about updates that are not finite, and about loss spikes.

Inside the step nothing of an update that is not finite is applied. With
`train.on_nonfinite="stop"` the state then halts, and a step that was already under way leaves it as
it is. So the run stops before the update, wherever the host is, and the batch is dumped with all
that `htfa_jax.reproduce` takes to run it again. With "skip" the run goes on without the update.
"""

from __future__ import annotations

import collections
import json
import logging
import statistics
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from htfa_jax.common.files import write_whole
from htfa_jax.common.json_files import read_json
from htfa_jax.config import TrainConfig
from htfa_jax.data.batch import Batch
from htfa_jax.errors import DataError, TrainingError
from htfa_jax.kernels.update import update_if
from htfa_jax.training.state import TrainState

if TYPE_CHECKING:
    from htfa_jax.data.pipeline import Loaded

log = logging.getLogger(__name__)

DUMPS, FACTS = "nonfinite", "facts.json"
# A loss spike is more than so many median deviations above the median of the last steps.
WINDOW, FEWEST, DEVIATIONS = 100, 20, 12.0


def is_usable(state: TrainState, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """Whether an update may be applied: loss and gradient are finite, and the state not halted."""
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm) & ~state["halted"]


def guarded_update(
    state: TrainState,
    update: Callable[[Any, Any], tuple[Any, Any]],
    usable: jax.Array,
    train: TrainConfig,
    harmless: jax.Array | None = None,
) -> TrainState:
    """The state after a step: updated if its update is usable, else as it was.

    Args:
      state: before the step; halted ones stay as they are.
      update: (params, opt_state) -> (params, opt_state), the optimizer's update.
      usable: as `is_usable` says.
      train: of the configuration; `on_nonfinite="stop"` halts the state at the first update that is
        not usable, "skip" counts its step and goes on.
      harmless: whether this update may be left out without halting, as when a smaller loss scale
        helps; `usable` by default.

    Returns:
      "step", "halted", "params", "opt_state".
    """
    old = state["params"], state["opt_state"]
    halted = state["halted"]
    params, opt_state = update_if(usable, lambda old: update(*old), old)
    if train.on_nonfinite == "stop":
        halted |= ~(usable if harmless is None else harmless)
    step = jnp.where(halted, state["step"], state["step"] + 1)
    return {"step": step, "halted": halted, "params": params, "opt_state": opt_state}


class LossGuard:
    """Looks at the metrics of each step, on the host.

    Args:
      train: of the configuration.
      dumps: folder for batches; None dumps none.
      num_steps: of the whole run, which its schedule depends on.
    """

    def __init__(self, train: TrainConfig, dumps: Path | None = None, num_steps: int = 0):
        self.train, self.dumps, self.num_steps = train, dumps, num_steps
        self._skipped = 0
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def passes(self, name: str, step: int, metrics: dict[str, float], loaded: Loaded) -> bool:
        """Whether the update of this step was applied.

        Args:
          name: of the stage.
          step: which update it is.
          metrics: of the step, "finite" among them.
          loaded: its batch.

        Raises:
          TrainingError: it was not, and the run must not go on.
        """
        if metrics["finite"] and np.isfinite(metrics["loss"]):
            self._skipped = 0
            self._mark_spike(name, step, metrics["loss"], loaded.ids)
            return True
        self._skipped += 1
        rate = (
            f", learning rate {metrics['learning_rate']:.3g}" if "learning_rate" in metrics else ""
        )
        what = (
            f"{name}: loss or gradient is not finite at step {step} (loss {metrics['loss']}, "
            f"gradient norm {metrics.get('grad_norm')}{rate}); the step left the weights as they "
            f"were. Records of its batch: {', '.join(loaded.ids)}"
        )
        skips = self.train.on_nonfinite == "skip"
        if skips and self._skipped <= self.train.max_skipped:
            log.warning("%s", what)
            return False
        advice = "Try a lower learning rate, a longer warm-up, or train.dtype=float32"
        if skips:
            raise TrainingError(
                f"{what}. {advice}. train.max_skipped={self.train.max_skipped} updates in a row "
                "were skipped; with train.on_nonfinite=stop a run stops before the first and "
                "keeps its batch."
            )
        raise TrainingError(
            f"{what}. {advice}; train.on_nonfinite=skip leaves out such updates."
            + (self._dump(step, metrics, loaded) if self.dumps else "")
        )

    def _dump(self, step: int, metrics: dict[str, float], loaded: Loaded) -> str:
        folder = self.dumps / f"step_{step}"
        try:
            dump(folder, loaded, metrics, {"step": step, "num_steps": self.num_steps})
        except OSError as error:
            return f"\nIts batch could not be written: {error}"
        return f"\nTo see it again: python -m htfa_jax.reproduce {folder}"

    def _mark_spike(self, name: str, step: int, loss: float, ids: list[str]) -> None:
        if len(self._losses) >= FEWEST:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(x - median) for x in self._losses)
            if loss > median + DEVIATIONS * max(deviation, 1e-3 * abs(median)):
                log.warning(
                    "%s: loss spike, %.4g at step %d (median of the last %d: %.4g); records "
                    "of its batch: %s",
                    name,
                    loss,
                    step,
                    len(self._losses),
                    median,
                    ", ".join(ids),
                )
        self._losses.append(loss)


def dump(folder: Path, loaded: Loaded, metrics: dict[str, float], facts: dict[str, Any]) -> None:
    """Writes this process's part of a batch.

    Args:
      folder: where; made if it is not there.
      loaded: the batch.
      metrics: what came out.
      facts: what else runs it again: `step`, which update it was, and `num_steps` of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {k: np.asarray(v) for k, v in vars(loaded.batch).items() if v is not None}
    process = jax.process_index()
    np.savez(folder / f"batch_{process}.npz", **arrays)
    facts = facts | {
        "processes": jax.process_count(),
        "ids": loaded.ids,
        "types": {name: str(array.dtype) for name, array in arrays.items()},
        "metrics": {name: repr(value) for name, value in metrics.items()},
    }
    text = json.dumps(facts, indent=1) + "\n"
    write_whole(folder / f"{process}_{FACTS}", text)


def load_dump(folder: Path) -> tuple[Batch, dict[str, Any]]:
    """This process's part of a batch that `dump` wrote, and the facts. Raises DataError."""
    process = jax.process_index()
    try:
        facts = read_json(folder / f"{process}_{FACTS}", DataError)
        with np.load(folder / f"batch_{process}.npz", allow_pickle=False) as file:
            arrays = {name: file[name].view(facts["types"][name]) for name in file.files}
        for name in ("processes", "step", "num_steps"):
            if not isinstance(facts[name], int) or not 0 <= facts[name] < 2**31:
                raise ValueError(f"{name} must be a number from 0")
        if not isinstance(facts["ids"], list):
            raise ValueError("ids must be a list")
        return Batch(**arrays), facts
    except (OSError, ValueError, KeyError, TypeError, DataError, zipfile.BadZipFile) as error:
        raise DataError(f"{folder} is no dumped batch that can be read: {error}") from error
