"""The training state: trainable parameters, optimizer state and step; frozen weights beside it.

Parameters are flat dictionaries `{path: array}` (see `paths`). Trainable ones are float32 and
have optimizer moments; frozen ones have neither gradients nor moments. Where they are is for
`sharding` to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config
from htfa_jax.models.factory import CODE_HEAD, CODEBOOK, Model
from htfa_jax.models.htfa import HTFA
from htfa_jax.models.layers import streams
from htfa_jax.sharding.layout import Layout
from htfa_jax.training import loss_scale
from htfa_jax.training.optim import frozen_pattern

State = dict[str, Any]


def frozen_dtype(path: str, config: Config) -> jnp.dtype:
    """What a frozen parameter is stored as."""
    keeps = re.fullmatch(CODEBOOK, path)
    return jnp.dtype(jnp.float32 if keeps else config.train.frozen_dtype)


def compiled_lightly(function: Callable, **options: Any) -> Callable:
    """`jax.jit` of a function that draws many arrays at random.

    For a CPU, LLVM spends a third of the time on the loops that draw if it optimizes them less. The
    numbers stay the same and come as fast.
    """
    # JAX may have been told to optimize nothing, which takes less time still.
    if jax.default_backend() == "cpu" and not jax.config.read("jax_disable_most_optimizations"):
        options["compiler_options"] = {"xla_backend_optimization_level": 1}
    return jax.jit(function, **options)


def new_params(config: Config, model: Model, loaded: Flat, layout: Layout) -> tuple[Flat, Flat]:
    """Trainable (float32) and frozen parameters, laid out: `loaded` ones, the others at random.

    A generation head that is not loaded starts from the codes; see `EncoderDecoupling.first_head`.

    Args:
      config: the run's configuration.
      model: its structure.
      loaded: `{path: array}` of pretrained parts.
      layout: of the run.
    """
    frozen, trainable = param_paths.split(model.shapes, frozen_pattern(config))
    dtypes = dict.fromkeys(trainable, jnp.dtype(jnp.float32))
    dtypes |= {path: frozen_dtype(path, config) for path in frozen}
    places = {path: layout.stored(path, s.shape) for path, s in trainable.items()}
    places |= layout.frozen(frozen)
    # A tokenizer encoder that trains starts as a copy of the tokenizer's own.
    own = {p.replace("vq.encoder", "vq_encoder"): v for p, v in loaded.items()}
    loaded = {p: v for p, v in own.items() if p in trainable} | loaded

    def random(key: jax.Array) -> Flat:
        flat = param_paths.flatten(nnx.split(HTFA(config, rngs=streams(key)))[1])
        return {p: v.astype(dtypes[p]) for p, v in flat.items() if p not in loaded}

    shardings = {p: place for p, place in places.items() if p not in loaded}
    draw = compiled_lightly(random, out_shardings=shardings)
    params = draw(jax.random.key(config.seed)) if shardings else {}
    for path, value in loaded.items():
        params[path] = layout.put_parameter(value, dtypes[path], places[path])
    if CODE_HEAD in params.keys() - loaded.keys():

        def first_head(params: Flat) -> jax.Array:
            whole = model.merge(params)
            return whole.level3.first_head(whole.vq.vectors()).astype(dtypes[CODE_HEAD])

        params[CODE_HEAD] = jax.jit(first_head, out_shardings=places[CODE_HEAD])(params)
    return {p: params[p] for p in trainable}, {p: params[p] for p in frozen}


def new_state(
    config: Config, trainable: Flat, optimizer: optax.GradientTransformation, layout: Layout
) -> State:
    """The state at step 0."""

    def init(params: Flat) -> State:
        return {"opt_state": optimizer.init(params)} | (
            {"loss_scale": loss_scale.first()} if config.train.dtype == "float16" else {}
        )

    places = layout.state({"params": trainable} | jax.eval_shape(init, trainable))
    rest = jax.jit(init, out_shardings={k: v for k, v in places.items() if k != "params"})
    step = jax.device_put(jnp.int32(0), layout.replicated)
    return {"step": step, "params": trainable, **rest(trainable)}
