"""InternLM2 decoder: RMSNorm, grouped-query attention, rotary positions, SwiGLU, no biases.

Cai et al., "InternLM2 Technical Report" (2024). The same architecture as Llama; only the
checkpoint layout differs.

The weights come in two layouts. Training stacks the layers, for `lax.scan` compiles one block,
and keeps kernels [in, out]. Decoding reads all weights for every word and should do nothing else:
a scan would first copy each layer out of the stack, so there each layer stands by itself, and its
kernels are rows [out, in] (`layers.RowLinear`). `decoding_layout` turns one into the other.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.attention import attention
from htfa_jax.config import DecoderConfig
from htfa_jax.layers import (
    Remat,
    RowLinear,
    apply_rope,
    cached_attention,
    cached_weights,
    dropout,
    float32_dot,
    linear,
    row_product,
    run_layers,
    split_key,
    stack_layers,
)
from htfa_jax.paths import Flat

VOCAB_MULTIPLE = 128


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


@dataclasses.dataclass
class Watched:
    """What `InternLM2.watch` gives back.

    Attributes:
      hidden_BTD: hidden states after the final norm.
      cache: with the new positions in it.
      kept: what was kept of every layer's weights, with a leading layer axis.
    """

    hidden_BTD: jax.Array
    cache: "Cache"
    kept: Any


class Attention(nnx.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: DecoderConfig, *, decoding: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.head_dim = config.embed_dim // config.num_heads
        self.rope = config.rope_theta, config.rope_factor
        size, kv_size = config.embed_dim, config.num_kv_heads * self.head_dim
        self.q_proj = projection(size, size, decoding, dtype=dtype, rngs=rngs)
        self.k_proj = projection(size, kv_size, decoding, dtype=dtype, rngs=rngs)
        self.v_proj = projection(size, kv_size, decoding, dtype=dtype, rngs=rngs)
        self.o_proj = projection(size, size, decoding, dtype=dtype, rngs=rngs)

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
            # Rows first: the indexed axes of an assignment come before the others.
            k_BKSH = cache.k.at[row_B1, :, positions_BT].set(k_BSKH, mode="drop")
            v_BKSH = cache.v.at[row_B1, :, positions_BT].set(v_BSKH, mode="drop")
            cache = KVCache(k=k_BKSH, v=v_BKSH)
            out_BTNH = cached_attention(q_BTNH, k_BKSH, v_BKSH, positions_BT)
        return self.o_proj(out_BTNH.reshape(x_BTD.shape)), cache

    def weights(self, x_BTD: jax.Array, positions_BT: jax.Array, k_BKSH: jax.Array) -> jax.Array:
        """The weights [B, N, T, S] with which inputs attend to the slots of a filled cache."""
        B, T, _ = x_BTD.shape
        q_BTNH = self.q_proj(x_BTD).reshape(B, T, -1, self.head_dim)
        q_BTNH = apply_rope(q_BTNH, positions_BT, *self.rope)
        weights_BKTGS = cached_weights(q_BTNH, k_BKSH, positions_BT)
        return weights_BKTGS.swapaxes(2, 3).reshape(B, q_BTNH.shape[2], T, k_BKSH.shape[2])


class Block(nnx.Module):
    """Pre-norm block with a SwiGLU MLP."""

    def __init__(self, config: DecoderConfig, *, decoding: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        size, hidden = config.embed_dim, config.mlp_dim
        self.dropout = config.dropout
        self.norm1 = rms_norm(config, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, decoding=decoding, dtype=dtype, rngs=rngs)
        self.norm2 = rms_norm(config, dtype=dtype, rngs=rngs)
        self.gate_proj = projection(size, hidden, decoding, dtype=dtype, rngs=rngs)
        self.up_proj = projection(size, hidden, decoding, dtype=dtype, rngs=rngs)
        self.down_proj = projection(hidden, size, decoding, dtype=dtype, rngs=rngs)

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

    Args:
      config: sizes.
      with_text: whether it has embedding and head.
      decoding: the layout of the weights, see above.
      dtype: of the computation.
      remat: what the backward pass computes again.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        with_text: bool = True,
        decoding: bool = False,
        dtype: jnp.dtype,
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ):
        self.config, self.remat, self.dtype, self.decoding = config, remat, dtype, decoding
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

        def block(rngs: nnx.Rngs) -> Block:
            return Block(config, decoding=decoding, dtype=dtype, rngs=rngs)

        if decoding:
            self.layers = nnx.List(block(rngs) for _ in range(config.num_layers))
        else:
            self.layers = stack_layers(block, config.num_layers, rngs)
        self.norm = rms_norm(config, dtype=dtype, rngs=rngs)
        if with_text and not config.tie_head:
            self.head = projection(config.embed_dim, padded, decoding, dtype=dtype, rngs=rngs)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for sequences of up to `length` positions."""
        c = self.config
        shape = (batch, c.num_kv_heads, length, c.embed_dim // c.num_heads)
        if self.decoding:
            return tuple(
                KVCache(k=jnp.zeros(shape, self.dtype), v=jnp.zeros(shape, self.dtype))
                for _ in range(c.num_layers)
            )
        stacked = (c.num_layers, *shape)
        return KVCache(k=jnp.zeros(stacked, self.dtype), v=jnp.zeros(stacked, self.dtype))

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: Cache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
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
        if self.decoding:
            filled = []
            for i, layer in enumerate(self.layers):
                x_BTD, layer_cache = layer(x_BTD, positions_BT, cache and cache[i], None)
                filled.append(layer_cache)
            return self.norm(x_BTD), cache and tuple(filled)
        keys = None if key is None else jax.random.split(key, self.config.num_layers)

        def apply(block, x_BTD, extra):
            cache, key = extra
            return block(x_BTD, positions_BT, cache, key)

        x_BTD, cache = run_layers(self.layers, x_BTD, apply, (cache, keys), self.remat)
        return self.norm(x_BTD), cache

    def watch(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: Cache,
        keep: Callable[[jax.Array], Any],
    ) -> Watched:
        """`__call__` with a cache, which also looks at the attention weights.

        Args:
          x_BTD, positions_BT, cache: as in `__call__`.
          keep: from one layer's weights [B, N, T, S] to what is wanted of them: all of a long
            sequence would not fit.
        """

        def apply(block, x_BTD, cache):
            out_BTD, cache = block(x_BTD, positions_BT, cache, None)
            # From the queries once more: nothing on the way of an answer knows of the watching.
            weights_BNTS = block.attention.weights(block.norm1(x_BTD), positions_BT, cache.k)
            return out_BTD, (cache, keep(weights_BNTS))

        if not self.decoding:
            x_BTD, (cache, kept) = run_layers(self.layers, x_BTD, apply, cache, self.remat)
            return Watched(self.norm(x_BTD), cache, kept)
        seen = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x_BTD, one = apply(layer, x_BTD, layer_cache)
            seen.append(one)
        filled, kept = zip(*seen, strict=True)
        return Watched(self.norm(x_BTD), filled, jax.tree.map(lambda *x: jnp.stack(x), *kept))

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Text logits [B, T, padded V] in float32."""
        hidden_BTD = hidden_BTD.astype(self.dtype)
        if self.config.tie_head:
            embedding_VD = self.embed.embedding[...].astype(self.dtype)
            return self._real_words(row_product(embedding_VD, hidden_BTD, jnp.float32))
        if self.decoding:
            return self._real_words(self.head(hidden_BTD, jnp.float32))
        return self.logits_by(self.head.kernel[...], hidden_BTD)

    def head_kernel(self) -> jax.Array:
        """The text head's matrix [D, padded V], in the training layout."""
        return self.embed.embedding[...].T if self.config.tie_head else self.head.kernel[...]

    def logits_by(self, kernel_DV: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
        """Text logits [B, T, padded V] in float32 by a matrix [D, padded V]."""
        return self._real_words(float32_dot(hidden_BTD.astype(self.dtype), kernel_DV))

    def _real_words(self, logits_BTV: jax.Array) -> jax.Array:
        real_V = jnp.arange(logits_BTV.shape[-1]) < self.config.vocab_size
        return jnp.where(real_V[None, None], logits_BTV, -jnp.inf)


def projection(
    in_features: int, out_features: int, decoding: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.Linear | RowLinear:
    """A linear layer without bias, its weights in one of the two layouts."""
    if decoding:
        return RowLinear(in_features, out_features, dtype=dtype, rngs=rngs)
    return linear(in_features, out_features, bias=False, dtype=dtype, rngs=rngs)


def rms_norm(config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMS norm with float32 statistics."""
    return nnx.RMSNorm(
        config.embed_dim,
        epsilon=config.rms_norm_eps,
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


def decoding_layout(params: Mapping[str, Any]) -> Flat:
    """A decoder's weights, stacked and [in, out], as separate layers with rows [out, in].

    Args:
      params: `{path inside the decoder: array}`.
    """
    out: Flat = {}
    for path, value in params.items():
        layered = re.fullmatch(r"layers\.(.+)", path)
        for i in range(len(value)) if layered else [None]:
            array = value if i is None else value[i]
            name = path if i is None else f"layers.{i}.{layered[1]}"
            out[name] = array.T if name.endswith("kernel") else array
    return out
