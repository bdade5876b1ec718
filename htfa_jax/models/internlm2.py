"""InternLM2 decoder: RMSNorm, grouped-query attention, rotary positions, SwiGLU, no biases.

Cai et al., "InternLM2 Technical Report" (2024). The same architecture as Llama; only the
checkpoint layout differs.

The weights come in two layouts. Training stacks the layers, for `lax.scan` compiles one block,
and keeps kernels [in, out]. Decoding reads all weights for every word and should do nothing else:
a scan would first copy each layer out of the stack, so there each layer stands by itself, its
kernels are rows [out, in] (`rows.RowLinear`), and those that read the same inputs are one.
`decoding_layout` turns the first into the second.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from htfa_jax.common.param_paths import Flat
from htfa_jax.config import DecoderConfig
from htfa_jax.kernels.attention import attention
from htfa_jax.kernels.matmul import float32_dot, row_product
from htfa_jax.models.decoding import (
    Cache,
    KVCache,
    RowLinear,
    cached_attention,
    cached_weights,
    with_words,
)
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
    """Causal grouped-query attention, behind a norm."""

    def __init__(self, config: DecoderConfig, *, decoding: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.head_dim, self.decoding = config.embed_dim // config.num_heads, decoding
        self.rope = config.rope_theta, config.rope_factor
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        size, kv_size = config.embed_dim, config.num_kv_heads * self.head_dim
        if decoding:
            self.qkv_proj = RowLinear(size, size + 2 * kv_size, dtype=dtype, rngs=rngs)
        else:
            self.q_proj = linear(size, size, bias=False, dtype=dtype, rngs=rngs)
            self.k_proj = linear(size, kv_size, bias=False, dtype=dtype, rngs=rngs)
            self.v_proj = linear(size, kv_size, bias=False, dtype=dtype, rngs=rngs)
        self.o_proj = projection(size, size, decoding, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        norm: nnx.RMSNorm,
        positions_BT: jax.Array,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        q_BTNH, k_BSKH, v_BSKH = self.project(x_BTD, norm, positions_BT)
        if cache is None:
            out_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, causal=True)
        else:
            cache = with_words(cache, k_BSKH, v_BSKH, positions_BT)
            out_BTNH = cached_attention(q_BTNH, cache.k, cache.v, positions_BT)
        return self.o_proj(out_BTNH.reshape(x_BTD.shape)), cache

    def project(
        self, x_BTD: jax.Array, norm: nnx.RMSNorm, positions_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], the first two rotated."""
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        if self.decoding:
            qkv_BTNH = self.qkv_proj(x_BTD, norm=norm).reshape(heads)
            ends = self.num_heads, self.num_heads + self.num_kv_heads
            q_BTNH, k_BTKH, v_BTKH = jnp.split(qkv_BTNH, ends, axis=2)
        else:
            y_BTD = norm(x_BTD)
            q_BTNH = self.q_proj(y_BTD).reshape(heads)
            k_BTKH = self.k_proj(y_BTD).reshape(heads)
            v_BTKH = self.v_proj(y_BTD).reshape(heads)
        q_BTNH, k_BTKH = (apply_rope(x, positions_BT, *self.rope) for x in (q_BTNH, k_BTKH))
        return q_BTNH, k_BTKH, v_BTKH

    def weights(
        self, x_BTD: jax.Array, norm: nnx.RMSNorm, positions_BT: jax.Array, k_BKSH: jax.Array
    ) -> jax.Array:
        """The weights [B, N, T, S] with which inputs attend to the slots of a filled cache."""
        B, T, _ = x_BTD.shape
        q_BTNH, _, _ = self.project(x_BTD, norm, positions_BT)
        weights_BKTGS = cached_weights(q_BTNH, k_BKSH, positions_BT)
        return weights_BKTGS.swapaxes(2, 3).reshape(B, self.num_heads, T, k_BKSH.shape[2])


class Block(nnx.Module):
    """Pre-norm block with a SwiGLU MLP."""

    def __init__(self, config: DecoderConfig, *, decoding: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        size, hidden = config.embed_dim, config.mlp_dim
        self.dropout, self.decoding = config.dropout, decoding
        self.norm1 = rms_norm(config, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, decoding=decoding, dtype=dtype, rngs=rngs)
        self.norm2 = rms_norm(config, dtype=dtype, rngs=rngs)
        if decoding:
            self.gate_up_proj = RowLinear(size, 2 * hidden, dtype=dtype, rngs=rngs)
        else:
            self.gate_proj = linear(size, hidden, bias=False, dtype=dtype, rngs=rngs)
            self.up_proj = linear(size, hidden, bias=False, dtype=dtype, rngs=rngs)
        self.down_proj = projection(hidden, size, decoding, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        attention_key, mlp_key = split_key(key, 2)
        out_BTD, cache = self.attention(x_BTD, self.norm1, positions_BT, cache)
        x_BTD = x_BTD + dropout(out_BTD, self.dropout, attention_key)
        if self.decoding:
            gate_BTF, up_BTF = jnp.split(self.gate_up_proj(x_BTD, norm=self.norm2), 2, axis=-1)
        else:
            y_BTD = self.norm2(x_BTD)
            gate_BTF, up_BTF = self.gate_proj(y_BTD), self.up_proj(y_BTD)
        y_BTD = self.down_proj(jax.nn.silu(gate_BTF) * up_BTF)
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
            weights_BNTS = block.attention.weights(x_BTD, block.norm1, positions_BT, cache.k)
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


# What the layout of decoding has as one, one below the other.
MERGED = {
    "attention.qkv_proj": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


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
    for i in range(len(params["layers.norm1.scale"])):
        for whole, parts in MERGED.items():
            rows = [out.pop(f"layers.{i}.{part}.kernel") for part in parts]
            # Arrays from a file are NumPy's and stay so.
            concatenate = np.concatenate if isinstance(rows[0], np.ndarray) else jnp.concatenate
            out[f"layers.{i}.{whole}.kernel"] = concatenate(rows)
    return out
