"""Trains HTFA, evaluates it, shows what it does.

    python -m htfa_jax.train --config debug --dry_run           # what it would need
    python -m htfa_jax.train --config debug --workdir runs/a    # the same again goes on
    python -m htfa_jax.train --config debug --init_from runs/a --config.optim.learning_rate=1e-4

--config names a preset of this package, a file with get_config(), or a run's config.json (default:
the preset `standard`). Every field of it is a flag, listed below.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from htfa_jax.checkpoints import integrity
from htfa_jax.checkpoints.runs import find_run, make_workdir, new_workdir
from htfa_jax.checkpoints.weights import FAMILIES
from htfa_jax.common.cli import command, use_compilation_cache
from htfa_jax.common.compiling import without_alarms
from htfa_jax.common.logs import only_warnings_to_terminal
from htfa_jax.config import Config, override
from htfa_jax.config.io import ConfigFlags, given_fields, parse_args, source_name
from htfa_jax.data.held_out import own_splits
from htfa_jax.errors import ConfigError
from htfa_jax.sharding.processes import Distributed, is_first
from weights_convert.on_demand import with_weights


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Options of the command."""

    config: ConfigFlags
    workdir: Path | None = None  # where it goes; what it holds is resumed (default: runs/...)
    init_from: str | None = None  # start at step 0 with the weights of this run (or checkpoint)
    resume_step: int | None = None  # go on at this checkpoint of --workdir, not at the newest
    dry_run: bool = False  # print devices, parameters, steps, memory and data, and stop
    distributed: Distributed = Distributed()  # processes on several hosts


def resolved(args: TrainArgs, base: Config) -> Config:
    """The configuration with weight folders for the components that it names.

    A run with checkpoints has its weights: those that it was made from may be gone, as after a
    move to another machine. Raises CheckpointError if what weights should come from is no run.
    """
    goes_on = args.workdir is not None and bool(integrity.steps(args.workdir))
    if not goes_on and (run := args.init_from or args.config.pretrained.run) is not None:
        find_run(run)  # a slip of the pen is missed now, not after hours of drawing scenes
    if args.init_from is not None:
        return args.config  # whose components are not used
    return with_weights(args.config, base, may_be_gone=goes_on)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--dry_run" in argv:
        without_alarms()
    args = parse_args(TrainArgs, argv, description=__doc__, resolve=resolved)
    config: Config = args.config
    args.distributed.connect()
    if not is_first():
        only_warnings_to_terminal()
    config = override(config, own_splits(config.data, given_fields(argv)))
    if args.init_from is not None:
        # All weights come from there, whatever components the preset names.
        nothing = dict.fromkeys(f"pretrained.{component}" for component in FAMILIES)
        config = override(config, nothing | {"pretrained.run": args.init_from})
    if args.resume_step is not None and args.workdir is None:
        raise ConfigError("--resume_step is of a run: give its --workdir")
    if args.dry_run:
        from htfa_jax.training.dry_run import dry_run

        print(dry_run(config, args.workdir))
        return
    use_compilation_cache()
    import jax  # with what follows, which --help does without

    if jax.process_count() > 1 and args.workdir is None:
        raise ConfigError("several processes need one --workdir that all of them can write to")
    from htfa_jax.training.trainer import train

    workdir = make_workdir(args.workdir or new_workdir(source_name(argv)))
    scores = train(config, workdir, args.resume_step)
    if is_first():
        print(f"{'stopped' if scores is None else 'finished'}: {workdir}")


if __name__ == "__main__":
    main()
