"""Linear layers for decoding, which reads all weights for every word and should do no more."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.layers import XAVIER
from htfa_jax.models.kv_cache import sums_are_quick


class RowLinear(nnx.Module):
    """A linear layer without bias for decoding: its weights are rows [out, in].

    Args:
      in_features: D.
      out_features: F.
      dtype: of the computation; weights of another type are cast at every call.
    """

    def __init__(self, in_features: int, out_features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(XAVIER(rngs.params(), (out_features, in_features), jnp.float32))

    def __call__(
        self,
        x_BTD: jax.Array,
        out_dtype: jnp.dtype | None = None,
        *,
        norm: nnx.RMSNorm | None = None,
    ) -> jax.Array:
        """[B, T, D] -> [B, T, F].

        Args:
          x_BTD: what to multiply.
          out_dtype: of the product; that of the inputs by default.
          norm: of the inputs before they are multiplied, if any.
        """
        kernel_FD = self.kernel.get_value().astype(self.dtype)
        if sums_are_quick(x_BTD) and isinstance(kernel_FD, jax.Array):
            return _row_sums(kernel_FD, x_BTD, norm).astype(out_dtype or x_BTD.dtype)
        return row_product(kernel_FD, x_BTD if norm is None else norm(x_BTD), out_dtype)


def row_product(kernel_FD: Any, x_BTD: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x W^T for rows of weights: [B, T, D] -> [B, T, F].

    The weights stand first in the product. XLA's CPU matrix product then streams them at the
    memory's speed for any small B * T; the other way round it does so for B * T = 1 only.

    Args:
      kernel_FD: an array, or one that Qwix has quantized.
      x_BTD: what to multiply.
      out_dtype: of the product; that of the inputs by default.
    """
    if isinstance(kernel_FD, jax.Array):
        dot_general = jax.lax.dot_general
    else:
        from qwix import dot_general  # an optional package
    product_FBT = dot_general(
        kernel_FD, x_BTD, (((1,), (2,)), ((), ())), preferred_element_type=out_dtype
    )
    return product_FBT.transpose(1, 2, 0)


def _row_sums(kernel_FD: jax.Array, x_11D: jax.Array, norm: nnx.RMSNorm | None) -> jax.Array:
    """The product [1, 1, F] of a single word, in float32.

    The norm divides by one number, which is applied behind the product: nothing waits for it.
    """
    x_D, factor = x_11D[0, 0].astype(jnp.float32), 1.0
    if norm is not None:
        factor = jax.lax.rsqrt(jnp.mean(x_D * x_D) + norm.epsilon)
        x_D = x_D * norm.scale[...]
    return (factor * jnp.sum(kernel_FD * x_D[None], axis=1))[None, None]
