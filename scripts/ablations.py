"""Trains the ablations and baselines under one budget and says what each level is worth.

    python scripts/ablations.py --out DIR                      # 9 variants, 3 seeds, debug's budget
    python scripts/ablations.py --out DIR --minutes 5 --seeds 1
    python scripts/ablations.py --out DIR --variants full no_level1 --steps 300

The same command resumes a stopped one. DIR gets `RESULTS.md` (tables), `ablations.png` and
`runs/VARIANT/seed_N/`; runs go side by side on several GPUs (`--per_gpu 8`: eight share each, for a
small run leaves most of a large GPU idle; they take turns on it unless `nvidia-cuda-mps-control -d`
lets them work at the same time), one after the other elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ablation import report
from ablation.one_run import ABLATIONS, BASELINES, BUDGET, FULL, RESULT, VARIANTS, workdir_of

from htfa_jax.common.cli import command, parse
from htfa_jax.common.files import write_whole
from htfa_jax.common.logs import progress
from htfa_jax.errors import ConfigError, TrainingError
from htfa_jax.training.loop import duration

# Steps that are timed to turn minutes into a number of steps; the first half compiles.
TIMED_STEPS = 20
DEVICES = "import jax; print(jax.default_backend(), jax.local_device_count())"

log = logging.getLogger("htfa_jax.ablations")

Job = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class AblationArgs:
    """Trains and evaluates variants of a configuration under one budget, and compares them."""

    out: Path  # where everything goes
    seeds: int = 3  # of weights, data order and dropout
    steps: int | None = None  # updates of each run (default: as many as the base has)
    minutes: float | None = None  # or: as many as the full structure makes in this time here
    variants: tuple[str, ...] = (*ABLATIONS, *BASELINES)  # which
    base: str = "debug"  # the configuration that the variants change
    stress_scenes: int = 200  # test scenes with a wrong reconstruction, of each kind
    per_gpu: int = 1  # runs at a time on each GPU


def budget(args: AblationArgs) -> dict[str, Any]:
    """What all runs share, kept in DIR. Raises ConfigError if DIR was begun with another."""
    path = args.out / BUDGET
    wanted = {"base": args.base, "steps": args.steps, "stress_scenes": args.stress_scenes}
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if found is None:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.minutes is not None:
            wanted["steps"] = steps_in(args.minutes, args)
        write_whole(path, json.dumps(wanted, indent=2) + "\n")
        return wanted
    if args.minutes is not None:
        wanted["steps"] = found["steps"]
    if found != wanted:
        raise ConfigError(f"{args.out} was begun with {found}, not {wanted}: use another --out")
    return found


def steps_in(minutes: float, args: AblationArgs) -> int:
    """Updates that the full structure makes in a time, by a short run."""
    folder = args.out / "timing"
    folder.mkdir(exist_ok=True)
    timed = {"base": args.base, "steps": TIMED_STEPS, "stress_scenes": 1}
    write_whole(folder / BUDGET, json.dumps(timed) + "\n")
    with started(folder, (FULL, 0), {}) as process:
        process.wait()
    lines = workdir_of(folder, FULL, 0) / "logs" / "metrics.jsonl"
    if process.returncode or not lines.is_file():
        raise TrainingError(f"the run that takes the time failed: see {folder / 'output.txt'}")
    last = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()][-1]
    settings = json.loads((workdir_of(folder, FULL, 0) / "config.json").read_text("utf-8"))
    samples = settings["train"]["batch_size"] * settings["train"]["accumulation_steps"]
    return max(1, round(60 * minutes * last["train/samples_per_second"] / samples))


def places(per_gpu: int) -> list[dict[str, str]]:
    """Environments of runs that can go side by side: so many for each GPU, one elsewhere."""
    asked = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True)
    if asked.returncode:
        raise TrainingError(f"JAX finds no device: {asked.stderr[-500:]}")
    backend, count = asked.stdout.split()
    if backend != "gpu":
        return [{}]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(int(count)))))
    # At most so much, and only as it is needed: every process's CUDA takes some besides.
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / per_gpu:.3f}"}
    share |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if per_gpu > 1 else {}
    return [{"CUDA_VISIBLE_DEVICES": name, **share} for name in seen.split(",")] * per_gpu


def started(out: Path, job: Job, place: dict[str, str]) -> subprocess.Popen:
    """A process that makes one run; what it prints goes to a file beside the run."""
    workdir = workdir_of(out, *job)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).parent / "ablation" / "one_run.py"
    with (out / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(script), str(out), job[0], str(job[1])],
            env={**os.environ, **place},
            stdout=output,
            stderr=output,
        )


def run_all(out: Path, jobs: Sequence[Job], free: list[dict[str, str]]) -> list[Job]:
    """Makes runs, as many at a time as there are places; returns those that failed."""
    waiting, failed, running = list(jobs), [], {}
    with progress(len(jobs), "ablations", unit="run") as bar, stopping(running):
        while waiting or running:
            while waiting and free:
                job, place = waiting.pop(0), free.pop(0)
                log.info("%s, seed %d: begins", *job)
                running[job] = started(out, job, place), place, time.time()
            time.sleep(0.2)
            for job, (process, place, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                free.append(place)
                bar.update(1)
                done = (workdir_of(out, *job) / RESULT).is_file()
                said = "done" if done else f"FAILED, see {out / 'output.txt'}"
                left = len(waiting) + len(running)
                log.info("%s, seed %d: %s in %s, %d left", *job, said, _since(since), left)
                if not done:
                    failed.append(job)
    return failed


def _since(start: float) -> str:
    return duration(time.time() - start)


@contextlib.contextmanager
def stopping(running: dict[Job, tuple]) -> Iterator[None]:
    """While active, SIGTERM is Ctrl-C; runs that go on in the end are asked to save and stop."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()


def jobs(args: AblationArgs) -> Iterator[Job]:
    """All variants of the first seed, then of the next."""
    unknown = sorted(set(args.variants) - set(VARIANTS))
    if unknown:
        raise ConfigError(f"no variant {unknown[0]}; there are {', '.join(VARIANTS)}")
    for seed in range(args.seeds):
        for variant in args.variants:
            yield variant, seed


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(AblationArgs, argv, __doc__)
    if args.steps is not None and args.minutes is not None:
        raise ConfigError("--steps and --minutes are both given: one of them is the budget")
    if args.per_gpu < 1:
        raise ConfigError(f"--per_gpu={args.per_gpu} must be at least 1")
    wanted = list(jobs(args))
    shared = budget(args)
    left = [job for job in wanted if not (workdir_of(args.out, *job) / RESULT).is_file()]
    log.info("%d runs, %d of them done", len(wanted), len(wanted) - len(left))
    failed = run_all(args.out, left, places(args.per_gpu)) if left else []
    report.write(args.out, args.variants, shared)
    print((args.out / report.TABLES).read_text(encoding="utf-8"))
    if failed:
        names = ", ".join(f"{variant} seed {seed}" for variant, seed in failed)
        raise TrainingError(f"these runs failed, the same command tries them again: {names}")


if __name__ == "__main__":
    main()
