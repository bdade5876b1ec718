"""What a run would need: devices, parameters, tokens, operations, memory; nothing is run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from htfa_jax import flops, paths
from htfa_jax.batch import Batch
from htfa_jax.config import Config
from htfa_jax.optim import frozen_pattern, learning_rate, make_optimizer
from htfa_jax.train_state import build, frozen_dtype


def size_table(shapes: Mapping[str, Any], config: Config) -> str:
    """Parameters of each part, trainable and frozen, as text."""
    frozen, trainable = paths.split(shapes, frozen_pattern(config))

    def row(name: str, paths_: list[str]) -> str:
        counts = [
            sum(math.prod(flat[p].shape) for p in paths_ if p in flat)
            for flat in (trainable, frozen)
        ]
        return f"{name:<12}{counts[0]:>16,}{counts[1]:>16,}"

    names = dict.fromkeys(path.split(".")[0] for path in shapes)
    lines = [f"{'parameters':<12}{'trainable':>16}{'frozen':>16}"]
    lines += [row(n, [p for p in shapes if p.split(".")[0] == n]) for n in names]
    return "\n".join([*lines, row("all", list(shapes))])


def abstract_batch(config: Config, samples: int, text_length: int) -> Batch:
    """Shapes and types of a batch."""
    size = config.image_size
    image, mask = ((samples, size, size, 3), jnp.uint8), ((samples, size, size), jnp.bool_)
    box, flag = ((samples, 4), jnp.float32), ((samples,), jnp.bool_)
    tokens = ((samples, text_length), jnp.int32)
    kinds = {
        **dict.fromkeys(("image_orig", "image_recon", "image_target"), image),
        **dict.fromkeys(("object_mask", "occluder_mask"), mask),
        **dict.fromkeys(("region_orig", "region_recon", "bbox_orig", "bbox_recon"), box),
        **{name: flag for name in Batch.__annotations__ if name.startswith("has_")},
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": ((samples, text_length), jnp.float32),
        "weight": ((samples,), jnp.float32),
        "index": ((samples,), jnp.int32),
    }
    return Batch(**{name: jax.ShapeDtypeStruct(*kind) for name, kind in kinds.items()})


def plan(config: Config) -> str:
    """The plan as text. Compiles the training step, which takes a minute for a large model."""
    from htfa_jax.train import make_train_step  # train itself offers this plan

    model = build(config)
    frozen, trainable = paths.split(model.shapes, frozen_pattern(config))
    frozen = {
        path: jax.ShapeDtypeStruct(s.shape, frozen_dtype(path, config))
        for path, s in frozen.items()
    }
    schedule = learning_rate(config.optim, 100)
    optimizer = make_optimizer(config.optim, schedule)
    state = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": trainable,
        "opt_state": jax.eval_shape(optimizer.init, trainable),
    }
    length, train = config.data.text_buckets[0], config.train
    batch = abstract_batch(config, train.batch_size * train.accumulation_steps, length)
    step = jax.jit(make_train_step(config, model, optimizer, schedule), donate_argnums=0)
    memory = step.lower(state, frozen, batch).compile().memory_analysis()
    operations = flops.training_step(config, length)
    device = jax.devices()[0]
    patches, codes = config.patch_grid**2, flops.code_tokens(config)

    def size(tree: Any) -> str:
        total = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
        return f"{total / 2**20:>10,.0f} MiB"

    return "\n".join(
        [
            f"devices      {jax.device_count()} x {device.device_kind} ({device.platform})",
            size_table(model.shapes, config),
            f"tokens       {flops.sequence_length(config, length)} per sample: "
            f"{patches} understanding, {codes} generation, up to {length} text "
            "(first bucket)",
            f"operations   {sum(operations.values()) / 1e9:,.1f} GFLOP per sample and step ("
            + ", ".join(f"{name} {value / 1e9:,.1f}" for name, value in operations.items())
            + ")",
            f"samples      {train.batch_size} per micro-step, "
            f"{train.accumulation_steps} micro-steps per update",
            "memory",
            f"  trained weights (float32)   {size(state['params'])}",
            f"  optimizer state             {size(state['opt_state'])}",
            f"  frozen weights              {size(frozen)}",
            f"  gradients, activations      {memory.temp_size_in_bytes / 2**20:>10,.0f} MiB "
            "(the compiler's temporaries)",
        ]
    )
