"""Kills a small run again and again, lets it end, and compares it with one that nobody disturbed.

    python scripts/reliability/kill_runs.py --kills 500
    python scripts/reliability/kill_runs.py --kills 500 --everything

Final weights and every logged number must be bitwise identical, and each start must resume from the
newest checkpoint. Half of the kills come at any time after the start of the process, the others
while a checkpoint is being written. With --everything the run also draws scenes, trains a VQ, keeps
codes in the cache and evaluates, and kills are aimed at each of these (`kill_aims.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kill_aims import ALL, ANYWHERE, CHECKPOINTS, FEW, LONGEST, UNFINISHED, Aim

from htfa_jax.common.cli import parse


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
    """Final weights of a run, and what it logged of each step and scored, without times."""
    from htfa_jax.checkpoints.loading import load_run
    from htfa_jax.models.factory import build_model

    _, params, step, _ = load_run(workdir, lambda config: build_model(config).shapes)
    logged: dict[int, dict[str, float]] = {}
    for path in (workdir / "logs/metrics.jsonl", *workdir.glob("vq/*/logs/metrics.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            logged.setdefault(row["step"], {}).update(
                {k: v for k, v in row.items() if "/" in k and "per_second" not in k}
            )
    for path in workdir.glob("evaluation/*/metrics.json"):
        logged[-1] = {path.parent.name: json.loads(path.read_text(encoding="utf-8"))}
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


def kill_once(
    runs: Runs, config: Path, workdir: Path, longest: float, aim: Aim, rng: random.Random
) -> str:
    """Starts the run and kills it: name of the aim, or of none; "" if it came to its end before."""
    delay, before = rng.uniform(0, longest), newest_steps(workdir)
    with runs.started(config, workdir, *flags_of(workdir)) as process:
        started = time.monotonic()
        if aim is ANYWHERE:
            process.join(delay)
        else:
            aim.wait(process, workdir, cache_of(workdir), rng)
        ended = not process.is_alive()
        if ended and process.exitcode != 0:
            raise AssertionError(f"exit {process.exitcode}: {runs.said()[-3000:]}")
        if time.monotonic() - started > LONGEST:
            raise AssertionError(f"it hangs: {runs.said()[-3000:]}")
    nothing_was_lost(workdir, before)
    if ended:
        return ""
    return aim.name if aim.hits is None or aim.hits(workdir) else ANYWHERE.name


def cache_of(workdir: Path) -> Path:
    """A run has a cache of its own, so that all of it is made again."""
    return workdir.with_name(workdir.name + "-cache")


def flags_of(workdir: Path) -> list[str]:
    """What the command line adds to the configuration."""
    return [f"--config.data.cache_dir={cache_of(workdir)}"]


def newest_steps(workdir: Path) -> dict[str, tuple[int, int]]:
    """By stage: the newest complete step, and how often the log says that it goes on from one."""
    log = workdir / "logs/train.log"
    text = log.read_text(errors="replace") if log.is_file() else ""
    folders = {"": workdir / CHECKPOINTS, "vq: ": next(workdir.glob(f"vq/*/{CHECKPOINTS}"), None)}
    found = {}
    for stage, folder in folders.items():
        names = [p.name for p in folder.iterdir()] if folder and folder.is_dir() else []
        steps = [int(name) for name in names if name.isdigit()]
        found[stage] = max(steps, default=0), len(going_on(text, stage))
    return found


def going_on(text: str, stage: str) -> list[int]:
    """Steps that a log says a stage goes on from."""
    return [int(s) for s in re.findall(rf"^\S+ {stage}resuming from step (\d+)$", text, re.M)]


def nothing_was_lost(workdir: Path, before: dict[str, tuple[int, int]]) -> None:
    """Raises AssertionError unless a start went on from the newest step that there was."""
    log = workdir / "logs/train.log"
    text = log.read_text(errors="replace") if log.is_file() else ""
    for stage, (newest, said) in before.items():
        begun = going_on(text, stage)[said:]
        if any(step != newest for step in begun):
            raise AssertionError(f"{stage}step {newest} was there, and it went on from {begun}")
        if newest_steps(workdir)[stage][0] < newest:
            raise AssertionError(f"{stage}step {newest} was there and is gone")
    aside = workdir / "damaged"
    if aside.exists():
        raise AssertionError(f"a kill damaged a checkpoint: {sorted(aside.iterdir())}")


def undisturbed(runs: Runs, config: Path, folder: Path, *flags: str) -> tuple[tuple, float]:
    """What comes of a run that nobody disturbs, and the seconds that it takes once compiled.

    Raises AssertionError if two such runs differ.
    """
    runs.finish(config, folder / "first", *flags_of(folder / "first"), *flags)
    compiled = time.monotonic()
    runs.finish(config, folder / "second", *flags_of(folder / "second"), *flags)
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
    aims: Sequence[Aim] = FEW,
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
      aims: what to kill it at, each as often.

    Returns:
      How many kills there were of each kind, how many runs came to their end, and how many times
      a kill left a checkpoint unfinished.

    Raises:
      AssertionError: naming what differs.
    """
    rng = random.Random(seed)
    counts = {**{aim.name: 0 for aim in aims}, "ends": 0, "unfinished": 0}
    while True:
        done = sum(counts[aim.name] for aim in aims)
        how = ""
        if done < kills:
            how = kill_once(runs, config, workdir, longest, rng.choice(aims), rng)
            counts["unfinished"] += any((workdir / CHECKPOINTS).glob(UNFINISHED))
        else:
            before = newest_steps(workdir)
            runs.finish(config, workdir, *flags_of(workdir))
            nothing_was_lost(workdir, before)
        if how:
            counts[how] += 1
            print(f"kill {done + 1}: {how}, {steps_of(workdir)}", flush=True)
            continue
        counts["ends"] += 1
        if wrong := differences(expected, outcome(workdir)):
            raise AssertionError(f"after {done} kills these differ: {wrong[:9]}")
        print(f"end {counts['ends']}: all the same after {done} kills, {counts}", flush=True)
        shutil.rmtree(workdir)
        shutil.rmtree(cache_of(workdir), ignore_errors=True)
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
    everything: bool = False  # with scenes, VQ stage, caches and evaluations, and aimed kills


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(KillArgs, argv, __doc__)
    sys.path[:0] = [str(Path(__file__).parents[2] / "tests")]
    from support import write_dataset, write_kill_config, write_whole_kill_config

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "config.json"
        if args.everything:
            config = write_whole_kill_config(path)
        else:
            config = write_kill_config(path, write_dataset(folder / "data", 7))
        runs = Runs(folder / "runs")
        expected, longest = undisturbed(runs, config, folder)
        print(f"an undisturbed run takes {longest:.1f} s", flush=True)
        aims = ALL if args.everything else FEW
        run = folder / "run"
        print(survive(runs, config, run, expected, longest, args.kills, args.seed, aims))


if __name__ == "__main__":
    main()
