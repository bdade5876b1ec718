"""Evaluates a run, one of its checkpoints or an exported run on a split of its data.

    python -m htfa_jax.evaluate --checkpoint runs/a
    python -m htfa_jax.evaluate --checkpoint runs/a --split validation
    python -m htfa_jax.evaluate --checkpoint runs/a --output_dir scores \\
        --config.data.test=scenes/train-24-word.jsonl

Answers come from real decoding; completed images are scored beside four references. The run's own
configuration counts; every field below is a flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from htfa_jax.checkpoints.hub import is_repository
from htfa_jax.checkpoints.runs import find_run
from htfa_jax.common.cli import command, use_compilation_cache
from htfa_jax.config import load_config
from htfa_jax.config.io import ConfigFlags, parse_args
from htfa_jax.data.records import Split
from htfa_jax.errors import ConfigError


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
        read=lambda path: load_config(find_run(path)[0]),
    )
    use_compilation_cache(args.config.data.cache_dir)
    if args.output_dir is None and is_repository(args.checkpoint):
        raise ConfigError("--output_dir is missing: nothing is written into the hub's copy")
    from htfa_jax.evaluation import report
    from htfa_jax.evaluation.evaluator import evaluate_run

    result, folder = evaluate_run(args.config, args.checkpoint, args.split)
    folder = args.output_dir or folder / "evaluation" / args.split
    report.write(result, folder)
    print(report.score_table(result.scores))
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
