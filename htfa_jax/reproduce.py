"""Runs a training step again whose loss or gradient was not finite, and looks for its cause.

    python -m htfa_jax.reproduce runs/a/nonfinite/step_1234

The error of the run that stopped names this folder. Exits with 1 if all is finite this time.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from htfa_jax.common.cli import command, parse
from htfa_jax.sharding.processes import Distributed, is_first


@dataclasses.dataclass(frozen=True)
class ReproduceArgs:
    """Options of the command."""

    dump: tyro.conf.Positional[Path]  # RUN/nonfinite/step_STEP
    distributed: Distributed = Distributed()  # as many processes as the run had


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line: exits with 1 if everything is finite this time."""
    args = parse(ReproduceArgs, argv, __doc__)
    args.distributed.connect()
    from htfa_jax.training.reproduction import metrics_text, reproduce

    again, alone = reproduce(args.dump)
    if is_first():
        print(f"the batch again: {metrics_text(again)}")
        for name, metrics in alone.items():
            print(f"record {name} in all its places: {metrics_text(metrics)}")
    if again["finite"]:
        print("finite this time: were the configuration or the data changed?")
        sys.exit(1)


if __name__ == "__main__":
    main()
