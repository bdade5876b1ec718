"""Says where a run that does not move hangs."""

from __future__ import annotations

import faulthandler
import sys
from typing import IO


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
