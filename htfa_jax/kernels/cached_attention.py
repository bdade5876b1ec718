"""Attention to a key-value cache, whose slots lie within heads: [B, K, S, H]."""

import jax
import jax.numpy as jnp

from htfa_jax.kernels.matmul import is_one_token_on_gpu


def cached_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Grouped-query attention [B, T, N, H] of tokens to all slots up to their own position.

    softmax(q k^T / sqrt(H)) v, the softmax in float32. Both matmuls are elementwise sums where that
    is faster; see `is_one_token_on_gpu`.
    """
    weights_BKTGS = cached_attention_weights(q_BTNH, k_BKSH, positions_BT)
    if is_one_token_on_gpu(q_BTNH):
        out_BKTGH = jnp.sum(weights_BKTGS[..., None] * v_BKSH[:, :, None, None], axis=-2)
    else:
        weights_BKTGS = weights_BKTGS.astype(v_BKSH.dtype)
        out_BKTGH = jnp.einsum("BKTGS,BKSH->BKTGH", weights_BKTGS, v_BKSH)
    return out_BKTGH.astype(v_BKSH.dtype).swapaxes(1, 2).reshape(q_BTNH.shape)


def cached_attention_weights(
    q_BTNH: jax.Array, k_BKSH: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """The weights [B, K, T, G, S] of `cached_attention`, float32; each row's sum is 1."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKTGH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2)
    if is_one_token_on_gpu(q_BTNH):
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
