"""The training loop that the main job and the VQ stage share."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from htfa_jax.data.pipeline import Loaded
from htfa_jax.errors import DataError, TrainingError
from htfa_jax.logs import MetricWriter, progress
from htfa_jax.train_state import State

log = logging.getLogger(__name__)

Metrics = dict[str, jax.Array]


@dataclasses.dataclass
class Loop:
    """Runs steps, reports them, and leaves saving and evaluation to a callback.

    `state` is the newest one, also after an error.

    Attributes:
      name: of the stage, in log lines.
      step_fn: (state, batch) -> (state, metrics); metrics hold "loss" and "finite".
      put: host batch -> batch on devices.
      num_steps: step at which the stage is complete.
      log_every: steps between lines of metrics.
      writer: takes the metrics.
      samples_per_step: for the rate.
      after_step: called with (step, state) after every step.
      max_bad_records: skipped records that end the run.
      flops_per_sample: for the rate of floating-point operations; 0 leaves it out.
    """

    name: str
    step_fn: Callable[[State, Any], tuple[State, Metrics]]
    put: Callable[[Any], Any]
    num_steps: int
    log_every: int
    writer: MetricWriter
    samples_per_step: int
    after_step: Callable[[int, State], None]
    max_bad_records: int
    flops_per_sample: float = 0.0

    def run(self, state: State, batches: Iterator[Loaded]) -> tuple[State, bool]:
        """Steps from `state` on. Returns the last state, and whether a signal cut it short."""
        start, stopped, self._bad = int(state["step"]), False, set()
        self.state = state
        self._window: list[dict[str, float]] = []
        self._window_start = time.perf_counter()
        pending: tuple[int, Metrics, list[str]] | None = None
        with StopSignal() as stop, progress(self.num_steps, self.name, start=start) as bar:
            for step in range(start + 1, self.num_steps + 1):
                loaded = next(batches)
                self._report_bad(loaded)
                state, metrics = self.step_fn(state, self.put(loaded.batch))
                self.state = state
                # The step before is read while this one runs.
                self._report(pending, bar)
                pending = (step, metrics, loaded.ids)
                before = time.perf_counter()
                self.after_step(step, state)
                self._window_start += time.perf_counter() - before  # the rate is of steps alone
                if stopped := stop.agreed(step):
                    break
            self._report(pending, bar)
        return state, stopped

    def _report(self, pending: tuple[int, Metrics, list[str]] | None, bar: Any) -> None:
        if pending is None:
            return
        step, device_metrics, ids = pending
        metrics = {name: float(value) for name, value in device_metrics.items()}
        if not metrics.pop("finite") or not math.isfinite(metrics["loss"]):
            raise TrainingError(
                f"{self.name}: loss or gradient is not finite at step {step} "
                f"(loss {metrics['loss']}); the step left the weights as they were. Records of "
                f"its batch: {', '.join(ids)}. Try a lower learning rate, a longer warm-up, or "
                "train.dtype=float32"
            )
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
        bar.update(1)
        self._window.append(metrics)
        if step % self.log_every and step != self.num_steps:
            return
        seconds = time.perf_counter() - self._window_start
        rate = len(self._window) * self.samples_per_step / max(seconds, 1e-9)
        means = {
            f"{self.name}/{name}": sum(m[name] for m in self._window) / len(self._window)
            for name in metrics
        }
        means[f"{self.name}/samples_per_second"] = rate
        if self.flops_per_sample:
            means[f"{self.name}/model_tflops_per_second"] = rate * self.flops_per_sample / 1e12
        self.writer.write_scalars(step, means)
        shown = " ".join(
            f"{name} {means[f'{self.name}/{name}']:.4g}"
            for name in metrics
            if name.endswith(("loss", "accuracy", "norm", "used"))
        )
        left = (self.num_steps - step) * seconds / len(self._window)
        log.info(
            "%s step %d/%d: %s, %.1f samples/s, %s left",
            self.name,
            step,
            self.num_steps,
            shown,
            rate,
            duration(left),
        )
        self._window, self._window_start = [], time.perf_counter()

    def _report_bad(self, loaded: Loaded) -> None:
        for error in loaded.errors:
            log.warning("skipped: %s", error)
        self._bad.update(loaded.errors)  # each names its record, which comes again every epoch
        if len(self._bad) > self.max_bad_records:
            raise DataError(
                f"more than data.max_bad_records={self.max_bad_records} records were skipped; "
                f"the last: {loaded.errors[-1]}"
            )


class StopSignal:
    """While active, the first SIGTERM or SIGINT asks the loop to stop; the second kills.

    Several processes must stop after the same step: JAX, which takes their SIGTERM, chooses it.
    """

    def __enter__(self) -> StopSignal:
        self.requested = False
        self._before = {}
        if jax.process_count() > 1:
            return self
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, step: int) -> bool:
        """Whether all processes are to stop after this step."""
        if jax.process_count() == 1:
            return self.requested
        return multihost_utils.reached_preemption_sync_point(step)

    def _handle(self, number: int, frame: object) -> None:
        self.requested = True
        log.warning("%s: finishing this step and saving", signal.Signals(number).name)
        signal.signal(number, self._before[number])


def duration(seconds: float) -> str:
    """Seconds as 5s, 3m05s or 2h03m."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
