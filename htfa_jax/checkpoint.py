"""Lists the checkpoints of a run.

    python -m htfa_jax.checkpoint runs/a             # step, time, size, metrics
    python -m htfa_jax.checkpoint runs/a --verify    # reads all their bytes
    python -m htfa_jax.checkpoint runs/a --keep 2    # keeps the best and the newest two

Exits with 1 if --verify finds damage.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from htfa_jax.checkpoints import integrity
from htfa_jax.checkpoints.lock import lock
from htfa_jax.checkpoints.runs import run_config
from htfa_jax.common.cli import command, parse
from htfa_jax.errors import ConfigError

log = logging.getLogger("htfa_jax.checkpoint")  # by name: this module is run as __main__ too


@dataclasses.dataclass(frozen=True)
class CheckpointArgs:
    """Options of the command."""

    run: tyro.conf.Positional[Path]  # its workdir
    verify: bool = False  # read all bytes and compare them with their hashes
    keep: int | None = None  # delete all but the best and so many of the newest


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line: exits with 1 if `--verify` finds damage."""
    args = parse(CheckpointArgs, argv, __doc__)
    if args.keep is not None and args.keep < 1:
        raise ConfigError(f"--keep {args.keep}: at least one checkpoint stays")
    found = integrity.listing(args.run)
    train = run_config(args.run).train
    best = integrity.best(found, train.best_metric, train.best_mode)
    notes = {}
    if args.verify:
        problems = {s.folder: integrity.damage(s.folder) for s in found if s.step is not None}
        notes = {f: f"DAMAGED: {p}" if p else "sound" for f, p in problems.items()}
    if args.keep is not None:
        with lock(args.run):
            for gone in integrity.prune(found, args.keep, best):
                log.info("deleted %s", gone.folder)
        found = integrity.listing(args.run)
    print(integrity.checkpoint_table(found, best, notes))
    if any(note != "sound" for note in notes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
