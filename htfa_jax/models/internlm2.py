"""InternLM2 decoder: RMSNorm, grouped-query attention, rotary positions, SwiGLU.

Cai et al., "InternLM2 Technical Report" (2024). The same architecture as Llama; only the checkpoint
layout differs. Qwen2 adds biases to queries, keys and values. This is the form that trains;
`decoding` has the one that decodes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.config import DecoderConfig
from htfa_jax.kernels.attention import attention
from htfa_jax.kernels.cached_attention import cached_attention, cached_attention_weights
from htfa_jax.kernels.matmul import float32_dot
from htfa_jax.models.kv_cache import Cache, KVCache, with_tokens
from htfa_jax.models.layers import (
    Remat,
    apply_rope,
    dropout,
    linear,
    run_layers,
    split_key,
    stack_layers,
)

VOCAB_MULTIPLE = 128

Heads = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass
class AttentionOutput:
    """What a decoder gives when attention weights are asked for.

    Attributes:
      hidden_BTD: hidden states after the final norm.
      cache: with the new positions in it.
      attention: what was kept of every layer's weights, with a leading layer axis.
    """

    hidden_BTD: jax.Array
    cache: Cache
    attention: Any


class Attention(nnx.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.head_dim = config, config.embed_dim // config.num_heads
        size, kv_size = config.embed_dim, config.num_kv_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = linear(size, size, bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = linear(size, kv_size, bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = linear(size, kv_size, bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = linear(size, size, bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        out_BTNH, cache = attend(*self.project(x_BTD, positions_BT), positions_BT, cache)
        return self.o_proj(out_BTNH.reshape(x_BTD.shape)), cache

    def project(self, x_BTD: jax.Array, positions_BT: jax.Array) -> Heads:
        """Queries [B, T, N, H], keys and values [B, T, K, H], the first two rotated."""
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH = self.q_proj(x_BTD).reshape(heads)
        k_BTKH = self.k_proj(x_BTD).reshape(heads)
        v_BTKH = self.v_proj(x_BTD).reshape(heads)
        return *rotated(self.config, q_BTNH, k_BTKH, positions_BT), v_BTKH


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

    def attention_weights(
        self, x_BTD: jax.Array, positions_BT: jax.Array, k_BKSH: jax.Array
    ) -> jax.Array:
        """The weights [B, N, T, S] with which this block's input attends to a filled cache."""
        q_BTNH, _, _ = self.attention.project(self.norm1(x_BTD), positions_BT)
        return weights_by_head(q_BTNH, k_BKSH, positions_BT)


