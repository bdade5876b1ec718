"""InternLM2 in the form that decodes: the same function as `internlm2`, the weights laid out anew.

Decoding reads all weights for every token and should do nothing else. A scan would first copy each
layer out of the stack, so here each layer stands by itself. Its kernels are transposed (out, in),
and those that read the same inputs are one: `decoding_layout` makes them.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from htfa_jax.common.param_paths import Flat
from htfa_jax.config import DecoderConfig
from htfa_jax.kernels.matmul import transposed_dot
from htfa_jax.models.internlm2 import (
    AttentionOutput,
    Heads,
    InternLM2,
    attend,
    cache_shape,
    embedding,
    padded_vocab_size,
    rms_norm,
    rotated,
    weights_by_head,
    without_padding,
)
from htfa_jax.models.kv_cache import KVCache
from htfa_jax.models.layers import XAVIER, Remat

# Kernels that are one here, one below the other.
MERGED = {
    "attention.qkv_proj": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

LayerCaches = tuple[KVCache, ...]


class TransposedLinear(nnx.Module):
    """A linear layer whose kernel is transposed: [out, in].

    Args:
      in_features: D.
      out_features: F.
      bias: whether it has one.
      dtype: of the computation; weights of another dtype are cast at every call.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        if bias:
            self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))
        self.kernel = nnx.Param(XAVIER(rngs.params(), (out_features, in_features), jnp.float32))

    def __call__(
        self,
        x_BTD: jax.Array,
        out_dtype: jnp.dtype | None = None,
        *,
        norm: nnx.RMSNorm | None = None,
    ) -> jax.Array:
        """[B, T, D] -> [B, T, F], of `norm(x_BTD)` if there is a norm."""
        kernel_FD = self.kernel.get_value().astype(self.dtype)
        out_BTF = transposed_dot(x_BTD, kernel_FD, out_dtype, norm=norm)
        if not hasattr(self, "bias"):
            return out_BTF
        return out_BTF + self.bias.get_value().astype(out_BTF.dtype)[None, None]


