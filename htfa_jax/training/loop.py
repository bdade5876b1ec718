"""The training loop that the main job and the VQ stage share.

`clu.periodic_actions` takes no part: importing it needs TensorFlow (as of clu 0.0.12), its
`Profile` ends a trace without waiting for the steps in flight, and its `ReportProgress` counts
steps when they are dispatched, not when they are done.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax

from htfa_jax.common.compiling import said_once
from htfa_jax.common.logs import MetricWriter, progress
from htfa_jax.common.signals import StopSignal
from htfa_jax.data.pipeline import Loaded
from htfa_jax.errors import DataError, HTFAError
from htfa_jax.training.loss_guard import LossGuard
from htfa_jax.training.state import TrainState

# Steps before the recorded ones: the first is compiled, the second still waits for its data.
WARM = 2

log = logging.getLogger(__name__)
Metrics = dict[str, jax.Array]


class PendingStep(NamedTuple):
    """A step that was dispatched and not yet reported."""

    step: int
    metrics: Metrics
    loaded: Loaded


@dataclasses.dataclass
class Loop:
    """Runs steps, reports them, and leaves saving and evaluation to a callback.

    `state` is the newest one, also after an error; `window` holds the metrics of each step since
    the last line of means, which go into a checkpoint: a run that resumes writes the same means.

    Attributes:
      name: of the stage, in log lines.
      step_fn: (state, batch) -> (state, metrics); metrics hold "loss" and "finite".
      put: host batch -> batch on devices.
      num_steps: step at which the stage is complete.
      log_every: steps between lines of metrics.
      writer: takes the metrics.
      samples_per_step: for the rate.
      due: whether `after_step` has anything to do after a step.
      after_step: called with (step, state) after the steps that are due, which were reported.
      save: called with the last state, also when an error ends the loop: what was learned stays.
      max_bad_records: skipped records that end the run.
      guard: takes the metrics first.
      stop: asked for after every step.
      check_held: called before every step; raises if the workdir is another run's.
      watchdog_seconds: without a step, after which all stacks are printed.
      flops_per_sample: for the rate of floating-point operations; 0 leaves it out.
    """

    name: str
    step_fn: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    put: Callable[[Any], Any]
    num_steps: int
    log_every: int
    writer: MetricWriter
    samples_per_step: int
    due: Callable[[int], bool]
    after_step: Callable[[int, TrainState], None]
    save: Callable[[TrainState], None]
    max_bad_records: int
    guard: LossGuard
    stop: StopSignal
    check_held: Callable[[], None] = lambda: None
    watchdog_seconds: float = 0.0
    flops_per_sample: float = 0.0
    window: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def run(self, state: TrainState, batches: Iterator[Loaded]) -> tuple[TrainState, bool]:
        """Steps from `state` on. Returns the last state, and whether a signal cut it short."""
        self.state, self._pending, self._bad = state, None, set()
        self._timed, self._window_start = 0, time.perf_counter()
        with (
            self.stop.patiently(),
            progress(self.num_steps, self.name, start=int(state["step"])) as bar,
            Watchdog(self.watchdog_seconds) as watchdog,
        ):
            try:
                stopped = self._steps(batches, bar, watchdog)
            except HTFAError:
                self.save(self.state)
                raise
            self.save(self.state)
        return self.state, stopped

    def _steps(self, batches: Iterator[Loaded], bar: Any, watchdog: Watchdog) -> bool:
        stopped, step_fn = False, said_once(f"a step ({self.name})", self.step_fn)
        for step in range(int(self.state["step"]) + 1, self.num_steps + 1):
            self.check_held()
            loaded = self._next(batches, bar)
            self.state, metrics = step_fn(self.state, self.put(loaded.batch))
            # The step before is read while this one runs.
            self._report(bar)
            self._pending = PendingStep(step, metrics, loaded)
            watchdog.beat()
            if self.due(step):
                self._report(bar)
                before = time.perf_counter()
                self.after_step(step, self.state)
                self._window_start += time.perf_counter() - before  # the rate is of steps alone
                watchdog.beat()
            if stopped := self.stop.agreed(step):
                break
        self._report(bar)
        return stopped

    def _next(self, batches: Iterator[Loaded], bar: Any) -> Loaded:
        try:
            loaded = next(batches)
            self._report_bad(loaded)
        except DataError:
            self._report(bar)  # the step before it was made all the same
            raise
        return loaded

    def _report(self, bar: Any) -> None:
        if self._pending is None:
            return
        (step, device_metrics, loaded), self._pending = self._pending, None
        metrics = {k: float(v) for k, v in jax.device_get(device_metrics).items()}
        applied = self.guard.passes(self.name, step, metrics, loaded)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
        bar.update(1)
        self._timed += 1
        if applied:
            self.window.append({k: v for k, v in metrics.items() if k != "finite"})
        if step % self.log_every == 0 or step == self.num_steps:
            self._write_means(step)

    def _write_means(self, step: int) -> None:
        seconds = time.perf_counter() - self._window_start
        rate = self._timed * self.samples_per_step / max(seconds, 1e-9)
        means = {}
        for name in self.window[0] if self.window else ():
            # A step whose gradient did not fit into float16 has no norm.
            known = [m[name] for m in self.window if not math.isnan(m[name])]
            if known:
                means[name] = sum(known) / len(known)
        scalars = {f"{self.name}/{name}": value for name, value in means.items()}
        scalars[f"{self.name}/samples_per_second"] = rate
        if self.flops_per_sample:
            scalars[f"{self.name}/model_tflops_per_second"] = rate * self.flops_per_sample / 1e12
        self.writer.write_scalars(step, scalars)
        shown = " ".join(
            f"{name} {value:.4g}"
            for name, value in means.items()
            if name.endswith(("loss", "accuracy", "norm", "used"))
        )
        log.info(
            "%s step %d/%d: %s, %.1f samples/s, %s left",
            self.name,
            step,
            self.num_steps,
            shown or "all updates skipped",
            rate,
            duration((self.num_steps - step) * seconds / max(self._timed, 1)),
        )
        self.window.clear()
        self._timed, self._window_start = 0, time.perf_counter()

    def _report_bad(self, loaded: Loaded) -> None:
        for error in loaded.errors:
            log.warning("skipped: %s", error)
        self._bad.update(loaded.errors)  # each names its record, which comes again every epoch
        if len(self._bad) > self.max_bad_records:
            raise DataError(
                f"more than data.max_bad_records={self.max_bad_records} records were skipped; "
                f"the last: {loaded.errors[-1]}"
            )


def duration(seconds: float) -> str:
    """Seconds as 5s, 3m05s or 2h03m."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"


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


class Watchdog:
    """While active, prints the stacks of all threads when no step has ended for a time.

    The timer is not Python's: it also goes off while something holds the interpreter. The run
    itself goes on; the stacks come again after as long again.

    Args:
      seconds: without a step; 0 never prints.
      file: with a file number; the standard error output by default.
    """

    def __init__(self, seconds: float, file: IO[str] | None = None):
        self.seconds, self._file = seconds, file or sys.__stderr__

    def __enter__(self) -> Watchdog:
        self.beat()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """A step has ended."""
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, repeat=True, file=self._file)
