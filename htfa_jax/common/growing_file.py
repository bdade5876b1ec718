"""A file that grows by whole pieces, and whose disk may be full for a while: logs of a run.

Nobody waits for the disk: what it refuses stays in memory and follows later, in order. Half a piece
that it took is cut off again, so that readers find whole ones only.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

# Bytes that wait at most: days of metrics, or some dozen images.
MOST = 2**26

log = logging.getLogger(__name__)


class GrowingFile:
    """A file that pieces are appended to.

    Args:
      path: of the file, made if it is not there.

    Raises OSError if it cannot be opened; later only `log` tells of errors.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._waiting: list[bytes] = []
        self._failed = self._half = False
        self._lost = 0

    def write(self, piece: bytes) -> None:
        """Appends a piece, now or when the disk takes it again."""
        if sum(map(len, self._waiting)) + len(piece) > MOST:
            self._lost += 1
        else:
            self._waiting.append(piece)
        self._try()

    def flush(self) -> None:
        """Tries once more what waits, and has the disk hold what was written."""
        self._try()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes; what still waits is lost, and said."""
        self._try()
        if lost := self._lost + len(self._waiting):
            log.warning("%s lacks %d entries: its disk took no more", self.path, lost)
        with contextlib.suppress(OSError):
            self._file.close()

    def _try(self) -> None:
        try:
            if self._half:
                self._cut()
            while self._waiting:
                self._append(self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            if not self._failed:
                log.warning(
                    "%s cannot be written (%s): its entries wait in memory, and the run goes on",
                    self.path,
                    error.strerror or error,
                )
            self._failed = True
            return
        if self._failed:
            log.warning("%s is written again", self.path)
        self._failed = False

    def _append(self, piece: bytes) -> None:
        self._half = True
        try:
            done = 0
            while done < len(piece):  # a disk that fills up takes a part before it refuses
                done += self._file.write(piece[done:]) or 0
        except OSError:
            with contextlib.suppress(OSError):
                self._cut()
            raise
        self._size += len(piece)
        self._half = False

    def _cut(self) -> None:
        os.ftruncate(self._file.fileno(), self._size)
        self._half = False
