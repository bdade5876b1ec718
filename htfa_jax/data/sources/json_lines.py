"""Random access to a JSON-lines file on a local disk."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from htfa_jax.common.json_files import check_beginning, parse_json
from htfa_jax.data.records import Record, parse_record
from htfa_jax.data.storage import image_root as root_of
from htfa_jax.errors import DataError

PIECE = 2**20
# Longer lines count as records without being looked at.
LONGEST_BLANK = 64


class RecordFile:
    """The records of a JSON-lines file; blank lines do not count.

    Only the places of the lines are held in memory, 16 bytes a record. Every process opens the
    file itself, so that an instance can be sent to worker processes.

    Args:
      path: the file.
      image_root: as `data.image_root`.
      recon_template: as `data.recon_template`.

    Raises DataError if there is no such file, or nothing in it.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | None = None,
        recon_template: str | None = None,
    ):
        self.path = Path(path).expanduser()
        self.place = root_of(image_root, str(self.path))
        self.recon_template = recon_template
        self._file: io.FileIO | None = None
        try:
            with self.path.open("rb") as file:
                check_beginning(file.read(4))
            stat = self.path.stat()
            self._spans = line_spans(self.path)
        except FileNotFoundError:
            raise DataError(f"no dataset at {self.path}: expected a file of JSON lines") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} {error}") from error
        self._version = stat.st_size, stat.st_mtime_ns
        self.identity: list[Any] = [str(self.path.resolve()), *self._version]
        if stat.st_size == 0:
            raise DataError(f"{self.path} is empty: it has no bytes")
        if len(self) == 0:
            raise DataError(f"{self.path} holds no records, only blank lines")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        where = f"{self.path}, record {index}"
        try:
            line = self._line(index)
        except OSError as error:
            raise DataError(f"{where}: {error}") from error
        raw = parse_json(line, where, DataError, object, allow_nan=True)
        return parse_record(raw, where, self.place, self.recon_template)

    def _line(self, index: int) -> bytes:
        """A record's text. Raises OSError if the file is not what it was."""
        file = self._file or self._open()
        start, end = map(int, self._spans[index])
        # Threads share the file: each read says where.
        line = os.pread(file.fileno(), end - start, start)
        if len(line) < end - start:
            raise OSError("the file became shorter since it was opened")
        return line

    def _open(self) -> io.FileIO:
        try:
            file = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            raise OSError("the file is gone; it was there when the dataset was opened") from None
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != self._version:
            raise OSError(
                f"the file was changed since the dataset was opened: it has {stat.st_size} bytes, "
                f"it had {self._version[0]}"
            )
        self._file = file
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __repr__(self) -> str:
        return f"RecordFile({self.path}, {len(self)} records)"


def line_spans(path: Path) -> np.ndarray:
    """Start and end of each line that is not blank, int64 [lines, 2]."""
    ends, size = [], 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            ends.append(np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + size + 1)
            size += len(piece)
        found = np.concatenate([np.zeros(1, np.int64), *ends, np.array([size])])
        spans = np.stack([found[:-1], found[1:]], axis=1)
        short = np.flatnonzero(spans[:, 1] - spans[:, 0] < LONGEST_BLANK)
        blank = [
            i
            for i in short.tolist()
            if not os.pread(file.fileno(), int(spans[i, 1] - spans[i, 0]), int(spans[i, 0])).strip()
        ]
    return np.delete(spans, blank, axis=0) if blank else spans
