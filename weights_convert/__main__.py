"""Converts published PyTorch weights to this package's form, and back.

    python -m weights_convert preset standard weights
    python -m weights_convert info google/siglip-so400m-patch14-384
    python -m weights_convert siglip google/siglip-so400m-patch14-384 weights/siglip
    python -m weights_convert vq deepseek-ai/Janus-1.3B weights/vq
    python -m weights_convert internlm2 internlm/internlm2-1_8b weights/internlm2 --num_layers 4
    python -m weights_convert verify weights/vq --source deepseek-ai/Janus-1.3B
    python -m weights_convert to_hf runs/a exported

Nothing that a checkpoint brings along is run. `COMMAND --help` shows the options of each.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from htfa_jax.common.cli import command, parse

SOURCE = "folder, .safetensors, .bin, .pt, .pth or .ckpt file, or hub id such as google/siglip-..."
SourceArg = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE", help=SOURCE)]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What every conversion takes."""

    command: ClassVar[str]
    source: SourceArg
    # Weight folder to write; replaced if there.
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    revision: str | None = None  # branch, tag or commit of a hub repository


@dataclasses.dataclass(frozen=True)
class SigLIP(Conversion):
    """Converts the SigLIP vision encoder of a checkpoint."""

    command = "siglip"
    image_size: int = 448  # pixels of a side


@dataclasses.dataclass(frozen=True)
class VQ(Conversion):
    """Converts a VQGAN-family tokenizer."""

    command = "vq"
    decoder_from: str | None = None  # checkpoint whose decoder completes an encoder


@dataclasses.dataclass(frozen=True)
class InternLM2(Conversion):
    """Converts an InternLM2, Llama, Mistral or Qwen2 decoder and its tokenizer."""

    command = "internlm2"
    num_layers: int | None = None  # only the first so many layers (default: all)


@dataclasses.dataclass(frozen=True)
class HTFA(Conversion):
    """Converts what carries over from a checkpoint of the PyTorch original."""

    command = "htfa"


@dataclasses.dataclass(frozen=True)
class Preset:
    """Fetches, converts and verifies the published weights of a preset."""

    command: ClassVar[str] = "preset"
    # Preset, such as standard.
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    # Folder for the weight folders.
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    revision: tuple[str, ...] = ()  # COMPONENT=COMMIT, such as vq=0123abc
    dry_run: bool = False  # only say what would be downloaded and written
    compare: bool = True  # run each conversion and its source on the same inputs


@dataclasses.dataclass(frozen=True)
class Info:
    """Shows what a checkpoint holds and what of it can be converted."""

    command: ClassVar[str] = "info"
    source: SourceArg
    revision: str | None = None  # branch, tag or commit of a hub repository


@dataclasses.dataclass(frozen=True)
class Verify:
    """Runs source and conversion on the same inputs."""

    command: ClassVar[str] = "verify"
    # Weight folder to check.
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    source: Annotated[str, tyro.conf.arg(help=SOURCE)]
    revision: str | None = None  # branch, tag or commit of a hub repository
    decoder_from: str | None = None  # as in the conversion


@dataclasses.dataclass(frozen=True)
class ToHF:
    """Writes a run's SigLIP and decoder for PyTorch."""

    command: ClassVar[str] = "to_hf"
    # Run, or RUN/checkpoints/STEP.
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    # Folder to write.
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]


COMMANDS = (Preset, SigLIP, VQ, InternLM2, HTFA, Info, Verify, ToHF)


def options(argv: Sequence[str] | None) -> Any:
    """The command of a command line with its options, one of `COMMANDS`."""
    named = (Annotated[cls, tyro.conf.subcommand(cls.command)] for cls in COMMANDS)
    either: Any = functools.reduce(operator.or_, named)
    return parse(either, argv, __doc__)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = options(argv)
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
    if args.command == "preset":
        from weights_convert.preset import fetch_preset

        how = {"dry_run": args.dry_run, "compare": args.compare}
        print(fetch_preset(args.name, args.out, args.revision, **how))
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
        spec = siglip.conversion_spec(source, args.image_size)
    elif args.command == "vq":
        spec = vq.conversion_spec(source, decoder_from)
    elif args.command == "internlm2":
        spec = internlm2.conversion_spec(source, args.num_layers)
    else:
        spec = htfa.conversion_spec(source)
    used = source if decoder_from is None else vq.Merged(source, decoder_from)
    write_folder(used, spec, args.out, beside=tokenizer_of(source, args.command))
    sizes = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(spec.sizes).items())
    print(f"{spec.variant}\n{sizes}\nwritten to {args.out}")
    field = {"internlm2": "decoder"}.get(args.command, args.command)
    print(f"train with it: --config.pretrained.{field}={args.out}")


if __name__ == "__main__":
    main()
