"""Converts published PyTorch weights to this package's form, and back.

    python -m weights_convert info google/siglip-so400m-patch14-384
    python -m weights_convert siglip google/siglip-so400m-patch14-384 weights/siglip
    python -m weights_convert vq deepseek-ai/Janus-1.3B weights/vq
    python -m weights_convert internlm2 internlm/internlm2-1_8b weights/internlm2 --num_layers 4
    python -m weights_convert verify weights/vq --source deepseek-ai/Janus-1.3B
    python -m weights_convert to_hf runs/a exported

Nothing that a checkpoint brings along is run. `COMMAND --help` shows the options of each.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from htfa_jax.common.cli import command, program

SOURCE = "folder, .safetensors, .bin, .pt, .pth or .ckpt file, or hub id such as google/siglip-..."


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog=program(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help_: str, out: bool = True) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=help_, description=help_)
        one.add_argument("source", help=SOURCE)
        if out:
            one.add_argument("out", type=Path, help="weight folder to write; replaced if there")
        one.add_argument("--revision", help="branch, tag or commit of a hub repository")
        return one

    one = add("siglip", "Converts the SigLIP vision encoder of a checkpoint.")
    one.add_argument("--image_size", type=int, default=448, help="pixels of a side (448)")
    one = add("vq", "Converts a VQGAN-family tokenizer.")
    one.add_argument("--decoder_from", help="checkpoint whose decoder completes an encoder")
    one = add("internlm2", "Converts an InternLM2 (or Llama) decoder and its tokenizer.")
    one.add_argument("--num_layers", type=int, help="only the first so many layers (all)")
    add("htfa", "Converts what carries over from a checkpoint of the PyTorch original.")
    add("info", "Shows what a checkpoint holds and what of it can be converted.", out=False)
    one = commands.add_parser("verify", help="Runs source and conversion on the same inputs.")
    one.add_argument("folder", type=Path, help="weight folder to check")
    one.add_argument("--source", required=True, help=SOURCE)
    one.add_argument("--revision", help="branch, tag or commit of a hub repository")
    one.add_argument("--decoder_from", help="as in the conversion")
    one = commands.add_parser("to_hf", help="Writes a run's SigLIP and decoder for PyTorch.")
    one.add_argument("run", help="run, or RUN/checkpoints/STEP")
    one.add_argument("out", type=Path, help="folder to write")
    return top


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parser().parse_args(argv)
    # What follows loads JAX, which --help does without.
    from weights_convert import htfa, internlm2, siglip, vq
    from weights_convert.folder import write_folder
    from weights_convert.info import describe_source
    from weights_convert.source import Source
    from weights_convert.tokenizer import tokenizer_of

    if args.command == "to_hf":
        from weights_convert.to_hf import write_run

        for folder in write_run(args.run, args.out):
            print(f"written to {folder}")
        return
    source = Source(args.source, args.revision)
    if args.command == "info":
        print(describe_source(source))
        return
    decoder_from = getattr(args, "decoder_from", None)
    decoder_from = Source(decoder_from) if decoder_from else None
    if args.command == "verify":
        from weights_convert.verify import verify

        print(verify(args.folder, source, decoder_from))
        return
    if args.command == "siglip":
        layout = siglip.layout(source, args.image_size)
    elif args.command == "vq":
        layout = vq.layout(source, decoder_from)
    elif args.command == "internlm2":
        layout = internlm2.layout(source, args.num_layers)
    else:
        layout = htfa.layout(source)
    used = source if decoder_from is None else vq.Merged(source, decoder_from)
    write_folder(used, layout, args.out, beside=tokenizer_of(source, args.command))
    sizes = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(layout.sizes).items())
    print(f"{layout.variant}\n{sizes}\nwritten to {args.out}")
    field = {"internlm2": "decoder"}.get(args.command, args.command)
    print(f"train with it: --config.pretrained.{field}={args.out}")


if __name__ == "__main__":
    main()
