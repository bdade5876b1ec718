"""What a run says: a log file, progress bars, scalars and images for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from htfa_jax.common.event_file import EventFile
from htfa_jax.common.growing_file import GrowingFile
from htfa_jax.common.hashing import bytes_sha256, file_sha256

log = logging.getLogger(__name__)
_talks = True


class _BarHandler(logging.Handler):
    """Writes log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _LogFile(logging.FileHandler):
    """A log file whose disk may be full: that is no reason to end what is logged.

    Python keeps the lines that are refused, and writes them with the next one that is not.
    """

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exception(), OSError):
            if not self._said:
                tqdm.write(f"{self.baseFilename}: {sys.exception()}", file=sys.stderr)
            self._said = True
        else:
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def _log_to(handler: logging.Handler) -> Iterator[logging.Handler]:
    ours = logging.getLogger("htfa_jax")
    before = ours.level, ours.propagate
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False  # some libraries put a handler of their own on the root
    try:
        yield handler
    finally:
        ours.level, ours.propagate = before
        ours.removeHandler(handler)
        handler.close()


def log_to_terminal() -> contextlib.AbstractContextManager[logging.Handler]:
    """Shows this package's log lines on the terminal."""
    # Orbax warns through absl of every checkpoint that no evaluation came before, and logs with
    # pages of traceback what it then raises; asyncio does, for each array that is not written.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return _log_to(_BarHandler())


def only_warnings_to_terminal() -> None:
    """For all processes of a run but the first, which talks for all. Bars are left out too."""
    global _talks
    _talks = False
    for handler in logging.getLogger("htfa_jax").handlers:
        if isinstance(handler, _BarHandler):
            handler.setLevel(logging.WARNING)


def log_to_file(path: Path) -> contextlib.AbstractContextManager[logging.Handler]:
    """Appends log lines to a file, through the handler that it gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names of files may hold bytes that are no text.
    return _log_to(_LogFile(path, encoding="utf-8", errors="backslashreplace"))


def progress(total: int, description: str, *, start: int = 0, unit: str = "step") -> tqdm:
    """A progress bar on a terminal; nothing elsewhere, where log lines tell."""
    return tqdm(
        total=total,
        initial=start,
        desc=description,
        unit=unit,
        disable=not (sys.stderr.isatty() and _talks),
        dynamic_ncols=True,
    )


def drop_half_line(path: Path) -> None:
    """Cuts off a last line that a process did not live to finish; a resumed run writes it again."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


class MetricWriter:
    """Scalars to `metrics.jsonl` and TensorBoard, images and text to TensorBoard.

    The methods are those of `clu.metric_writers.MetricWriter`, whose own writers need
    TensorFlow; this one does not. A silent one, for all processes but the first, writes nothing.

    A disk that takes nothing neither stops a run nor holds it up: what is written waits in memory
    (`GrowingFile`). `metrics.jsonl` is the record, TensorBoard's file a copy to look at.
    """

    def __init__(self, folder: Path, *, silent: bool = False):
        self.silent = silent
        if silent:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        drop_half_line(self._path)
        self._lines = GrowingFile(self._path)
        self._board = EventFile(folder)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line of numbers."""
        if self.silent:
            return
        values = {name: float(value) for name, value in scalars.items()}
        line = json.dumps({"step": step, "time": time.time(), **values}) + "\n"
        self._lines.write(line.encode())
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Images [N, H, W, 3], uint8 or in [0, 1]."""
        if self.silent:
            return
        for name, batch in images.items():
            self._board.add_images(name, np.asarray(batch), step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Text, shown as Markdown."""
        if self.silent:
            return
        for name, text in texts.items():
            self._board.add_text(name, text, step)

    def flush(self) -> None:
        """Has the disk hold what was written: before a checkpoint that goes on behind it."""
        if self.silent:
            return
        self._lines.flush()
        self._board.flush()

    def digest(self) -> dict[str, Any]:
        """Size and hash of `metrics.jsonl` as it is now, for a checkpoint."""
        if self.silent:
            return {}
        try:
            return {"bytes": self._path.stat().st_size, "sha256": file_sha256(self._path)}
        except OSError:  # of a log: no reason not to save
            return {}

    def check(self, digest: Any) -> None:
        """Warns if the beginning of `metrics.jsonl` is not what a checkpoint's `digest` says."""
        size = digest.get("bytes") if isinstance(digest, dict) else None
        if self.silent or not isinstance(size, int):
            return
        with self._path.open("rb") as file:
            known = bytes_sha256(file.read(max(size, 0))) == digest.get("sha256")
        if not known:
            log.warning(
                "%s is not what this run wrote: lines up to its checkpoint were changed or are "
                "missing. Curves show them as they are; the weights are those of the checkpoint",
                self._path,
            )

    def close(self) -> None:
        """Flushes and closes."""
        if self.silent:
            return
        self._lines.close()
        self._board.close()