class InternLM2(nnx.Module):
    """Token embedding, decoder blocks, final norm and LM head, each usable by itself.

    The vocabulary is padded to a multiple of 128; the padding's logits are minus infinity.
    Without text there is neither embedding nor head. The layers are stacked, so that `lax.scan`
    compiles one block.

    Args:
      config: sizes.
      with_text: whether it has embedding and head.
      dtype: of the computation.
      remat: what the backward pass computes again.
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
        self.config, self.remat, self.dtype = config, remat, dtype
        if with_text:
            self.embed = embedding(config, dtype=dtype, rngs=rngs)
        self.layers = stack_layers(
            lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.num_layers, rngs
        )
        self.norm = rms_norm(config, dtype=dtype, rngs=rngs)
        if with_text and not config.tie_head:
            size = padded_vocab_size(config)
            self.head = linear(config.embed_dim, size, bias=False, dtype=dtype, rngs=rngs)

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
            goes behind a row's last token: nothing real attends to it, and the tokens that
            follow take its slots.
          key: dropout key, None in evaluation.

        Returns:
          Hidden states [B, T, D] and the cache with these positions in it (None without one).
        """
        keys = None if key is None else jax.random.split(key, self.config.num_layers)

        def apply(block: Block, x_BTD: jax.Array, extra: Any) -> tuple[jax.Array, Any]:
            cache, key = extra
            return block(x_BTD, positions_BT, cache, key)

        x_BTD, cache = run_layers(self.layers, x_BTD, apply, (cache, keys), self.remat)
        return self.norm(x_BTD), cache

    def with_attention(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache,
        keep: Callable[[jax.Array], Any],
    ) -> AttentionOutput:
        """`__call__` with a cache, and the attention weights.

        They are computed from the queries once more, so that a call without them costs nothing.

        Args:
          x_BTD, positions_BT, cache: as in `__call__`.
          keep: from one layer's weights [B, N, T, S] to what is wanted of them: all of a long
            sequence would not fit.
        """

        def apply(block: Block, x_BTD: jax.Array, cache: KVCache) -> tuple[jax.Array, Any]:
            out_BTD, cache = block(x_BTD, positions_BT, cache, None)
            return out_BTD, (cache, keep(block.attention_weights(x_BTD, positions_BT, cache.k)))

        x_BTD, (cache, kept) = run_layers(self.layers, x_BTD, apply, cache, self.remat)
        return AttentionOutput(self.norm(x_BTD), cache, kept)

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache for sequences of up to `length` positions."""
        zeros = jnp.zeros((self.config.num_layers, *cache_shape(self.config, batch, length)))
        return KVCache(k=zeros.astype(self.dtype), v=zeros.astype(self.dtype))

    def head_kernel(self) -> jax.Array:
        """The LM head's matrix [D, padded V]."""
        return self.embed.embedding[...].T if self.config.tie_head else self.head.kernel[...]

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Text logits [B, T, padded V] in float32."""
        return self.logits_by(self.head_kernel(), hidden_BTD)

    def logits_by(self, kernel_DV: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
        """`logits` by another matrix [D, padded V]."""
        logits_BTV = float32_dot(hidden_BTD.astype(self.dtype), kernel_DV)
        return without_padding(self.config, logits_BTV)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    cache: KVCache | None,
) -> tuple[jax.Array, KVCache | None]:
    """Causal attention [B, T, N, H] to these tokens and those in the cache, which then has both."""
    if cache is None:
        return attention(q_BTNH, k_BTKH, v_BTKH, causal=True), None
    cache = with_tokens(cache, k_BTKH, v_BTKH, positions_BT)
    return cached_attention(q_BTNH, cache.k, cache.v, positions_BT), cache


def weights_by_head(q_BTNH: jax.Array, k_BKSH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """The attention weights [B, N, T, S] of queries to a filled cache."""
    B, T, N, _ = q_BTNH.shape
    weights_BKTGS = cached_attention_weights(q_BTNH, k_BKSH, positions_BT)
    return weights_BKTGS.swapaxes(2, 3).reshape(B, N, T, k_BKSH.shape[2])


def rotated(
    config: DecoderConfig, q_BTNH: jax.Array, k_BTKH: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys with their rotary positions."""
    theta, factor = config.rope_theta, config.rope_factor
    return tuple(apply_rope(x, positions_BT, theta, factor) for x in (q_BTNH, k_BTKH))


def padded_vocab_size(config: DecoderConfig) -> int:
    """Rows of embedding and head."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def without_padding(config: DecoderConfig, logits_BTV: jax.Array) -> jax.Array:
    """Logits of which those behind the vocabulary are minus infinity."""
    real_V = jnp.arange(logits_BTV.shape[-1]) < config.vocab_size
    return jnp.where(real_V[None, None], logits_BTV, -jnp.inf)


def cache_shape(config: DecoderConfig, batch: int, length: int) -> tuple[int, int, int, int]:
    """[B, K, S, H] of one layer's keys."""
    return batch, config.num_kv_heads, length, config.embed_dim // config.num_heads


def embedding(config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Embed:
    """The token embedding, [padded V, D]."""
    return nnx.Embed(
        padded_vocab_size(config),
        config.embed_dim,
        dtype=dtype,
        param_dtype=jnp.float32,
        embedding_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


def rms_norm(config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMS norm with float32 statistics."""
    return nnx.RMSNorm(
        config.embed_dim,
        epsilon=config.rms_norm_eps,
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )
