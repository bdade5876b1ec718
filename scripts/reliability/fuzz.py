"""Feeds made-up input to everything that reads what others wrote.

    python scripts/reliability/fuzz.py --inputs 100000
    python scripts/reliability/fuzz.py --only pickle tokenizer.json --seed 7

Each reader may answer or raise one of the project's own errors; anything else is an escape, also
what takes longer than --seconds. It is printed with the seed that makes it again, and the exit
status is 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import of_data, of_meshes, of_models
from fuzzing.reader import Reader

from htfa_jax.common.cli import parse
from htfa_jax.errors import ConfigError, HTFAError

SHOWN = 5  # escapes of a reader


class TooLong(BaseException):
    """A reader is still at it; no `except Exception` of its own takes it."""


@dataclasses.dataclass
class Count:
    """What became of a reader's inputs.

    Attributes:
      refused: by an error of the project.
      accepted: read.
      escapes: what else was raised, by the seed of its input.
      seconds: of all.
      slowest: seconds of the longest one.
    """

    refused: int = 0
    accepted: int = 0
    escapes: dict[int, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    slowest: float = 0.0

    def __str__(self) -> str:
        total = self.refused + self.accepted + len(self.escapes)
        return (
            f"{total:>9,}{self.refused:>10,}{self.accepted:>10,}{len(self.escapes):>9,}"
            f"{self.seconds:>9.0f}{self.slowest:>9.2f}"
        )


HEADER = f"{'reader':<24}{'inputs':>9}{'refused':>10}{'accepted':>10}{'escapes':>9}" + (
    f"{'seconds':>9}{'slowest':>9}"
)


def all_readers(folder: Path) -> dict[str, Reader]:
    """By name; each has its files in an existing folder."""
    for name in ("data", "meshes", "models"):
        (folder / name).mkdir()
    return (
        of_data.readers(folder / "data")
        | of_meshes.readers(folder / "meshes")
        | of_models.readers(folder / "models")
    )


def feed(reader: Reader, rng: Random) -> bool:
    """Feeds one input; whether it was accepted. Raises what escapes."""
    given = reader.make(rng)
    try:
        reader.read(given)
    except HTFAError as error:
        assert str(error), "a sentence is said"
        return False
    return True


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """A block that is interrupted after so long."""

    def stop(*_: Any) -> None:
        raise TooLong(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def count(
    reader: Reader, inputs: int, seed: int, seconds: float, most: float | None = None
) -> Count:
    """Feeds a reader with the inputs of so many seeds, from `seed` on.

    Args:
      reader, inputs, seed: as above.
      seconds: that one input may take.
      most: seconds after which no further input is begun.
    """
    found, started = Count(), time.monotonic()
    for number in range(seed, seed + inputs):
        before = time.monotonic()
        if most is not None and before - started > most:
            break
        try:
            with within(seconds):
                accepted = feed(reader, Random(number))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # of Rust too, whose panics are no `Exception`
            found.escapes[number] = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            found.accepted += accepted
            found.refused += not accepted
        found.slowest = max(found.slowest, time.monotonic() - before)
    found.seconds = time.monotonic() - started
    return found


@dataclasses.dataclass(frozen=True)
class FuzzArgs:
    """Options of the command."""

    inputs: int = 100_000  # of each reader
    only: tuple[str, ...] = ()  # names of readers; all if none
    seed: int = 0  # of the first input
    seconds: float = 20.0  # that one input may take
    reader_seconds: float | None = None  # then the next reader's turn comes


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(FuzzArgs, argv, __doc__)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    escapes = 0
    with tempfile.TemporaryDirectory() as folder:
        readers = all_readers(Path(folder))
        if unknown := set(args.only) - set(readers):
            raise ConfigError(f"no reader {', '.join(unknown)}; there are: {', '.join(readers)}")
        print(HEADER, flush=True)
        for name in args.only or readers:
            found = count(readers[name], args.inputs, args.seed, args.seconds, args.reader_seconds)
            escapes += len(found.escapes)
            print(f"{name:<24}{found}", flush=True)
            for seed, problem in list(found.escapes.items())[:SHOWN]:
                print(f"  --seed {seed}: {problem}", flush=True)
    sys.exit(bool(escapes))


if __name__ == "__main__":
    main()
