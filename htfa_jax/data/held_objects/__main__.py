"""Draws scenes of the embedded dataset, and a contact sheet to look at.

    python -m htfa_jax.data.held_objects --num 24 --size 128 --out scenes
    python -m htfa_jax.data.held_objects --num 12 --size 64 --split test --answers sentence \\
        --out other
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from htfa_jax.common.cli import command, parse
from htfa_jax.data.held_objects import build_scenes, contact_sheet
from htfa_jax.data.held_objects.questions import ANSWERS
from htfa_jax.data.held_objects.scenes import SPLITS

Split = tyro.extras.literal_type_from_choices(SPLITS)
Answers = tyro.extras.literal_type_from_choices(ANSWERS)


@dataclasses.dataclass(frozen=True)
class DrawArgs:
    """Options of the command."""

    out: Path  # folder to write to
    num: int = 1000  # number of scenes
    size: int = 448  # pixels of an image's side
    split: Split = "train"  # each has scenes of its own
    seed: int = 0  # of the scenes
    answers: Answers = "word"  # one word each, or a sentence
    workers: int | None = None  # processes (default: one per processor)
    sheet: int = 24  # scenes on the contact sheet


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see --help."""
    args = parse(DrawArgs, argv, __doc__)
    records = build_scenes(
        args.out,
        args.split,
        args.num,
        image_size=args.size,
        seed=args.seed,
        answers=args.answers,
        num_workers=args.workers,
    )
    sheet = contact_sheet(records, args.out / "contact_sheet.png", args.sheet)
    print(f"{args.num} scenes: {records}\ncontact sheet: {sheet}")


if __name__ == "__main__":
    main()
