"""Writes a run's weights, configuration, tokenizer, metrics and model card to a folder to share.

    python -m htfa_jax.export runs/a shared/a --license mit
    python -m htfa_jax.export runs/a shared/whole --dtype float32      # loses nothing
    python -m htfa_jax.infer --checkpoint shared/a --output_dir answer \\
        --image_orig scenes/train/orig/000000.jpg

What is written can be shared as it is: read its README.md, the model card, first.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from htfa_jax.common.cli import command, parse
from htfa_jax.inference.options import ExportDType

log = logging.getLogger("htfa_jax.export")  # by name: this module is run as __main__ too


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Options of the command."""

    run: Annotated[Path, tyro.conf.Positional]  # a run, or RUN/checkpoints/STEP
    out: Annotated[Path, tyro.conf.Positional]  # the folder to write
    dtype: ExportDType = "bfloat16"  # of the weights
    license: str | None = None  # as the hub names it: mit, apache-2.0, other ...
    overwrite: bool = False  # replace an exported run that is there


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(ExportArgs, argv, __doc__)
    from htfa_jax.inference.export import export_run

    out = export_run(
        args.run, args.out, dtype=args.dtype, license=args.license, overwrite=args.overwrite
    )
    if args.license is None:
        log.warning("the card states no licence: --license names one")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"written to {out}: {size / 1e6:,.1f} MB; README.md is its model card")


if __name__ == "__main__":
    main()
