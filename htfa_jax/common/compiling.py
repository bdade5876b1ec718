"""What is said while nothing seems to happen: XLA compiles, for seconds to minutes."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Says before the block that something is compiled, and after it how long that took.

    Args:
      what: is compiled, as in "the training step"; its first run is part of the time.
    """
    log.info("compiling %s: seconds to minutes once, less when it was compiled before ...", what)
    started = time.perf_counter()
    yield
    log.info("compiled %s in %.1f s", what, time.perf_counter() - started)


def said_once(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function whose first call is `compiling`."""
    first = True

    def call(*args: Any) -> Any:
        nonlocal first
        if not first:
            return function(*args)
        with compiling(what):
            result = function(*args)
        first = False
        return result

    return call


def without_alarms() -> None:
    """Keeps XLA's own log lines, such as "Very slow compile?", off the terminal.

    It has to be called before JAX is imported; errors still are exceptions.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
