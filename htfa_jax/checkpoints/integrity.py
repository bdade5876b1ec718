"""What is on disk of a run's checkpoints: complete or not, sound or damaged, which to keep.

A checkpoint is a folder whose name is its step. It takes that name when it is complete, and then
holds `hashes.json`: the SHA-256 of each of its files, because Orbax reads changed bytes without
a word. Reading here runs nothing and leaves the folder for no name that a file contains.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from htfa_jax.checkpoints.runs import CHECKPOINTS
from htfa_jax.common.files import write_whole
from htfa_jax.common.hashing import file_sha256
from htfa_jax.common.json_files import read_json
from htfa_jax.config.renamed import METRICS, with_current_names
from htfa_jax.errors import CheckpointError

log = logging.getLogger(__name__)

HASHES, DAMAGED, LATER = "hashes.json", "damaged", "later"
# Orbax writes these when it gives a checkpoint its name, after the hashes; no weights in them.
METADATA = "_CHECKPOINT_METADATA"
_COMMIT = (METADATA, "commit_success.txt")
# What Orbax takes in the first; of anything else it does not open the run's other checkpoints.
_FACTS: dict[str, type | tuple[type, ...]] = {
    "item_handlers": (dict, str, type(None)),
    "performance_metrics": (dict, type(None)),
    "custom_metadata": (dict, type(None)),
    "init_timestamp_nsecs": (int, type(None)),
    "commit_timestamp_nsecs": (int, type(None)),
}
_LAST_YEAR = 9999
# Metrics of an evaluation that was interrupted and made up for: they come before their hash.
LATE = "metrics/metrics"
# What is looked at of checkpoints that are not restored: metrics and descriptions.
SMALL = 2**20


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk.

    Attributes:
      folder: where it is.
      step: its step; None of one that was never completed.
      time: when it was completed, in seconds; begun, of one that was not.
      size: bytes.
      metrics: of its evaluation, empty without one.
    """

    folder: Path
    step: int | None
    time: float
    size: int
    metrics: dict[str, float] = field(default_factory=dict)


def write_hashes(folder: Path) -> None:
    """Hashes all files of a checkpoint that is complete but for its name."""
    names = [name for name in _files(folder) if name not in _COMMIT]
    # Durable: after a power cut the checkpoint would be there, and its hashes empty.
    write_whole(folder / HASHES, json.dumps(_hashes(folder, names), indent=1), durable=True)


def damage(folder: Path, up_to: int | None = None) -> str | None:
    """What is wrong with a checkpoint, None if nothing is.

    Args:
      folder: of a complete checkpoint.
      up_to: read only files of at most so many bytes; None reads all.
    """
    try:
        expected = _read_hashes(folder)
        there = {name: size for name, size in _files(folder).items() if name != HASHES}
        if METADATA in there:
            _check_metadata(folder / METADATA)
        if expected is None:
            needed = [name for name in ("meta", "params") if not (folder / name).is_dir()]
            if needed:
                return f"{' and '.join(needed)} and {HASHES} are missing"
            log.warning("%s has no %s: whether it is sound cannot be told", folder, HASHES)
            return None
        if missing := sorted(set(expected) - set(there)):
            return f"{', '.join(missing[:5])} of its {len(expected)} files are missing"
        if unknown := sorted(set(there) - set(expected) - {*_COMMIT, LATE}):
            return f"{', '.join(unknown[:5])} does not belong to it"
        read = [name for name in expected if up_to is None or there[name] <= up_to]
        found = _hashes(folder, read)
        if changed := [name for name in read if found[name] != expected[name]]:
            return f"{', '.join(changed[:5])} was altered: its hash differs"
    except (OSError, ValueError, CheckpointError) as error:
        return str(error)
    return None


