"""InternLM2 decoder: RMSNorm, grouped-query attention, rotary positions, SwiGLU, no biases.

Cai et al., "InternLM2 Technical Report" (2024). The same architecture as Llama; only the
checkpoint layout differs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.attention import attention
from htfa_jax.config import DecoderConfig
from htfa_jax.layers import (
    Remat,
    apply_rope,
    dropout,
    float32_dot,
    linear,
    run_layers,
    split_key,
    stack_layers,
)

VOCAB_MULTIPLE = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
    """Keys and values of every layer, at the slots of their positions.

    Attributes:
      k: [layers, B, S, K, H]
      v: [layers, B, S, K, H]
    """

    k: jax.Array
    v: jax.Array


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache for sequences of up to `length` positions."""
    head_dim = config.embed_dim // config.num_heads
    shape = (config.num_layers, batch, length, config.num_kv_heads, head_dim)
    return KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


class Attention(nnx.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.head_dim = config.embed_dim // config.num_heads
        self.rope = config.rope_theta, config.rope_factor
        size, kv_size = config.embed_dim, config.num_kv_heads * self.head_dim
        self.q_proj = linear(size, size, bias=False, dtype=dtype, rngs=rngs)
        self.k_proj = linear(size, kv_size, bias=False, dtype=dtype, rngs=rngs)
        self.v_proj = linear(size, kv_size, bias=False, dtype=dtype, rngs=rngs)
        self.o_proj = linear(size, size, bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH = apply_rope(self.q_proj(x_BTD).reshape(heads), positions_BT, *self.rope)
        k_BSKH = apply_rope(self.k_proj(x_BTD).reshape(heads), positions_BT, *self.rope)
        v_BSKH = self.v_proj(x_BTD).reshape(heads)
        if cache is None:
            out_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, causal=True)
        else:
            row_B1 = jnp.arange(len(x_BTD))[:, None]
            k_BSKH = cache.k.at[row_B1, positions_BT].set(k_BSKH, mode="drop")
            v_BSKH = cache.v.at[row_B1, positions_BT].set(v_BSKH, mode="drop")
            cache = KVCache(k=k_BSKH, v=v_BSKH)
            slot_S = jnp.arange(k_BSKH.shape[1])
            mask_B1TS = slot_S[None, None, None, :] <= positions_BT[:, None, :, None]
            out_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, mask_B1TS=mask_B1TS)
        return self.o_proj(out_BTNH.reshape(x_BTD.shape)), cache


class Block(nnx.Module):
    """Pre-norm block with a SwiGLU MLP."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        size, hidden = config.embed_dim, config.mlp_dim
        self.dropout = config.dropout
        self.norm1 = rms_norm(config, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.norm2 = rms_norm(config, dtype=dtype, rngs=rngs)
        self.gate_proj = linear(size, hidden, bias=False, dtype=dtype, rngs=rngs)
        self.up_proj = linear(size, hidden, bias=False, dtype=dtype, rngs=rngs)
        self.down_proj = linear(hidden, size, bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        attention_key, mlp_key = split_key(key, 2)
        out_BTD, cache = self.attention(self.norm1(x_BTD), positions_BT, cache)
        x_BTD = x_BTD + dropout(out_BTD, self.dropout, attention_key)
        y_BTD = self.norm2(x_BTD)
        y_BTD = self.down_proj(jax.nn.silu(self.gate_proj(y_BTD)) * self.up_proj(y_BTD))
        return x_BTD + dropout(y_BTD, self.dropout, mlp_key), cache


class InternLM2(nnx.Module):
    """Token embedding, decoder blocks, final norm and text head, each usable by itself.

    The vocabulary is padded to a multiple of 128; padded words have logits of minus infinity.
    Without text there is neither embedding nor head.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        with_text: bool = True,
        dtype: jnp.dtype,
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ):
        self.remat, self.dtype = remat, dtype
        self.vocab_size, self.tie_head = config.vocab_size, config.tie_head
        self.num_layers = config.num_layers
        padded = -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        if with_text:
            self.embed = nnx.Embed(
                padded,
                config.embed_dim,
                dtype=dtype,
                param_dtype=jnp.float32,
                embedding_init=nnx.initializers.normal(0.02),
                rngs=rngs,
            )
        self.layers = stack_layers(
            lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.num_layers, rngs
        )
        self.norm = rms_norm(config, dtype=dtype, rngs=rngs)
        if with_text and not config.tie_head:
            self.head = linear(config.embed_dim, padded, bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Embeddings to hidden states after the final norm.

        Args:
          x_BTD: embeddings.
          positions_BT: their positions; without a cache 0, 1, 2, ...
          cache: earlier keys and values; every position below these must be filled. Padding
            goes behind a row's last word: nothing real attends to it, and the words that
            follow take its slots.
          key: dropout key, None in evaluation.

        Returns:
          Hidden states [B, T, D] and the cache with these positions in it (None without one).
        """
        keys = None if key is None else jax.random.split(key, self.num_layers)

        def apply(block, x_BTD, extra):
            cache, key = extra
            return block(x_BTD, positions_BT, cache, key)

        x_BTD, cache = run_layers(self.layers, x_BTD, apply, (cache, keys), self.remat)
        return self.norm(x_BTD), cache

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Text logits [B, T, padded V] in float32."""
        return self.logits_by(self.head_kernel(), hidden_BTD)

    def head_kernel(self) -> jax.Array:
        """The text head's matrix [D, padded V]."""
        return self.embed.embedding[...].T if self.tie_head else self.head.kernel[...]

    def logits_by(self, kernel_DV: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
        """Text logits [B, T, padded V] in float32 by a matrix [D, padded V]."""
        logits_BTV = float32_dot(hidden_BTD.astype(self.dtype), kernel_DV)
        real_V = jnp.arange(kernel_DV.shape[1]) < self.vocab_size
        return jnp.where(real_V[None, None], logits_BTV, -jnp.inf)


def rms_norm(config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMS norm with float32 statistics."""
    return nnx.RMSNorm(
        config.embed_dim,
        epsilon=config.rms_norm_eps,
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )
