"""Trains the three small parts that the embedded default starts from, on HeldObjects.

    python scripts/tiny_parts/pretrain.py --out tiny

A SigLIP with its text tower, a VQ tokenizer whose perceptual loss that SigLIP gives, and a
language model with its tokenizer. Each is written as PyTorch checkpoints of its family are
(bfloat16 safetensors under the published names), so that `weights_convert` reads it like any
other. What is there already is kept; a stopped training resumes.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tiny_decoder
import tiny_siglip
import tiny_stage
import tiny_text
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from htfa_jax.checkpoints import weights
from htfa_jax.common import param_paths
from htfa_jax.common.cli import command, parse, use_compilation_cache
from htfa_jax.common.files import whole_folder
from htfa_jax.common.hashing import short_hash
from htfa_jax.common.param_paths import Flat
from htfa_jax.common.signals import StopSignal
from htfa_jax.config import Config, load_config, override
from htfa_jax.data.splits import open_split
from htfa_jax.data.tokenizer import ChatTokenizer, train_tokenizer
from htfa_jax.errors import CheckpointError
from htfa_jax.models.factory import Model
from htfa_jax.models.internlm2 import InternLM2
from htfa_jax.training.vq_stage import train_vq
from weights_convert import to_hf
from weights_convert.on_demand import converted

log = logging.getLogger("htfa_jax.pretrain_tiny")

SEED = 1001  # of the scenes: no split of a run's own scenes has it
TOKENIZER_TEXTS = 4000


@dataclasses.dataclass(frozen=True)
class PretrainArgs:
    """Trains the tiny SigLIP, VQ tokenizer and language model."""

    out: Path  # where the parts and their trainings go
    part: tuple[str, ...] = ("internlm2", "siglip", "vq")  # which
    num_scenes: int = 20000  # training scenes of HeldObjects
    siglip_steps: int = 10000  # updates of 4 images from each of 32 records
    text_steps: int = 3000  # as many images each, for the text tower that is kept
    vq_steps: int = 10000  # updates of 32 images
    decoder_steps: int = 800  # updates of 32 rows of 128 tokens
    num_workers: int = 0  # loading processes (0: threads of this one)


def tiny_config(args: PretrainArgs) -> Config:
    """Sizes of `debug`, on scenes of its own."""
    return override(
        load_config("debug"),
        {
            "held_objects.seed": SEED,
            "held_objects.num_train": args.num_scenes,
            "held_objects.num_validation": 1000,
            "data.validation": "held_objects",
            "data.num_workers": args.num_workers,
            **{f"pretrained.{part}": None for part in ("siglip", "vq", "decoder")},
            "vq_train.num_steps": args.vq_steps,
            "vq_train.batch_size": 32,
            "pretrained.random_components": "as_configured",
        },
    )


def write(folder: Path, tensors: Flat, description: dict[str, Any]) -> None:
    """A checkpoint folder: bfloat16 safetensors and config.json, whole or not at all."""
    arrays = {
        name: np.ascontiguousarray(x).astype(np.float32).astype(ml_dtypes.bfloat16)
        for name, x in tensors.items()
    }
    with whole_folder(folder, CheckpointError) as partial:
        save_file(arrays, partial / "model.safetensors", metadata={"format": "pt"})
        weights.write_json(partial / "config.json", description)


def structure(make: Any) -> tuple[Model, Flat]:
    """A module's structure and fresh weights."""
    graphdef, state = nnx.split(make(nnx.Rngs(0)))
    params = param_paths.flatten(state)
    return Model(graphdef, params), params


def tokenizer_of(args: PretrainArgs, config: Config) -> ChatTokenizer:
    """The tokenizer that all texts go through, trained on first use."""
    folder = args.out / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        rng = np.random.default_rng(SEED)
        texts = tiny_text.texts(rng, TOKENIZER_TEXTS)
        train_tokenizer(texts, config.data.tokenizer_vocab_size, folder)
    return ChatTokenizer(folder)


def pretrain_decoder(args: PretrainArgs, config: Config) -> bool:
    """The language model, with its tokenizer beside it. False if a signal stopped it."""
    tokenizer, rows = tokenizer_of(args, config), 32
    model, params = structure(
        lambda rngs: InternLM2(config.decoder, dtype=jnp.dtype("float32"), rngs=rngs)
    )
    params = tiny_stage.train(
        "internlm2",
        args.out / "training" / "internlm2",
        lambda params, batch, key: tiny_decoder.loss(model.merge(params), batch, key),
        params,
        lambda step: tiny_decoder.token_batches(config, tokenizer, step, rows),
        num_steps=args.decoder_steps,
        learning_rate=2e-3,
        weight_decay=0.05,
        samples=rows,
        key=short_hash([dataclasses.asdict(config.decoder), args.decoder_steps]),
    )
    if params is None:
        return False
    folder = args.out / "internlm2"
    write(
        folder,
        to_hf.internlm2_tensors(params, config.decoder),
        to_hf.internlm2_config(config),
    )
    tokenizer.save(folder)
    return True


def pretrain_siglip(args: PretrainArgs, config: Config) -> bool:
    """Both towers of SigLIP, with the tokenizer of their captions. False if a signal stopped it."""
    params = train_towers(args, config)
    params = params and train_text(args, config, params)
    if params is None:
        return False
    tensors = tiny_siglip.tensors(params, config.siglip)
    write(args.out / "siglip", tensors, tiny_siglip.description(config))
    shutil.copy(args.out / "tokenizer" / "tokenizer.json", args.out / "siglip")
    return True


def train_towers(args: PretrainArgs, config: Config) -> Flat | None:
    """Vision tower, and the text tower that it learns from. None if a signal stopped it."""
    model, params = structure(lambda rngs: tiny_siglip.TwoTowers(config, kept=False, rngs=rngs))
    return train_captions(
        "siglip",
        args,
        config,
        lambda params, batch, key: tiny_siglip.loss(model.merge(params), batch, key, config),
        params,
        args.siglip_steps,
    )


def train_text(args: PretrainArgs, config: Config, towers: Flat) -> Flat | None:
    """The text tower that is kept, beside a vision tower that stays. None if a signal stopped it.

    Args:
      towers: what `train_towers` made.
    """
    locked, _ = param_paths.split(towers, r"(vision|pooling)\..*")
    model, fresh = structure(lambda rngs: tiny_siglip.TwoTowers(config, rngs=rngs))
    learned = train_captions(
        "siglip_text",
        args,
        config,
        lambda params, batch, key: tiny_siglip.loss(
            model.merge(params | locked), batch, key, config
        ),
        {path: x for path, x in fresh.items() if path not in locked},
        args.text_steps,
    )
    return learned and learned | locked


def train_captions(
    name: str,
    args: PretrainArgs,
    config: Config,
    loss: tiny_stage.Loss,
    params: Flat,
    num_steps: int,
) -> Flat | None:
    """Trains on images and captions; see `tiny_stage.train`."""
    tokenizer = Tokenizer.from_file(str(tokenizer_of(args, config).folder / "tokenizer.json"))
    records, samples = open_split(config, "train"), 32
    return tiny_stage.train(
        name,
        args.out / "training" / name,
        loss,
        params,
        lambda step: tiny_siglip.captioned_batches(config, records, tokenizer, step, samples),
        num_steps=num_steps,
        learning_rate=1e-3,
        weight_decay=0.05,
        samples=samples * len(tiny_text.KINDS),
        key=short_hash([dataclasses.asdict(config.siglip), args.num_scenes, num_steps]),
    )


def pretrain_vq(args: PretrainArgs, config: Config) -> bool:
    """The VQ tokenizer, by the SigLIP that judges its images. False if a signal stopped it."""
    eye = converted("siglip", str(args.out / "siglip"), config)
    config = override(config, {"pretrained.siglip": str(eye), "vq_train.perceptual_weight": 0.1})
    with StopSignal() as stop:
        folder = train_vq(config, args.out / "training" / "vq", stop)
    if folder is None:
        return False
    params = weights.read_weights(folder)
    write(args.out / "vq", to_hf.vq_tensors(params), to_hf.vq_config(config.vq, config.image_size))
    return True


STAGES = {"internlm2": pretrain_decoder, "siglip": pretrain_siglip, "vq": pretrain_vq}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(PretrainArgs, argv, __doc__)
    config = tiny_config(args)
    use_compilation_cache()
    for name, stage in STAGES.items():
        there = (args.out / name / "model.safetensors").is_file()
        if name in args.part and not there and not stage(args, config):
            print("stopped; the same command goes on")
            return
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
