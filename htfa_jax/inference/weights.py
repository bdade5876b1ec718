"""A run's weights as the engine keeps them: laid out for decoding, cast once, or in 8 bits."""

from __future__ import annotations

import re

import jax.numpy as jnp

from htfa_jax.common.param_paths import Flat, split
from htfa_jax.config import TrainConfig
from htfa_jax.errors import ConfigError
from htfa_jax.inference.options import Quantize
from htfa_jax.models.decoding import decoding_layout
from htfa_jax.models.factory import FLOAT32_PARAMS

# What matmuls read; norms and biases are small, and float32 in the computation.
MATRICES = r".*\.(kernel|embedding)"


def for_inference(train: TrainConfig, params: Flat, quantize: Quantize | None = None) -> Flat:
    """A run's weights as `build_model(config, DecodingInternLM2)` takes them.

    The decoder is laid out for decoding, and matrices are cast to the computation's type once
    instead of at every use. Norms, alpha and the codebook stay in float32.

    Args:
      train: section of the run's configuration.
      params: all weights, in the layout of training.
      quantize: "int8" for the decoder's blocks and head.
    """
    decoder, others = split(params, r"decoder\..*")
    inside = {path.removeprefix("decoder."): v for path, v in decoder.items()}
    dtype = jnp.dtype(train.dtype)

    def is_cast(path: str) -> bool:
        return bool(re.fullmatch(MATRICES, path)) and not re.fullmatch(FLOAT32_PARAMS, path)

    def cast_down(weights: Flat) -> Flat:
        # Arrays from a file are NumPy's and stay so: nothing has to be compiled for them.
        return {path: v.astype(dtype) if is_cast(path) else v for path, v in weights.items()}

    # Cast before what is merged is copied.
    laid_out = decoding_layout(cast_down(inside))
    cast = {**cast_down(others), **{f"decoder.{path}": v for path, v in laid_out.items()}}
    if quantize is None:
        return cast
    try:
        import qwix
    except ImportError:
        raise ConfigError(
            "int8 weights need the package qwix: pip install 'htfa-jax[int8]'"
        ) from None
    kernels, rest = split(cast, r"decoder\..*\.kernel")
    rows = {p: qwix.quantize(v, jnp.int8, channelwise_axes=(0,)) for p, v in kernels.items()}
    return {**rest, **rows}