class DecodingAttention(nnx.Module):
    """Causal grouped-query attention behind a norm."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.head_dim = config, config.embed_dim // config.num_heads
        size, kv_size = config.embed_dim, config.num_kv_heads * self.head_dim
        self.qkv_proj = TransposedLinear(
            size, size + 2 * kv_size, bias=config.attention_bias, dtype=dtype, rngs=rngs
        )
        self.o_proj = TransposedLinear(size, size, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        norm: nnx.RMSNorm,
        positions_BT: jax.Array,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        out_BTNH, cache = attend(*self.project(x_BTD, norm, positions_BT), positions_BT, cache)
        return self.o_proj(out_BTNH.reshape(x_BTD.shape)), cache

    def project(self, x_BTD: jax.Array, norm: nnx.RMSNorm, positions_BT: jax.Array) -> Heads:
        """Queries [B, T, N, H], keys and values [B, T, K, H], the first two rotated."""
        N, K = self.config.num_heads, self.config.num_kv_heads
        qkv_BTNH = self.qkv_proj(x_BTD, norm=norm).reshape(*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH, k_BTKH, v_BTKH = jnp.split(qkv_BTNH, (N, N + K), axis=2)
        return *rotated(self.config, q_BTNH, k_BTKH, positions_BT), v_BTKH


class DecodingBlock(nnx.Module):
    """Pre-norm block with a SwiGLU MLP."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        size, hidden = config.embed_dim, config.mlp_dim
        self.norm1 = rms_norm(config, dtype=dtype, rngs=rngs)
        self.attention = DecodingAttention(config, dtype=dtype, rngs=rngs)
        self.norm2 = rms_norm(config, dtype=dtype, rngs=rngs)
        self.gate_up_proj = TransposedLinear(size, 2 * hidden, dtype=dtype, rngs=rngs)
        self.down_proj = TransposedLinear(hidden, size, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        out_BTD, cache = self.attention(x_BTD, self.norm1, positions_BT, cache)
        x_BTD = x_BTD + out_BTD
        gate_BTF, up_BTF = jnp.split(self.gate_up_proj(x_BTD, norm=self.norm2), 2, axis=-1)
        return x_BTD + self.down_proj(jax.nn.silu(gate_BTF) * up_BTF), cache

    def attention_weights(
        self, x_BTD: jax.Array, positions_BT: jax.Array, k_BKSH: jax.Array
    ) -> jax.Array:
        """The weights [B, N, T, S] with which this block's input attends to a filled cache."""
        q_BTNH, _, _ = self.attention.project(x_BTD, self.norm1, positions_BT)
        return weights_by_head(q_BTNH, k_BKSH, positions_BT)


class DecodingInternLM2(nnx.Module):
    """`InternLM2` for decoding; its cache is one `KVCache` a layer.

    Args:
      config: sizes.
      with_text: whether it has embedding and head.
      dtype: of the computation.
      remat: nothing trains here, so it has no effect.
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
        self.config, self.dtype = config, dtype
        if with_text:
            self.embed = embedding(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            DecodingBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)
        )
        self.norm = rms_norm(config, dtype=dtype, rngs=rngs)
        if with_text and not config.tie_head:
            size = padded_vocab_size(config)
            self.head = TransposedLinear(config.embed_dim, size, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: LayerCaches | None = None,
        key: None = None,
    ) -> tuple[jax.Array, LayerCaches | None]:
        """As `InternLM2.__call__`, without dropout."""
        filled = []
        for i, layer in enumerate(self.layers):
            x_BTD, layer_cache = layer(x_BTD, positions_BT, cache and cache[i])
            filled.append(layer_cache)
        return self.norm(x_BTD), cache and tuple(filled)

    def with_attention(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: LayerCaches,
        keep: Callable[[jax.Array], Any],
    ) -> AttentionOutput:
        """As `InternLM2.with_attention`."""
        filled, kept = [], []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            out_BTD, layer_cache = layer(x_BTD, positions_BT, layer_cache)
            filled.append(layer_cache)
            kept.append(keep(layer.attention_weights(x_BTD, positions_BT, layer_cache.k)))
            x_BTD = out_BTD
        attention = jax.tree.map(lambda *x: jnp.stack(x), *kept)
        return AttentionOutput(self.norm(x_BTD), tuple(filled), attention)

    def empty_cache(self, batch: int, length: int) -> LayerCaches:
        """A cache for sequences of up to `length` positions."""
        shape = cache_shape(self.config, batch, length)
        return tuple(
            KVCache(k=jnp.zeros(shape, self.dtype), v=jnp.zeros(shape, self.dtype))
            for _ in range(self.config.num_layers)
        )

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Text logits [B, T, padded V] in float32."""
        hidden_BTD = hidden_BTD.astype(self.dtype)
        if self.config.tie_head:
            embedding_VD = self.embed.embedding[...].astype(self.dtype)
            logits_BTV = transposed_dot(hidden_BTD, embedding_VD, jnp.float32)
        else:
            logits_BTV = self.head(hidden_BTD, jnp.float32)
        return without_padding(self.config, logits_BTV)


# A decoder in either form.
Decoder = InternLM2 | DecodingInternLM2


def decoding_layout(params: Mapping[str, Any]) -> Flat:
    """The weights of an `InternLM2` as those of a `DecodingInternLM2`.

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
        for merged, names in MERGED.items():
            for kind in ("kernel", "bias"):
                if f"layers.{i}.{names[0]}.{kind}" not in out:
                    continue
                parts = [out.pop(f"layers.{i}.{name}.{kind}") for name in names]
                # Arrays from a file are NumPy's and stay so.
                concatenate = (
                    np.concatenate if isinstance(parts[0], np.ndarray) else jnp.concatenate
                )
                out[f"layers.{i}.{merged}.{kind}"] = concatenate(parts)
    return out
