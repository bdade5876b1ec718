"""Level 2: spatial attention, queries from the original, keys from the aligned reconstruction.

F_spatial = LayerNorm(softmax(Q K^T / sqrt(d)) V + F_orig): Q from the original's features, K
from the reconstruction's in the original's frame, V from those too or from the fused image's.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.config import Level2Config
from htfa_jax.kernels.attention import attention
from htfa_jax.kernels.matmul import float32_einsum
from htfa_jax.models.layers import drop, keep_mask, layer_norm, linear


class SpatialAttention(nnx.Module):
    """Cross-attention over the patches of two or three images.

    Args:
      config: Level 2 part of the configuration.
      embed_dim: width of the features.
      dtype: of the computation.
    """

    def __init__(self, config: Level2Config, embed_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.q_proj = linear(embed_dim, embed_dim, dtype=dtype, rngs=rngs)
        self.k_proj = linear(embed_dim, embed_dim, dtype=dtype, rngs=rngs)
        self.v_proj = linear(embed_dim, embed_dim, dtype=dtype, rngs=rngs)
        self.o_proj = linear(embed_dim, embed_dim, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(embed_dim, 1e-5, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        orig_BPD: jax.Array,
        recon_BPD: jax.Array,
        values_BPD: jax.Array,
        key_mask_BP: jax.Array | None = None,
        key: jax.Array | None = None,
        *,
        with_weights: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns F_spatial [B, P, D] and the attention weights [B, N, P, P] before dropout.

        Args:
          orig_BPD: features of the original.
          recon_BPD: features of the reconstruction, already in the original's frame.
          values_BPD: features that are attended to, of the reconstruction or the fused image.
          key_mask_BP: keys that may be attended to; None means all. A sample with no key left
            keeps the original's features.
          key: dropout key, None in evaluation.
          with_weights: whether the weights are wanted; None stands for them otherwise.
        """
        B, P, D = orig_BPD.shape
        heads = (B, P, self.num_heads, D // self.num_heads)
        q_BTNH = self.q_proj(orig_BPD).reshape(heads)
        k_BSNH = self.k_proj(recon_BPD).reshape(heads)
        v_BSNH = self.v_proj(values_BPD).reshape(heads)
        weights_BNTS = None
        keep_BNTS = keep_mask((B, self.num_heads, P, P), self.dropout, key)
        if with_weights or keep_BNTS is not None:
            out_BTNH, weights_BNTS = attention_and_weights(
                q_BTNH, k_BSNH, v_BSNH, key_mask_BP, keep_BNTS, self.dropout
            )
        else:
            out_BTNH = attention(q_BTNH, k_BSNH, v_BSNH, key_mask_BS=key_mask_BP)
        out_BPD = self.o_proj(out_BTNH.reshape(B, P, D))
        if key_mask_BP is not None:
            out_BPD = jnp.where(key_mask_BP.any(axis=1)[:, None, None], out_BPD, 0)
        return self.norm(out_BPD + orig_BPD), weights_BNTS if with_weights else None


# The backward pass computes the weights again: kept, they would be most of what the whole model
# keeps for it. The dropout mask is an argument and so is kept: it takes a tenth of the weights'
# memory, and to draw it again takes longer.
@functools.partial(jax.checkpoint, static_argnums=5)
def attention_and_weights(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    key_mask_BS: jax.Array | None,
    keep_BNTS: jax.Array | None,
    rate: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention [B, T, N, H] with dropout on its weights, and the weights [B, N, T, S] before.

    Dropout, at a rate, leaves the weights in `keep_BNTS`; see `layers.keep_mask`.
    """
    logits_BNTS = float32_einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * (q_BTNH.shape[-1] ** -0.5)
    if key_mask_BS is not None:
        lowest = jnp.finfo(jnp.float32).min
        logits_BNTS = jnp.where(key_mask_BS[:, None, None, :], logits_BNTS, lowest)
    weights_BNTS = jax.nn.softmax(logits_BNTS, axis=-1)
    dropped_BNTS = drop(weights_BNTS, rate, keep_BNTS).astype(v_BSNH.dtype)
    # The TPU compiler (libtpu 0.0.42) overflows its stack where it may draw the random numbers
    # inside of the product.
    dropped_BNTS = jax.lax.optimization_barrier(dropped_BNTS)
    return jnp.einsum("BNTS,BSNH->BTNH", dropped_BNTS, v_BSNH), weights_BNTS


def attention_entropy(weights_BNTS: jax.Array) -> jax.Array:
    """Entropy of the attention rows in nats [B], mean over heads and queries."""
    logs = jnp.log(weights_BNTS + 1e-8)
    return -jnp.mean(jnp.sum(weights_BNTS * logs, axis=-1), axis=(1, 2))