def _check_metadata(path: Path) -> None:
    """Raises CheckpointError if Orbax would not read a checkpoint's metadata."""
    found = read_json(path, CheckpointError, allow_nan=True)
    for name, kinds in _FACTS.items():
        value = found.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise CheckpointError(f"{path.name} was altered: {name} in it is {value!r:.50}")
        if isinstance(value, int) and not 0 <= value < (_LAST_YEAR - 1970) * 365 * 86400 * 10**9:
            raise CheckpointError(f"{path.name} was altered: {name} in it is no time: {value}")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint. Raises ValueError for what none holds: links."""
    return _hashes(folder, list(_files(folder)))


def add_hash(folder: Path, name: str) -> None:
    """Adds a file that came later to the hashes of a checkpoint, which has some."""
    hashes = _read_hashes(folder)
    if hashes is not None:
        content = json.dumps({**hashes, name: file_sha256(folder / name)}, indent=1)
        write_whole(folder / HASHES, content, durable=True)


def _read_hashes(folder: Path) -> dict[str, str] | None:
    path = folder / HASHES
    if not path.exists():
        return None
    content = read_json(path, CheckpointError)
    if not all(isinstance(value, str) for value in content.values()):
        raise ValueError(f"{HASHES} does not hold hashes by file")
    return content


def _files(folder: Path) -> dict[str, int]:
    """Sizes of all files by name. Raises ValueError for what checkpoints do not hold: links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ValueError(f"{name} is a link, which a checkpoint does not hold")
        if path.is_file():
            found[name] = path.stat().st_size
    return found


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    # Threads: hashing leaves the interpreter to others, and disks like several readers.
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        paths = [folder / name for name in names]
        return dict(zip(names, pool.map(file_sha256, paths), strict=True))


