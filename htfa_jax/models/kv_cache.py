"""The key-value cache of a decoder."""

import dataclasses

import jax
import jax.numpy as jnp


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


# `InternLM2` has one of all layers, `DecodingInternLM2` one for each layer.
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


def with_tokens(
    cache: KVCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
) -> KVCache:
    """One layer's cache with the keys and values of new tokens at their positions.

    Of several tokens those behind the last slot are dropped; a single one must have a slot.
    """
    row_B1 = jnp.arange(len(positions_BT))[:, None]

    def put(old_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        if positions_BT.size == 1:
            # Assigning through an index array reads the slot's old content too, to keep it where
            # an index is out of bounds. A slice update only writes.
            start = (0, 0, positions_BT[0, 0], 0)
            return jax.lax.dynamic_update_slice(old_BKSH, new_BTKH.swapaxes(1, 2), start)
        # Rows first: the indexed axes of an assignment come before the others.
        return old_BKSH.at[row_B1, :, positions_BT].set(new_BTKH, mode="drop")

    return KVCache(k=put(cache.k, k_BTKH), v=put(cache.v, v_BTKH))
