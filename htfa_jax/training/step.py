"""The training step: one pure function, and how it is compiled for a mesh."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, TrainConfig
from htfa_jax.data.batch import Batch, split_for_accumulation
from htfa_jax.errors import ConfigError
from htfa_jax.kernels import compiler
from htfa_jax.models.factory import FLOAT32_PARAMS, Model
from htfa_jax.models.losses import count, loss_and_metrics
from htfa_jax.sharding.layout import Layout
from htfa_jax.training import loss_scale
from htfa_jax.training.loss_guard import guarded_update, is_usable
from htfa_jax.training.optim import updates_applied
from htfa_jax.training.state import TrainState

Schedule = Callable[[jax.Array], jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    layout: Layout,
) -> Callable[[TrainState, Flat, Batch], tuple[TrainState, Metrics]]:
    """(state, frozen weights, batch) -> (state, metrics); pure.

    The batch is the samples of one update, [accumulation steps, samples, ...]. An update whose loss
    or gradient is not finite is left out (`guarded_update`), and `metrics["finite"]` is false, in
    float16 only if a smaller loss scale cannot help.
    """

    def train_step(state: TrainState, frozen: Flat, batch: Batch) -> tuple[TrainState, Metrics]:
        counts = jax.tree.map(lambda x: x.sum(), jax.vmap(lambda b: count(b, config))(batch))
        params = compute_dtype_params(config, layout, state["params"])
        scale = loss_scale.scale(state)

        def loss_fn(params: Flat, micro: Batch, key: jax.Array):
            loss, metrics = loss_and_metrics(model.merge(params, frozen), micro, counts, key)
            return loss * scale, metrics

        def grads_of(micro: Batch, key: jax.Array) -> tuple[Flat, Metrics]:
            (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, micro, key)
            return layout.scatter(grads), metrics

        def unscaled(grads: Flat) -> Flat:
            return {path: g.astype(jnp.float32) / scale for path, g in grads.items()}

        def update(params: Flat, opt_state: Any) -> tuple[Flat, Any]:
            updates, opt_state = optimizer.update(unscaled(grads), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        grads, metrics = accumulate(grads_of, batch, key, layout)
        norm = optax.tree.norm(unscaled(grads))
        usable = is_usable(state, metrics["loss"], norm)
        # Not by the step: an update that was left out does not advance the optimizer's schedule.
        rate = schedule(updates_applied(state["opt_state"]))
        metrics |= {"grad_norm": norm, "learning_rate": rate, "finite": usable}
        scale_state, metrics = loss_scale.next_scale(state, metrics)
        new = guarded_update(state, update, usable, config.train, harmless=metrics["finite"])
        return new | scale_state, metrics

    return layout.inside(train_step)


def accumulate(
    grads_of: Callable[[Batch, jax.Array], tuple[Flat, Metrics]],
    batch: Batch,
    key: jax.Array,
    layout: Layout,
) -> tuple[Flat, Metrics]:
    """Gradients and metrics summed over the accumulation steps, each with its own key.

    Of a single step gradients keep their dtype; sums are float32.
    """
    steps = len(batch.weight)
    if steps == 1:
        # Not a loop of one: XLA's convolutions are several times slower in loops on CPUs.
        return grads_of(jax.tree.map(lambda x: x[0], batch), key)
    inputs = (batch, jax.random.split(key, steps))
    shapes = jax.eval_shape(grads_of, *jax.tree.map(lambda x: x[0], inputs))
    grads, metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)

    def add(total: Any, x: Any) -> tuple[Any, None]:
        grads, metrics = jax.tree.map(jnp.add, total, grads_of(*x))
        return (layout.scatter(grads), metrics), None

    return jax.lax.scan(add, (layout.scatter(grads), metrics), inputs)[0]


def compute_dtype_params(config: Config, layout: Layout, params: Flat) -> Flat:
    """Inside a program: what the forward pass computes with, made of the trained weights.

    Gradients have its dtype (`params_dtype`) while devices add them up.
    """
    dtype = params_dtype(config)
    return layout.gather(
        {
            path: x if re.fullmatch(FLOAT32_PARAMS, path) else x.astype(dtype)
            for path, x in params.items()
        }
    )


def params_dtype(config: Config) -> jnp.dtype:
    """Dtype of the compute-dtype parameters, or float32 if gradients are summed in float32.

    Float32 costs twice the memory and traffic of 16 bits.
    """
    wide = config.sharding.reduce_dtype == "float32"
    return jnp.dtype(jnp.float32 if wide else config.train.dtype)


def put_update(train: TrainConfig, layout: Layout, batch: Batch) -> Batch:
    """The samples of an update [samples, ...], from the host, as the training step takes them."""
    stacked = split_for_accumulation(batch, train.accumulation_steps)
    return layout.put(stacked, layout.stacked_batch)


def compile_train_step(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    layout: Layout,
    state: TrainState,
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
    shardings = layout.state(state)
    return jax.jit(
        make_train_step(config, model, optimizer, schedule, layout),
        in_shardings=(shardings, layout.frozen(frozen), layout.stacked_batch),
        out_shardings=(shardings, layout.replicated),
        donate_argnums=0,
        compiler_options=compiler.TRAINING.get(layout.platform),
    )
