"""Answers questions about picture pairs with a trained run, and completes the pictures.

    python -m htfa_jax.infer --demo --visualize
    python -m htfa_jax.infer --checkpoint runs/a --input scenes/train-24-word.jsonl \\
        --output_dir answers
    python -m htfa_jax.infer --checkpoint runs/a --output_dir answer \\
        --image_orig scenes/train/orig/000000.jpg --image_recon scenes/train/recon/000000.png \\
        --query "What's the object in the hand?" "What color is it?"

The first needs nothing: a small trained model and its scenes are in this package. runs/a is what
`htfa_jax.train` wrote, scenes/ what `htfa_jax.data.held_objects --num 24 --out scenes` draws. Of
many pairs, those that predictions.jsonl answers already are left out.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from htfa_jax.commands import command, parse, use_compilation_cache
from htfa_jax.config_io import load_config
from htfa_jax.errors import ConfigError
from htfa_jax.options import Completion, Decoding, Quantize, View
from htfa_jax.report_html import write_report
from htfa_jax.runs import find_run

# A finished small model, and scenes that it has not seen.
DEMO, EXAMPLES = Path(__file__).parent / "tiny" / "demo", "examples/pairs.jsonl"
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class InferArgs:
    """Options of the command."""

    checkpoint: Path | None = None  # a run, RUN/checkpoints/STEP, an exported run or its hub id
    output_dir: Path | None = None  # predictions.jsonl and pictures go here
    demo: bool = False  # this package's small model, on its example scenes if no pair is given
    image_orig: Path | None = None  # the original, where something hides the object
    image_recon: Path | None = None  # the reconstruction; without it the model paints one first
    object_mask: Path | None = None  # white where the object is, its hidden part included
    occluder_mask: Path | None = None  # white where something covers the original
    bbox_orig: Box | None = None  # x y width height of the object in the original's pixels
    bbox_recon: Box | None = None  # the same in the reconstruction's
    query: tuple[str, ...] = ()  # one or several questions (default: data.default_query)
    input: Path | None = None  # many pairs: JSON lines with the fields above, query and id
    batch_size: int = 8  # pairs at a time
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = Decoding()
    completion: Completion = Completion()
    visualize: bool = False  # figures of every pair, and report.html with all of them
    attention: View = View()  # of the answers' attention, in the figures
    device: str | None = None  # "cpu", "gpu" or "tpu" (default: JAX's choice)
    quantize: Quantize | None = None  # keep the decoder's weights in 8 bits
    revision: str | None = None  # of a hub repository: branch, tag or commit


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(InferArgs, argv, __doc__)
    if args.demo:
        args = of_the_demo(args)
    checkpoint, folder = given(args, "checkpoint"), given(args, "output_dir")
    if (args.input is None) == (args.image_orig is None):
        raise ConfigError("give either --image_orig (one pair) or --input (many)")
    workdir, step = find_run(checkpoint, args.revision)
    use_compilation_cache(load_config(workdir))
    folder.mkdir(parents=True, exist_ok=True)
    from htfa_jax.predictions import predict

    failed, tried = predict(args, workdir if step is None else checkpoint, folder)
    if args.visualize:
        write_report(folder, f"{folder.resolve().name}: {workdir.name}")
    print(f"written to {folder}")
    if tried and failed == tried:
        sys.exit(2)


def given(args: InferArgs, name: str) -> Path:
    """An option that cannot do without a value. Raises ConfigError if it has none."""
    value = getattr(args, name)
    if value is None:
        raise ConfigError(f"--{name} is missing (--help shows all options; --demo needs none)")
    return value


def of_the_demo(args: InferArgs) -> InferArgs:
    """The options with the demo model, its scenes and a folder where the user gave none."""
    if args.checkpoint is not None:
        raise ConfigError("--demo brings its own model: leave --checkpoint out")
    pairs = DEMO / EXAMPLES if (args.input or args.image_orig) is None else args.input
    folder = args.output_dir or Path("demo")
    return dataclasses.replace(args, checkpoint=DEMO, input=pairs, output_dir=folder)


if __name__ == "__main__":
    main()
