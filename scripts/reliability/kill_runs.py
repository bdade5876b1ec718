"""Kills a small run again and again, lets it end, and compares it with one that nobody disturbed.

    python scripts/reliability/kill_runs.py --kills 500

Final weights and every logged number must be bitwise identical. Half of the kills come at any
time after the start of the process, the others while a checkpoint is being written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from htfa_jax.common.cli import parse

CHECKPOINTS, UNFINISHED = "checkpoints", "*.orbax-checkpoint-tmp*"


def clock_ahead(seconds: float) -> None:
    """Sets this process's clock, as far as Python asks for it."""
    now, nanoseconds = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: nanoseconds() + int(seconds * 1e9)


def no_file_above(size: int) -> None:
    """Lets this process write files of at most so many bytes, as if the disk were full then."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def child(argv: list[str], output: Path, prepare: Callable[[], None]) -> None:
    """Trains in this process, forked from one that has imported everything.

    Args:
      argv: of `htfa_jax.train`.
      output: file that gets what it prints.
      prepare: called before.
    """
    with output.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    prepare()
    from htfa_jax.train import main

    main(argv)


def nothing() -> None:
    """Prepares a process for nothing in particular."""


class Runs:
    """Starts training processes quickly: they are forked from one that has imported everything.

    Args:
      folder: for the compiled programs and what the processes print.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            [
                "htfa_jax.training.trainer",
                "weights_convert.on_demand",
                "tensorboardX",
                "tensorstore",
            ]
        )

    @contextlib.contextmanager
    def started(
        self, config: Path, workdir: Path, *flags: str, prepare: Callable[[], None] = nothing
    ) -> Iterator[Any]:
        """A process that trains; killed if it is still there in the end."""
        argv = ["--config", str(config), "--workdir", str(workdir), *flags]
        process = self._context.Process(
            target=child, args=(argv, self.output, prepare), daemon=True
        )
        process.start()
        try:
            yield process
        finally:
            process.kill()
            process.join()

    def finish(self, config: Path, workdir: Path, *flags: str, **how: Any) -> None:
        """Trains to the end. Raises AssertionError with what was printed if that fails."""
        with self.started(config, workdir, *flags, **how) as process:
            process.join(300)
            if process.exitcode != 0:
                raise AssertionError(f"exit {process.exitcode}: {self.said()[-3000:]}")

    @property
    def output(self) -> Path:
        """What the processes printed."""
        return self.folder / "output.txt"

    def said(self) -> str:
        """What the processes printed, as text."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def outcome(workdir: Path) -> tuple[dict[str, np.ndarray], dict[int, dict[str, float]]]:
    """Final weights of a run, and what it logged of each step, without times."""
    from htfa_jax.checkpoints.loading import load_run
    from htfa_jax.models.factory import build_model

    _, params, step, _ = load_run(workdir, lambda config: build_model(config).shapes)
    logged: dict[int, dict[str, float]] = {}
    for line in (workdir / "logs/metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        logged.setdefault(row["step"], {}).update(
            {k: v for k, v in row.items() if "/" in k and "per_second" not in k}
        )
    weights = {path: np.asarray(value) for path, value in params.items()}
    return {**weights, "step": np.asarray(step)}, logged


def differences(expected: tuple, found: tuple) -> list[str]:
    """Names of what is not bitwise identical in two outcomes."""
    (weights, logged), (other_weights, other_logged) = expected, found
    names = [
        path
        for path in weights.keys() | other_weights.keys()
        if path not in weights
        or path not in other_weights
        or weights[path].tobytes() != other_weights[path].tobytes()
    ]
    steps = logged.keys() | other_logged.keys()
    return names + [f"step {s}" for s in sorted(steps) if logged.get(s) != other_logged.get(s)]


def kill_once(runs: Runs, config: Path, workdir: Path, longest: float, rng: random.Random) -> str:
    """Starts the run and kills it: "saving", "anywhere", or "" if it came to its end before."""
    aims, delay = rng.random() < 0.5, rng.uniform(0, longest)
    with runs.started(config, workdir) as process:
        started = time.monotonic()
        if aims:
            before = set((workdir / CHECKPOINTS).glob(UNFINISHED))
            while process.is_alive():
                if set((workdir / CHECKPOINTS).glob(UNFINISHED)) - before:
                    time.sleep(rng.uniform(0, 0.03))
                    break
                time.sleep(0.001)
        else:
            process.join(delay)
        ended = not process.is_alive()
        if ended and process.exitcode != 0:
            raise AssertionError(f"exit {process.exitcode}: {runs.said()[-3000:]}")
        if time.monotonic() - started > 300:
            raise AssertionError(f"it hangs: {runs.said()[-3000:]}")
    return "" if ended else "saving" if aims else "anywhere"


def undisturbed(runs: Runs, config: Path, folder: Path) -> tuple[tuple, float]:
    """What comes of a run that nobody disturbs, and the seconds that it takes once compiled.

    Raises AssertionError if two such runs differ.
    """
    runs.finish(config, folder / "first")
    compiled = time.monotonic()
    runs.finish(config, folder / "second")
    seconds = time.monotonic() - compiled
    expected = outcome(folder / "first")
    if wrong := differences(expected, outcome(folder / "second")):
        raise AssertionError(f"two undisturbed runs differ: {wrong[:9]}")
    return expected, seconds


def survive(
    runs: Runs,
    config: Path,
    workdir: Path,
    expected: tuple,
    longest: float,
    kills: int,
    seed: int = 0,
) -> dict[str, int]:
    """Kills a run, starts it again, and compares what comes of it with an undisturbed one.

    Args:
      runs: starts it.
      config: what it trains.
      workdir: where; a new run starts there whenever one comes to its end.
      expected: of an undisturbed run.
      longest: seconds that one takes.
      kills: how many.
      seed: of the moments.

    Returns:
      How many kills there were of each kind, how many runs came to their end, and how many times
      a kill left a checkpoint unfinished.

    Raises:
      AssertionError: naming what differs.
    """
    rng = random.Random(seed)
    counts = {"saving": 0, "anywhere": 0, "ends": 0, "unfinished": 0}
    while True:
        done = counts["saving"] + counts["anywhere"]
        how = ""
        if done < kills:
            how = kill_once(runs, config, workdir, longest, rng)
            counts["unfinished"] += any((workdir / CHECKPOINTS).glob(UNFINISHED))
        else:
            runs.finish(config, workdir)
        if how:
            counts[how] += 1
            print(f"kill {done + 1}: {how}, {steps_of(workdir)}", flush=True)
            continue
        counts["ends"] += 1
        if wrong := differences(expected, outcome(workdir)):
            raise AssertionError(f"after {done} kills these differ: {wrong[:9]}")
        shutil.rmtree(workdir)
        if done >= kills:
            return counts


def steps_of(workdir: Path) -> str:
    """Names in the folder of checkpoints."""
    folder = workdir / CHECKPOINTS
    return " ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "none"


@dataclasses.dataclass(frozen=True)
class KillArgs:
    """Options of the command."""

    kills: int = 500  # how often a run is killed
    seed: int = 0  # of the moments


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(KillArgs, argv, __doc__)
    sys.path[:0] = [str(Path(__file__).parents[2] / "tests")]
    from support import write_dataset, write_kill_config

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_kill_config(folder / "config.json", write_dataset(folder / "data", 7))
        runs = Runs(folder / "runs")
        expected, longest = undisturbed(runs, config, folder)
        print(f"an undisturbed run takes {longest:.1f} s", flush=True)
        print(survive(runs, config, folder / "run", expected, longest, args.kills, args.seed))


if __name__ == "__main__":
    main()
