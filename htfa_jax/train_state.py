"""The training state: trainable parameters, optimizer state and step; frozen weights beside it.

Parameters are flat dictionaries `{path: array}` (see `paths`). Trainable ones are float32 and
have optimizer moments; frozen ones have neither gradients nor moments.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from htfa_jax import parts, paths
from htfa_jax.checkpoint import load_run
from htfa_jax.config import Config
from htfa_jax.models.htfa import HTFA
from htfa_jax.optim import frozen_pattern
from htfa_jax.paths import Flat

log = logging.getLogger(__name__)

# Rounding the codebook would change which code is nearest.
ALWAYS_FLOAT32 = r"vq\.codebook"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's structure without its weights.

    Attributes:
      graphdef: static structure, for `merge`.
      shapes: `{path: ShapeDtypeStruct}` of all parameters.
    """

    graphdef: Any
    shapes: Flat

    def merge(self, *params: Mapping[str, Any]) -> HTFA:
        """The module with these weights, which together must be all."""
        flat = {path: value for group in params for path, value in group.items()}
        return nnx.merge(self.graphdef, paths.unflatten(flat))


def build(config: Config, decoding: bool = False) -> Model:
    """The structure of the model that a configuration describes; allocates nothing.

    Args:
      config: of the run.
      decoding: the layout of the decoder's weights (see `models.internlm2`).
    """
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: HTFA(config, decoding=decoding, rngs=nnx.Rngs(0)))
    )
    return Model(graphdef, paths.flatten(state))


def frozen_dtype(path: str, config: Config) -> jnp.dtype:
    """What a frozen parameter is stored as."""
    keeps = re.fullmatch(ALWAYS_FLOAT32, path)
    return jnp.dtype(jnp.float32 if keeps else config.train.frozen_dtype)


def new_params(config: Config, model: Model, loaded: Flat) -> tuple[Flat, Flat]:
    """Trainable (float32) and frozen parameters: `loaded` ones, the others at random.

    Args:
      config: the run's configuration.
      model: its structure.
      loaded: `{path: array}` of pretrained parts.
    """
    is_frozen, _ = paths.split(model.shapes, frozen_pattern(config))

    def dtype_of(path: str) -> jnp.dtype:
        return frozen_dtype(path, config) if path in is_frozen else jnp.dtype(jnp.float32)

    @jax.jit
    def random(key: jax.Array) -> Flat:
        flat = paths.flatten(nnx.split(HTFA(config, rngs=nnx.Rngs(key)))[1])
        return {p: v.astype(dtype_of(p)) for p, v in flat.items() if p not in loaded}

    params = random(jax.random.key(config.seed))
    params |= {p: jnp.asarray(v, dtype_of(p)) for p, v in loaded.items()}
    copied = "vq_encoder.conv_in.kernel"
    if copied in params and copied not in loaded and "vq.encoder.conv_in.kernel" in loaded:
        # The trained encoder starts as the tokenizer's own; copied, since it will be donated.
        for path in paths.split(params, r"vq_encoder\..*")[0]:
            params[path] = jnp.array(loaded[path.replace("vq_encoder", "vq.encoder")], jnp.float32)
    frozen, trainable = paths.split(params, frozen_pattern(config))
    return trainable, frozen


def load_pretrained(config: Config, model: Model) -> Flat:
    """The weights that `config.pretrained` names, as `{path: array}`; says what starts random."""
    if config.pretrained.run is not None:
        _, loaded, step, _ = load_run(config.pretrained.run, lambda c: build(c).shapes)
        # A tokenizer encoder that trains may be new in this run: it starts as a copy.
        copied, needed = paths.split(model.shapes, r"vq_encoder\..*")
        parts.check_shapes(
            loaded, needed | (copied if set(copied) & set(loaded) else {}), config.pretrained.run
        )
        log.info("all weights from %s, step %d", config.pretrained.run, step)
        return loaded
    loaded = {}
    for part, family in parts.FAMILIES.items():
        folder, sizes = getattr(config.pretrained, part), getattr(config, part)
        inside, _ = paths.split(model.shapes, rf"{part}\..*")
        if not inside:
            continue
        if folder is None:
            _say_random(config, part)
            continue
        shapes = {path.removeprefix(part + "."): s for path, s in inside.items()}
        # Position embeddings are made for one size of pictures.
        facts = {"image_size": config.image_size} if part == "siglip" else {}
        arrays = parts.load_part(folder, family, sizes, shapes, **facts)
        loaded |= {f"{part}.{path}": value for path, value in arrays.items()}
        log.info("%s: weights from %s", part, folder)
    if config.pretrained.htfa is not None:
        loaded |= parts.load_levels(config, model.shapes)
    return loaded


def _say_random(config: Config, part: str) -> None:
    if part != "vq" and not config.is_frozen(part):
        freeze = getattr(config.freeze, part)
        flag = f", whatever freeze.{part}=True says" if freeze else ""
        log.warning("%s: no pretrained weights; it starts random and is trained%s", part, flag)
    else:
        log.warning("%s: starts random and stays so; results will mean nothing", part)


def new_state(trainable: Flat, optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """The state at step 0."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": trainable,
        "opt_state": optimizer.init(trainable),
    }
