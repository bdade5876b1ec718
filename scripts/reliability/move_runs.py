"""Stops a small run, copies it elsewhere, and tells what of its end is the same there.

    python scripts/reliability/move_runs.py

Elsewhere is another folder, another home, an empty cache, all of these, one processor, and eight
devices instead of one with the same samples in each step. The first must be the same bit for
bit; devices add up in another order, so that there the difference is told.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from kill_runs import CHECKPOINTS, Runs, differences, flags_of, nothing, outcome, undisturbed

from htfa_jax.common.cli import parse

DEVICES, SAMPLES = 8, 8


def environment(**variables: str) -> None:
    """Sets variables of this process, which has not looked for devices yet."""
    os.environ.update(variables)


def one_processor() -> None:
    """Lets this process use one processor only."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of a run that went on elsewhere.

    Attributes:
      where: it went on.
      same: whether weights and numbers are the same bit for bit.
      difference: of all weights, relative to the weights (root of the sums of squares).
    """

    where: str
    same: bool
    difference: float


def stop_after_a_save(runs: Runs, config: Path, workdir: Path, *flags: str) -> None:
    """Begins a run and stops it by SIGTERM when a checkpoint is complete."""
    with runs.started(config, workdir, *flags) as process:
        while process.is_alive() and not list(workdir.glob(f"{CHECKPOINTS}/[0-9]")):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        if process.exitcode != 0:
            raise AssertionError(f"exit {process.exitcode}: {runs.said()[-3000:]}")


def moved(runs: Runs, config: Path, folder: Path, only: Sequence[str] = ()) -> Iterator[Row]:
    """Lets copies of a stopped run go on; yields what came of each.

    Args:
      runs: starts it.
      config: what it trains.
      folder: for all of it.
      only: names of the places; all without one.
    """
    size = f"--config.train.batch_size={SAMPLES}"
    expected, _ = undisturbed(runs, config, folder / "calm", size)
    begun = folder / "begun" / "run"
    stop_after_a_save(runs, config, begun, size, *flags_of(begun))
    copy = shutil.copytree(begun, folder / "copy")
    here = [size, *flags_of(begun)]
    home = functools.partial(environment, HOME=str(folder / "home"), XDG_CACHE_HOME="/proc/none")
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    devices = functools.partial(environment, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flag}")
    empty = [size, f"--config.data.cache_dir={folder / 'empty'}"]
    one = [f"--config.train.batch_size={SAMPLES // DEVICES}", *here[1:]]
    for where, flags, prepare in (
        ("the same folder", here, nothing),
        ("another folder", here, nothing),
        ("another home", here, home),
        ("an empty cache", empty, nothing),
        ("one processor", here, one_processor),
        ("all of these", [size, f"--config.data.cache_dir={folder / 'empty2'}"], home),
        (f"{DEVICES} devices, {SAMPLES // DEVICES} sample on each", one, devices),
    ):
        if only and where not in only:
            continue
        place = begun
        if where != "the same folder":
            place = folder / where.replace(" ", "_").replace(",", "") / "and" / "on"
            shutil.copytree(copy, place)
        runs.finish(config, place, *flags, prepare=prepare)
        found = outcome(place)
        yield Row(where, not differences(expected, found), difference(expected[0], found[0]))


def difference(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """Distance of two sets of weights, relative to the first.

    Not the largest of single ones: some have gradients that are rounding alone, of which Adam makes
    steps of full size.
    """
    distance = sum(np.sum((found[path] - x).astype(float) ** 2) for path, x in expected.items())
    return float(np.sqrt(distance / sum(np.sum(x.astype(float) ** 2) for x in expected.values())))


@dataclasses.dataclass(frozen=True)
class MoveArgs:
    """The command has no options."""


def main() -> None:
    """Command line."""
    parse(MoveArgs, None, __doc__)
    sys.path[:0] = [str(Path(__file__).parents[2] / "tests")]
    from support import write_dataset, write_kill_config

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_kill_config(folder / "config.json", write_dataset(folder / "data", 7))
        print("| went on in | bit for bit | difference of the weights |\n| --- | --- | --- |")
        for row in moved(Runs(folder / "runs"), config, folder):
            same = "yes" if row.same else "no"
            print(f"| {row.where} | {same} | {row.difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
