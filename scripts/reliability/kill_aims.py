"""Moments of a run to kill it at, told by the files and log lines that appear.

An aim waits until what it looks for is there, and a little longer. Nothing in the package helps it.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKPOINTS, UNFINISHED = "checkpoints", "*.orbax-checkpoint-tmp*"
# Seconds after which a process that shows nothing hangs.
LONGEST = 300


@dataclasses.dataclass(frozen=True)
class Aim:
    """What to wait for.

    Attributes:
      name: in the counts.
      signs: from the workdir and the cache to what can be seen; what is new there is the moment.
      after: seconds more at most.
      hits: from the workdir, after the kill, to whether it came when it should; None always.
    """

    name: str
    signs: Callable[[Path, Path], set[str]]
    after: float
    hits: Callable[[Path], bool] | None = None

    def wait(self, process: Any, workdir: Path, cache: Path, rng: random.Random) -> None:
        """Returns when the moment has come, or when the process has ended."""
        before, end = self.signs(workdir, cache), time.monotonic() + LONGEST
        while process.is_alive() and time.monotonic() < end:
            if self.signs(workdir, cache) - before:
                time.sleep(rng.uniform(0, self.after))
                return
            time.sleep(0.001)


def _names(folder: Path, pattern: str) -> set[str]:
    try:
        return {str(path) for path in folder.glob(pattern)}
    except OSError:  # a folder went while it was looked through
        return set()


def _lines(path: Path, pattern: str) -> set[str]:
    """Places of the lines that match: the same line may come again."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    return {str(found.start()) for found in re.finditer(pattern, text, re.M)}


def _in_evaluation(workdir: Path) -> bool:
    """Whether the last step that was reported is an evaluated one whose metrics are not there."""
    steps = re.findall(r"train step (\d+)/", (workdir / "logs/train.log").read_text())
    path = workdir / "logs/metrics.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines() if x.endswith("}")]
    seen = [x["step"] for x in lines if "validation/loss" in x]
    return bool(steps) and int(steps[-1]) % 4 == 0 and int(steps[-1]) not in seen


ANYWHERE = Aim("anywhere", lambda *_: set(), 0)
SAVING = Aim("saving", lambda run, _: _names(run / CHECKPOINTS, UNFINISHED), 0.03)
HASHES = Aim(  # written last before the checkpoint takes its name
    "hashes", lambda run, _: _names(run / CHECKPOINTS, f"{UNFINISHED}/*hashes.json*"), 0.004
)
COMPLETE = Aim("complete", lambda run, _: _names(run / CHECKPOINTS, "[0-9]*[0-9]"), 0.01)
SCENES = Aim("scenes", lambda _, cache: _names(cache, "held_objects/*/*/meta/*.json"), 0.05)
VQ = Aim("vq", lambda run, _: _lines(run / "logs/train.log", r"vq step \d"), 0.3)
VQ_SAVING = Aim("vq saving", lambda run, _: _names(run, f"vq/*/{CHECKPOINTS}/{UNFINISHED}"), 0.03)
ENCODING = Aim("encoding", lambda _, cache: _names(cache, "encoded/.*"), 0.05)
EVALUATION = Aim(
    "evaluation",
    lambda run, _: _lines(run / "logs/train.log", r"train step (4|8|12)/"),
    0.2,
    _in_evaluation,
)
FEW = (ANYWHERE, SAVING)
ALL = (ANYWHERE, SAVING, HASHES, COMPLETE, SCENES, VQ, VQ_SAVING, ENCODING, EVALUATION)
