"""The key-value cache of a decoder, and attention to it.

Slots lie within heads, [B, K, S, H], so that no step has to reorder what it reads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.kernels.matmul import _row_sums, row_product, sums_are_quick
from htfa_jax.models.layers import XAVIER


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
    """Keys and values at the slots of their positions.

    Attributes:
      k: [B, K, S, H] of one layer, or [layers, B, K, S, H] of all.
      v: the same.
    """

    k: jax.Array
    v: jax.Array


# In the layout of training one of all layers, in that of decoding one for each layer.
Cache = KVCache | tuple[KVCache, ...]


def with_room(cache: Cache, length: int) -> Cache:
    """The cache with at least `length` slots."""

    def pad(x: jax.Array) -> jax.Array:
        missing = max(0, length - x.shape[-2])
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])

    return jax.tree.map(pad, cache)


def num_slots(cache: Cache) -> int:
    """Positions that a cache has room for."""
    return jax.tree.leaves(cache)[0].shape[-2]


def with_words(
    cache: KVCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
) -> KVCache:
    """One layer's cache with the keys and values of new words at their positions.

    Of several words those behind the last slot are dropped; a single one must have a slot.
    """
    row_B1 = jnp.arange(len(positions_BT))[:, None]

    def put(old_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        if positions_BT.size == 1:
            # As a slice: assigned by an array, the slot's old content would be read for its bounds.
            start = (0, 0, positions_BT[0, 0], 0)
            return jax.lax.dynamic_update_slice(old_BKSH, new_BTKH.swapaxes(1, 2), start)
        # Rows first: the indexed axes of an assignment come before the others.
        return old_BKSH.at[row_B1, :, positions_BT].set(new_BTKH, mode="drop")

    return KVCache(k=put(cache.k, k_BTKH), v=put(cache.v, v_BTKH))


def cached_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Grouped-query attention [B, T, N, H] of words to all cached slots up to their own position.

    Softmax in float32.
    """
    weights_BKTGS = cached_weights(q_BTNH, k_BKSH, positions_BT)
    if sums_are_quick(q_BTNH):
        out_BKTGH = jnp.sum(weights_BKTGS[..., None] * v_BKSH[:, :, None, None], axis=-2)
    else:
        weights_BKTGS = weights_BKTGS.astype(v_BKSH.dtype)
        out_BKTGH = jnp.einsum("BKTGS,BKSH->BKTGH", weights_BKTGS, v_BKSH)
    return out_BKTGH.astype(v_BKSH.dtype).swapaxes(1, 2).reshape(q_BTNH.shape)


def cached_weights(q_BTNH: jax.Array, k_BKSH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """The weights [B, K, T, G, S] of `cached_attention`, float32; each row's sum is 1."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKTGH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2)
    if sums_are_quick(q_BTNH):
        q_BKTG1H = q_BKTGH[..., None, :].astype(jnp.float32)
        logits_BKTGS = jnp.sum(q_BKTG1H * k_BKSH[:, :, None, None], axis=-1)
    else:
        logits_BKTGS = jnp.einsum(
            "BKTGH,BKSH->BKTGS", q_BKTGH, k_BKSH, preferred_element_type=jnp.float32
        )
    visible_BTS = jnp.arange(S)[None, None] <= positions_BT[:, :, None]
    logits_BKTGS = jnp.where(
        visible_BTS[:, None, :, None], logits_BKTGS * H**-0.5, jnp.finfo(jnp.float32).min
    )
    return jax.nn.softmax(logits_BKTGS, axis=-1)


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
