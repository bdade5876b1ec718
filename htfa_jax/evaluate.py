"""Evaluates a run, one of its checkpoints or an exported run on a split of its data.

    python -m htfa_jax.evaluate --checkpoint shared/a
    python -m htfa_jax.evaluate --checkpoint shared/a --split validation
    python -m htfa_jax.evaluate --checkpoint runs/a --output_dir scores \\
        --config.data.test=scenes/train-24-word.jsonl

Answers come from real decoding; completed images are scored beside four references. The run's own
configuration counts, but for the places that it names: data other than the embedded dataset is
given by a flag. Every field below is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from htfa_jax.checkpoints.hub import is_repository
from htfa_jax.checkpoints.runs import find_run, run_config, written_config
from htfa_jax.common.cli import command, use_compilation_cache
from htfa_jax.common.names import inside
from htfa_jax.config.io import ConfigFlags, parse_args
from htfa_jax.data.records import Split
from htfa_jax.errors import CheckpointError, ConfigError


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
    """Options of the command."""

    config: ConfigFlags
    checkpoint: Path = Path()  # a run, RUN/checkpoints/STEP, an exported run or its hub id
    split: Split = "test"  # which data
    output_dir: Path | None = None  # where JSON and images go (default: RUN/evaluation/SPLIT)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse_args(
        EvaluateArgs,
        argv,
        description=__doc__,
        source="checkpoint",
        read=lambda path: run_config(find_run(path)[0]),
    )
    if args.output_dir is None and is_repository(args.checkpoint):
        raise ConfigError("--output_dir is missing: nothing is written into the hub's copy")
    data, split = args.config.data, args.split
    if not (getattr(data, split) or (split == "train" and data.sources)):
        raise missing_data(args.checkpoint, split)
    use_compilation_cache()
    from htfa_jax.evaluation import report
    from htfa_jax.evaluation.evaluator import evaluate_run

    result, folder = evaluate_run(args.config, args.checkpoint, args.split)
    folder = args.output_dir or own_folder(folder, args.split)
    report.write(result, folder)
    print(report.score_table(result.scores))
    print(f"written to {folder}")


def missing_data(checkpoint: Path, split: Split) -> ConfigError:
    """The error of a split that no flag names; it tells what the run was made with."""
    data = written_config(find_run(checkpoint)[0]).data
    source, more = getattr(data, split), ""
    if split == "train" and data.sources:
        source = ", ".join(name for name, _ in data.sources)
    if data.image_root is not None:
        more = f" and --config.data.image_root (there {data.image_root!r})"
    said = "names none" if source is None else f"names {source!r}, on the machine where it was made"
    return ConfigError(
        f"no data for the split {split}: {checkpoint} {said}. Places are not taken from a run, "
        f"which may be somebody else's: give --config.data.{split}=FILE{more}"
    )


def own_folder(run: Path, split: Split) -> Path:
    """RUN/evaluation/SPLIT. Raises CheckpointError if that leads out of the run."""
    try:
        return inside(run, f"evaluation/{split}", str(run))
    except ValueError as error:
        raise CheckpointError(f"{run}/evaluation/{split} {error}: give --output_dir") from error


if __name__ == "__main__":
    main()