def steps(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, rising."""
    folder = workdir / CHECKPOINTS
    names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if _is_step(name))


def misnamed(workdir: Path) -> list[str]:
    """Names that Orbax takes for steps whose folders it then does not find: 0008."""
    folder = workdir / CHECKPOINTS
    names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return sorted(name for name in names if name.isdigit() and not _is_step(name))


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name


def set_damaged_aside(workdir: Path) -> None:
    """Makes the newest complete checkpoint one that is sound, and says so if it was not.

    It is read whole, of the others only what Orbax looks at when it opens a run. Damaged ones
    move to `damaged/`: nothing is deleted.

    Raises:
      CheckpointError: none of the run's checkpoints is sound.
    """
    found = list(reversed(steps(workdir)))
    damaged = {
        name: "its name is not how its step is written: rename it, if it is to be used"
        for name in misnamed(workdir)
    }
    newest = None
    for step in found:
        folder = workdir / CHECKPOINTS / str(step)
        problem = damage(folder, None if newest is None else SMALL)
        if problem is None:
            newest = step if newest is None else newest
        else:
            damaged[str(step)] = problem
    if damaged and newest is None:
        lines = [f"step {name}: {problem}" for name, problem in damaged.items()]
        raise CheckpointError(
            f"no checkpoint in {workdir / CHECKPOINTS} is sound:\n  " + "\n  ".join(lines) + "\n"
            "Nothing was changed. Bring one back from a copy, or use another --workdir"
        )
    for name, problem in damaged.items():
        set_aside(workdir, name, problem)
    if newest is not None and newest != max(found):
        log.warning("the newest sound checkpoint is used instead: step %d", newest)


def set_aside(workdir: Path, name: str, problem: str) -> None:
    """Moves a checkpoint to `damaged/`, and says why. Raises OSError."""
    target = workdir / DAMAGED / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    target.parent.mkdir(exist_ok=True)
    while target.exists():  # set aside in this very second too
        target = target.with_name(target.name + "-again")
    (workdir / CHECKPOINTS / name).rename(target)
    log.warning("checkpoint %s is damaged: %s. It is now %s", name, problem, target)


def go_back(workdir: Path, step: int) -> None:
    """Moves the checkpoints behind a step to `later/`, so that the run goes on at that step.

    For the process that trains in the workdir. Raises CheckpointError if there is no such step.
    """
    there = steps(workdir)
    if step not in there:
        known = ", ".join(map(str, there)) or "none"
        raise CheckpointError(
            f"--resume_step {step}: {workdir} has no such checkpoint; it has {known}"
        )
    for later in [s for s in there if s > step]:
        target = workdir / LATER / f"{later}-{time.strftime('%Y%m%d-%H%M%S')}"
        target.parent.mkdir(exist_ok=True)
        while target.exists():
            target = target.with_name(target.name + "-again")
        (workdir / CHECKPOINTS / str(later)).rename(target)
        log.info("going back to step %d: checkpoint %d is now %s", step, later, target)


def listing(workdir: Path) -> list[Saved]:
    """All checkpoints of a run: those that were begun and not completed first, then by step."""
    folder = workdir / CHECKPOINTS
    if not folder.is_dir():
        raise CheckpointError(f"{workdir} is not a run: there is no {CHECKPOINTS}/ in it")
    complete = steps(workdir)
    begun = [p for p in folder.iterdir() if p.is_dir() and ".orbax-checkpoint-tmp" in p.name]
    return [_saved(path, None) for path in sorted(begun)] + [
        _saved(folder / str(step), step) for step in complete
    ]


def _saved(folder: Path, step: int | None) -> Saved:
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    metadata = _facts(folder / METADATA)
    nanoseconds = metadata.get("commit_timestamp_nsecs")
    if not isinstance(nanoseconds, int) or not 0 <= nanoseconds < 2**63:
        nanoseconds = folder.stat().st_mtime_ns
    metrics = with_current_names(METRICS, _facts(folder / LATE))
    metrics = {k: v for k, v in metrics.items() if isinstance(v, float)}
    return Saved(folder, step, nanoseconds / 1e9, sum(sizes), metrics)


def _facts(path: Path) -> dict[str, Any]:
    """What a small file of a checkpoint says; {} if it cannot be read (`damage` tells why)."""
    with contextlib.suppress(CheckpointError):
        return read_json(path, CheckpointError, allow_nan=True)
    return {}


def best(found: list[Saved], metric: str, mode: Literal["min", "max"]) -> Saved | None:
    """The checkpoint of the best value of a metric, None if none has one that is finite."""
    finite = [s for s in found if math.isfinite(s.metrics.get(metric, math.nan))]
    scored = [s for s in finite if s.step is not None]
    sign = 1 if mode == "min" else -1
    return min(scored, key=lambda s: sign * s.metrics[metric], default=None)


def prune(found: list[Saved], keep: int, spared: Saved | None) -> Iterator[Saved]:
    """Deletes what was never completed and all but the newest checkpoints; yields what is gone.

    Args:
      found: as `listing` gives it, of a run that nothing trains.
      keep: complete ones that stay.
      spared: one more that stays.
    """
    complete = [s for s in found if s.step is not None]
    stay = complete[max(len(complete) - keep, 0) :] + ([spared] if spared else [])
    for saved in found:
        if saved not in stay:
            shutil.rmtree(saved.folder)
            yield saved


def checkpoint_table(found: list[Saved], spared: Saved | None, notes: dict[Path, str]) -> str:
    """A run's checkpoints as text.

    Args:
      found: as `listing` gives it.
      spared: the best.
      notes: what was found out about some, by folder.
    """
    lines = [f"{'step':>10}  {'completed':<19}  {'size':>10}  metric"]
    for saved in found:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved.time))
        said = [f"{name} {value:.4f}" for name, value in saved.metrics.items()]
        said += ["best"] if saved == spared else []
        said += [notes[saved.folder]] if saved.folder in notes else []
        if saved.step is None:
            name, said = "-", [f"not complete: {saved.folder.name}"]
        else:
            name = str(saved.step)
        size = f"{saved.size / 2**20:,.1f} MiB"
        lines.append(f"{name:>10}  {when:<19}  {size:>10}  {'  '.join(said)}".rstrip())
    return "\n".join(lines)
