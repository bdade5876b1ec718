"""The training step: one pure function, and how it is compiled for a mesh."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config
from htfa_jax.data.batch import Batch, in_micro_batches
from htfa_jax.errors import ConfigError
from htfa_jax.models.factory import ALPHA, Model
from htfa_jax.models.losses import count, loss_and_metrics
from htfa_jax.sharding.layout import Layout
from htfa_jax.sharding.mesh import target
from htfa_jax.training import loss_guard, loss_scale
from htfa_jax.training.state import State

Schedule = Callable[[jax.Array], jax.Array]
# cuBLAS adds biases and residuals and computes GELU within a matrix product. XLA's own kernels
# leave that to another pass over the memory, so that even a faster one of them loses.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def make_train_step(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    layout: Layout,
) -> Callable[[State, Flat, Batch], tuple[State, dict[str, jax.Array]]]:
    """(state, frozen weights, batch) -> (state, metrics); pure.

    The batch is the samples of one update, [micro-steps, samples, ...]. If the loss or the
    gradient is not finite, parameters and moments stay as they were, and `metrics["finite"]` is
    false (in float16 only if a smaller loss scale cannot help); what `loss_guard.halt` then does
    to the state makes the steps after it leave them too.
    """

    def train_step(state: State, frozen: Flat, batch: Batch):
        counts = jax.tree.map(lambda x: x.sum(), jax.vmap(lambda b: count(b, config))(batch))
        copy = compute_copy(config, layout, state["params"])
        scale = loss_scale.scale(state)

        def loss_fn(copy: Flat, micro: Batch, key: jax.Array):
            loss, metrics = loss_and_metrics(model.merge(copy, frozen), micro, counts, key)
            return loss * scale, metrics

        def micro_step(micro: Batch, key: jax.Array) -> tuple[Flat, dict[str, jax.Array]]:
            (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(copy, micro, key)
            return layout.scatter(grads), metrics

        def unscaled(grads: Flat) -> Flat:
            return {path: g.astype(jnp.float32) / scale for path, g in grads.items()}

        step_key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        grads, metrics = sum_over(micro_step, batch, step_key, layout)
        norm = optax.tree.norm(unscaled(grads))
        usable = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        usable &= ~loss_guard.is_halted(state)

        def update(params: Flat, opt_state: Any) -> tuple[Flat, Any]:
            updates, opt_state = optimizer.update(unscaled(grads), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        old = state["params"], state["opt_state"]
        if target().startswith("gpu"):
            # XLA selects while it writes the update; a branch would wait for the host.
            new = jax.tree.map(functools.partial(jax.lax.select, usable), update(*old), old)
        else:
            # For a selection a CPU's program would keep both states.
            new = jax.lax.cond(usable, update, lambda *old: old, *old)
        params, opt_state = new
        metrics |= {
            "grad_norm": norm,
            "learning_rate": schedule(state["step"]),
            "finite": usable,
        }
        new = {"step": state["step"] + 1, "params": params, "opt_state": opt_state}
        new, metrics = loss_scale.after_step(state, new, metrics)
        return loss_guard.halt(state, new, metrics["finite"], config.train), metrics

    return layout.inside(train_step)


def sum_over(
    micro_step: Callable[[Batch, jax.Array], tuple[Flat, dict[str, jax.Array]]],
    batch: Batch,
    key: jax.Array,
    layout: Layout,
) -> tuple[Flat, dict[str, jax.Array]]:
    """Gradients and metrics summed over the micro-steps of a batch, each with its own key.

    Of a single micro-step gradients keep their type; sums are float32.
    """
    steps = len(batch.weight)
    if steps == 1:
        # Not a loop of one: XLA's convolutions are several times slower in loops on CPUs.
        return micro_step(jax.tree.map(lambda x: x[0], batch), key)
    inputs = (batch, jax.random.split(key, steps))
    shapes = jax.eval_shape(micro_step, *jax.tree.map(lambda x: x[0], inputs))
    grads, metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)

    def add(total: Any, x: Any) -> tuple[Any, None]:
        grads, metrics = jax.tree.map(jnp.add, total, micro_step(*x))
        return (layout.scatter(grads), metrics), None

    return jax.lax.scan(add, (layout.scatter(grads), metrics), inputs)[0]


def compute_copy(config: Config, layout: Layout, params: Flat) -> Flat:
    """Inside a program: what the forward pass computes with, made of the trained weights.

    Gradients have its type (`copy_dtype`) while devices add them up.
    """
    dtype = copy_dtype(config)
    return layout.gather(
        {path: x if re.fullmatch(ALPHA, path) else x.astype(dtype) for path, x in params.items()}
    )


def copy_dtype(config: Config) -> jnp.dtype:
    """Type of the compute copy: the compute type, or float32 if gradients add up in float32.

    Float32 costs twice the memory and traffic of 16 bits.
    """
    wide = config.sharding.reduce_dtype == "float32"
    return jnp.dtype(jnp.float32 if wide else config.train.dtype)


def put_update(config: Config, layout: Layout, batch: Batch) -> Batch:
    """The samples of an update [samples, ...], from the host, as the training step takes them."""
    micro_batches = in_micro_batches(batch, config.train.accumulation_steps)
    return layout.put(micro_batches, layout.stacked_batch)


def compile_train_step(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    layout: Layout,
    state: State,
    frozen: Flat,
) -> jax.stages.Wrapped:
    """`make_train_step`, compiled on first use; it takes the memory of its state.

    Args:
      config, model, optimizer, schedule, layout: of the run.
      state: training state, or its shapes.
      frozen: frozen weights, or their shapes.

    Raises ConfigError if the devices cannot compute in `train.dtype`.
    """
    if config.train.dtype == "float16" and layout.platform == "cpu":
        raise ConfigError(
            "train.dtype=float16 needs a GPU: XLA multiplies no float16 on CPUs. Use bfloat16 or "
            "float32"
        )
    places = layout.state(state)
    return jax.jit(
        make_train_step(config, model, optimizer, schedule, layout),
        in_shardings=(places, layout.frozen(frozen), layout.stacked_batch),
        out_shardings=(places, layout.replicated),
        donate_argnums=0,
        compiler_options=GPU_OPTIONS if layout.platform == "gpu" else None,
    )
