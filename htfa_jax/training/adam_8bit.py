"""Adam whose two moments take one byte a value; small parameters have optax's own.

As in Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022), moments are kept in 8
bits with a scale for each block, and the arithmetic is float32. What differs:

- A block is a row, a parameter's last axis, not 2048 values of the flattened array. So moments
  have their parameter's shape and lie on devices as it does. A row of an embedding is a token.
- The code is a float8, not a table of 256 numbers: Adam divides one moment by the root of the
  other, so each value needs the same relative precision. The second moment, a square, spans twice
  the first one's orders of magnitude and has the float8 with the wider exponent.
- Rounding is stochastic. An update changes the second moment by about 1 - b2 of it, 0.1 percent,
  and its float8's steps are 14 to 25 percent: rounded to nearest, it would stay as it is.
- A row's scale is not its largest value but a bound of it, the moving average of the gradients'
  largest. So it is known before the moments are, and that largest is all that devices exchange
  that share a row.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat

# Parameters with fewer values (of one layer) keep float32 moments, as in the paper.
MIN_SIZE = 4096
FIRST, SECOND = jnp.float8_e4m3fn, jnp.float8_e5m2


class Adam8bitState(NamedTuple):
    """Moments of flat parameters `{path: array}`.

    Attributes:
      small: optax's state of the small parameters, and the number of updates.
      mu, nu: first and second moments of the others, float8 with the parameter's shape.
      mu_scale, nu_scale: what the largest number of their type stands for, float32 [..., 1].
    """

    small: Any
    mu: Flat
    nu: Flat
    mu_scale: Flat
    nu_scale: Flat


def is_large(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter's moments are kept in 8 bits."""
    own = shape[1:] if param_paths.is_stacked(path) else shape
    return len(own) > 1 and math.prod(own) >= MIN_SIZE


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """What `optax.scale_by_adam` does, on flat dictionaries, in a quarter of its memory.

    Random numbers are a function of the number of updates and of the path, so a resumed run
    repeats them, on any mesh.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def split(flat: Flat) -> tuple[Flat, Flat]:
        large = {path: x for path, x in flat.items() if is_large(path, x.shape)}
        return large, {path: x for path, x in flat.items() if path not in large}

    def init(params: Flat) -> Adam8bitState:
        large, small = split(params)

        def zeros(dtype: Any) -> Flat:
            return {path: jnp.zeros(x.shape, dtype) for path, x in large.items()}

        def scales() -> Flat:
            return {path: jnp.zeros((*x.shape[:-1], 1)) for path, x in large.items()}

        return Adam8bitState(adam.init(small), zeros(FIRST), zeros(SECOND), scales(), scales())

    def update(grads: Flat, state: Adam8bitState, params: Flat | None = None):
        del params
        large, small = split(grads)
        updates, small = adam.update(small, state.small)
        new = Adam8bitState(small, {}, {}, {}, {})
        key = jax.random.fold_in(jax.random.key(0), small.count)
        for path, grad in large.items():
            mu = dequantize(state.mu[path], state.mu_scale[path])
            nu = dequantize(state.nu[path], state.nu_scale[path])
            mu, nu = b1 * mu + (1 - b1) * grad, b2 * nu + (1 - b2) * grad**2
            updates[path] = optax.tree.bias_correction(mu, b1, small.count) / (
                jnp.sqrt(optax.tree.bias_correction(nu, b2, small.count)) + eps
            )
            top = jnp.max(jnp.abs(grad), axis=-1, keepdims=True)
            mu_scale = new.mu_scale[path] = b1 * state.mu_scale[path] + (1 - b1) * top
            nu_scale = new.nu_scale[path] = b2 * state.nu_scale[path] + (1 - b2) * top**2
            # Rounded to 0, a small second moment would make the next update many times too large:
            # it is divided by. So the smallest number that float8 has stands in its place.
            nu = jnp.maximum(nu, dequantize(jnp.finfo(SECOND).smallest_subnormal, nu_scale))
            noises = two_noises(jax.random.fold_in(key, zlib.crc32(path.encode())), grad.shape)
            new.mu[path] = quantize(mu, mu_scale, FIRST, noises[0])
            new.nu[path] = quantize(nu, nu_scale, SECOND, noises[1])
        return updates, new

    return optax.GradientTransformation(init, update)


def quantize(x: jax.Array, scale: jax.Array, dtype: Any, noise: jax.Array) -> jax.Array:
    """float32 to float8: to one of the two neighbours, on the average to `x`.

    Args:
      x: [..., row].
      scale: [..., 1], at least as large as any |x| of the row.
      dtype: a float8; its largest number stands for `scale`.
      noise: shape of `x`, uniform in (0, 1); 0.5 rounds to nearest.
    """
    info = jnp.finfo(dtype)
    top, eps, normal = float(info.max), float(info.eps), float(info.smallest_normal)
    x = x / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny) * top
    # Without sign and mantissa a float32 is the power of 2 at or below it.
    exponent = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    step = jnp.maximum(jax.lax.bitcast_convert_type(exponent, jnp.float32), normal) * eps
    return jnp.clip(jnp.floor(x / step + noise) * step, -top, top).astype(dtype)


def dequantize(code: jax.Array, scale: jax.Array) -> jax.Array:
    """The float32 values that `encode` rounded, from float8 [..., row] and scales [..., 1]."""
    return code.astype(jnp.float32) * (scale / float(jnp.finfo(code.dtype).max))


def two_noises(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Two arrays of uniform numbers in (0, 1), of 16 random bits each."""
    bits = jax.random.bits(key, shape)

    def uniform(half: jax.Array) -> jax.Array:
        return (half.astype(jnp.float32) + 0.5) / 2**16

    return uniform(bits >> 16), uniform(bits & 0xFFFF)
