"""SIGTERM and SIGINT: one asks the run to stop, the next stops it."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """A signal came where there was nothing to finish."""


class Interrupted(Stopped):
    """A signal came during something that is done again when the run goes on."""


class StopSignal:
    """While active, the first SIGTERM or SIGINT asks the run to stop; the second kills at once.

    What is asked raises `Stopped`, or waits for the end of the step inside of `patiently`.

    Several processes must stop after the same step: JAX, which takes their SIGTERM, chooses it.
    """

    def __init__(self):
        self.requested, self._patient = False, False
        self._before = {}

    def __enter__(self) -> StopSignal:
        if jax.process_count() > 1:
            return self
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def patiently(self) -> Iterator[None]:
        """Inside, the first signal only sets `requested`."""
        before, self._patient = self._patient, True
        try:
            yield
        finally:
            self._patient = before

    def agreed(self, step: int) -> bool:
        """Whether all processes are to stop after this step."""
        if jax.process_count() == 1:
            return self.requested
        return multihost_utils.reached_preemption_sync_point(step)

    def interrupt(self) -> None:
        """Raises `Interrupted` if the run is to stop; never where processes must agree first."""
        if self.requested:
            raise Interrupted

    def _handle(self, number: int, frame: object) -> None:
        self.requested = True
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)
        name = signal.Signals(number).name
        if not self._patient:
            raise Stopped(name)
        log.warning("%s: finishing this step and saving; the next signal stops at once", name)
