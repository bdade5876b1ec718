"""Draws scenes of the embedded dataset, and a contact sheet to look at.

    python -m htfa_jax.data.held_objects --num 24 --size 128 --out scenes
    python -m htfa_jax.data.held_objects --num 12 --size 64 --split test --answers sentence \\
        --out other
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from htfa_jax.common.cli import command, program
from htfa_jax.data.held_objects import build_scenes, contact_sheet
from htfa_jax.data.held_objects.questions import ANSWERS
from htfa_jax.data.held_objects.scenes import SPLITS


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog=program(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--num", type=int, default=1000, help="number of scenes")
    parser.add_argument("--size", type=int, default=448, help="pixels of a picture's side")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answers", choices=ANSWERS, default="word")
    parser.add_argument("--workers", type=int, help="processes (default: one per processor)")
    parser.add_argument("--sheet", type=int, default=24, help="scenes on the contact sheet")
    args = parser.parse_args(argv)
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
