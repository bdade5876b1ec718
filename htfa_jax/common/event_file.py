"""TensorBoard's event files, written by the caller itself.

The `SummaryWriter` of tensorboardX hands everything to a thread. That ends at the first error of
its disk; then its queue is full after some entries, and whoever writes waits for ever. Here only
the encoding is tensorboardX's.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from htfa_jax.common.growing_file import GrowingFile


def _tensorboardx() -> ModuleType:
    """tensorboardX without PyTorch, which it imports wherever it is installed.

    For tensors that nobody here has. That would be three seconds of every start, so it is not
    found meanwhile.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX.record_writer
        import tensorboardX.summary
    finally:
        if hide:
            sys.modules.pop("torch", None)
    return tensorboardX


class EventFile:
    """One event file in a folder. Methods never wait and never raise OSError; `__init__` may."""

    def __init__(self, folder: Path):
        library = _tensorboardx()
        from tensorboardX.proto.event_pb2 import Event

        self._event: Callable[..., Any] = Event
        self._summary = library.summary
        self._checksum: Callable[[bytes], int] = library.record_writer.masked_crc32c
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = GrowingFile(folder / name)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """A number."""
        self._add(self._summary.scalar(name, value), step)

    def add_images(self, name: str, image_NHWC: np.ndarray, step: int) -> None:
        """Images, uint8 or in [0, 1]."""
        self._add(self._summary.image(name, image_NHWC, dataformats="NHWC"), step)

    def add_text(self, name: str, text: str, step: int) -> None:
        """Text, shown as Markdown."""
        self._add(self._summary.text(name, text), step)

    def flush(self) -> None:
        """Has the disk hold it, if it takes it."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, summary: Any, step: int) -> None:
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        sums = [struct.pack("<I", self._checksum(part)) for part in (length, content)]
        self._file.write(length + sums[0] + content + sums[1])
