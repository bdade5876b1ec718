"""Trains a VQ tokenizer on the images of a dataset; its weight folder is WORKDIR/weights.

    python -m htfa_jax.train_vq --config debug --workdir runs/vq
    python -m htfa_jax.train_vq --config debug --config.vq_train.num_steps=4000

The main job runs this stage first when no pretrained VQ is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from htfa_jax.checkpoints.runs import make_workdir, new_workdir
from htfa_jax.common.cli import command
from htfa_jax.config.io import ConfigFlags, parse_args


@dataclasses.dataclass(frozen=True)
class TrainVQArgs:
    """Options of the command."""

    config: ConfigFlags
    workdir: Path | None = None  # where it goes; what it holds is resumed (default: runs/vq_TIME)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse_args(TrainVQArgs, argv, description=__doc__)
    from htfa_jax.training.vq_stage import train_in

    workdir = make_workdir(args.workdir or new_workdir("vq"))
    folder = train_in(workdir, args.config)
    if folder is None:
        print(f"stopped; go on with --workdir {workdir}")
    else:
        print(f"use it with --config.pretrained.vq={folder}")


if __name__ == "__main__":
    main()
