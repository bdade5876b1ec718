"""The training state: trainable parameters, optimizer state and step; frozen weights beside it.

Parameters are flat dictionaries `{path: array}` (see `paths`). Trainable ones are float32 and
have optimizer moments; frozen ones have neither gradients nor moments. Where they are is for
`sharding` to say.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, TrainConfig
from htfa_jax.kernels.compiler import jit_light
from htfa_jax.models.factory import CODE_HEAD, FLOAT32_PARAMS, Model
from htfa_jax.models.htfa import HTFA
from htfa_jax.models.layers import make_rngs
from htfa_jax.sharding.layout import Layout
from htfa_jax.training import loss_scale
from htfa_jax.training.optim import frozen_pattern

# {"step", "halted", "params", "opt_state"}, in float16 also "loss_scale". Halted means that an
# update was not finite and none after it is applied (`loss_guard`); a checkpoint is never of a
# halted state.
TrainState = dict[str, Any]


def frozen_dtype(path: str, train: TrainConfig) -> jnp.dtype:
    """What a frozen parameter is stored as."""
    keeps = re.fullmatch(FLOAT32_PARAMS, path)
    return jnp.dtype(jnp.float32 if keeps else train.frozen_dtype)


def new_params(config: Config, model: Model, loaded: Flat, layout: Layout) -> tuple[Flat, Flat]:
    """Trainable (float32) and frozen parameters, laid out: `loaded` ones, the others at random.

    A generation head that is not loaded starts from the codes; see
    `EncoderDecoupling.tied_head_kernel`.

    Args:
      config: the run's configuration.
      model: its structure.
      loaded: `{path: array}` of pretrained components.
      layout: of the run.
    """
    frozen, trainable = param_paths.split(model.shapes, frozen_pattern(config))
    dtypes = dict.fromkeys(trainable, jnp.dtype(jnp.float32))
    dtypes |= {path: frozen_dtype(path, config.train) for path in frozen}
    shardings = {path: layout.stored(path, s.shape) for path, s in trainable.items()}
    shardings |= layout.frozen(frozen)
    # A tokenizer encoder that trains starts as a copy of the tokenizer's own.
    own = {p.replace("vq.encoder", "vq_encoder"): v for p, v in loaded.items()}
    loaded = {p: v for p, v in own.items() if p in trainable} | loaded

    def random(key: jax.Array) -> Flat:
        flat = param_paths.flatten(nnx.split(HTFA(config, rngs=make_rngs(key)))[1])
        return {p: v.astype(dtypes[p]) for p, v in flat.items() if p not in loaded}

    drawn = {p: sharding for p, sharding in shardings.items() if p not in loaded}
    draw = jit_light(random, out_shardings=drawn)
    params = draw(jax.random.key(config.seed)) if drawn else {}
    for path, value in loaded.items():
        params[path] = layout.put_parameter(value, dtypes[path], shardings[path])
    if CODE_HEAD in params.keys() - loaded.keys():

        def tied(params: Flat) -> jax.Array:
            module = model.merge(params)
            return module.level3.tied_head_kernel(module.vq.vectors()).astype(dtypes[CODE_HEAD])

        params[CODE_HEAD] = jax.jit(tied, out_shardings=shardings[CODE_HEAD])(params)
    return {p: params[p] for p in trainable}, {p: params[p] for p in frozen}


def new_state(
    train: TrainConfig, trainable: Flat, optimizer: optax.GradientTransformation, layout: Layout
) -> TrainState:
    """The state at step 0."""

    def init(params: Flat) -> TrainState:
        return {"opt_state": optimizer.init(params)} | (
            {"loss_scale": loss_scale.first()} if train.dtype == "float16" else {}
        )

    shardings = layout.state({"params": trainable} | jax.eval_shape(init, trainable))
    rest = jax.jit(init, out_shardings={k: v for k, v in shardings.items() if k != "params"})
    return {**progress(0, layout.replicated), "params": trainable, **rest(trainable)}


def progress(step: int, sharding: jax.sharding.Sharding) -> TrainState:
    """The part of a state that says how far it is."""
    return jax.device_put({"step": jnp.int32(step), "halted": jnp.bool_(False)}, sharding)
