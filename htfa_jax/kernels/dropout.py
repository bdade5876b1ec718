"""Which values dropout keeps."""

import jax
import jax.numpy as jnp


def dropout_mask(shape: tuple[int, ...], rate: float, key: jax.Array) -> jax.Array:
    """`jax.random.bernoulli(key, 1 - rate, shape)`, the rate rounded to 16 bits.

    Drawing is what dropout costs, so each random 32-bit integer serves two values: 4.3 instead of
    5.7 ms of a `standard` step on an H200.
    """
    *rest, length = shape
    bits = jax.random.bits(key, (*rest, 1, -(-length // 2)), jnp.uint32)
    # Without the barrier XLA draws once for each half.
    bits = jax.lax.optimization_barrier(bits)
    shift = jnp.array([0, 16], jnp.uint32).reshape(*[1] * len(rest), 2, 1)
    halves = (bits >> shift) & 0xFFFF
    halves = halves.reshape(*rest, 2 * bits.shape[-1])[..., :length]
    return halves >= round(rate * 2**16)
