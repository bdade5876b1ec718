"""SigLIP vision encoder: a ViT without class token, its last hidden states after the post norm.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023); sizes and names as in
transformers' `SiglipVisionModel` (without its pooling head).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.config import SigLIPConfig
from htfa_jax.kernels.attention import attention
from htfa_jax.kernels.matmul import dot
from htfa_jax.models.layers import Remat, layer_norm, linear, run_layers, stack_layers


class Attention(nnx.Module):
    """Bidirectional self-attention with biases on all projections."""

    def __init__(self, config: SigLIPConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        size = config.embed_dim
        self.num_heads = config.num_heads
        self.q_proj = linear(size, size, dtype=dtype, rngs=rngs)
        self.k_proj = linear(size, size, dtype=dtype, rngs=rngs)
        self.v_proj = linear(size, size, dtype=dtype, rngs=rngs)
        self.o_proj = linear(size, size, dtype=dtype, rngs=rngs)

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        heads = (*x_BPD.shape[:2], self.num_heads, -1)
        q_BPNH = self.q_proj(x_BPD).reshape(heads)
        # A bias of the keys adds the same to all logits of a query: no softmax sees it. One of the
        # values comes out as it is, since the weights add up to one, and is a bias of the output.
        k_BPNH = dot(x_BPD, self.k_proj.kernel[...]).reshape(heads)
        v_BPNH = dot(x_BPD, self.v_proj.kernel[...]).reshape(heads)
        out_BPNH = attention(q_BPNH, k_BPNH, v_BPNH)
        kernel_DD = self.o_proj.kernel[...]
        bias_D = self.o_proj.bias[...] + self.v_proj.bias[...] @ kernel_DD.astype(jnp.float32)
        out_BPD = dot(out_BPNH.reshape(x_BPD.shape), kernel_DD)
        return out_BPD + bias_D[None, None].astype(out_BPD.dtype)


class Block(nnx.Module):
    """Pre-norm transformer block; its GELU is the tanh approximation or exact, as configured."""

    def __init__(self, config: SigLIPConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        size, epsilon = config.embed_dim, config.layer_norm_eps
        self.approximate = config.hidden_act == "gelu_pytorch_tanh"
        self.norm1 = layer_norm(size, epsilon, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(size, epsilon, dtype=dtype, rngs=rngs)
        self.fc1 = linear(size, config.mlp_dim, dtype=dtype, rngs=rngs)
        self.fc2 = linear(config.mlp_dim, size, dtype=dtype, rngs=rngs)

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        x_BPD = x_BPD + self.attention(self.norm1(x_BPD))
        hidden_BPF = jax.nn.gelu(self.fc1(self.norm2(x_BPD)), approximate=self.approximate)
        return x_BPD + self.fc2(hidden_BPF)


class SigLIP(nnx.Module):
    """Image [B, H, W, 3] in [-1, 1] -> features [B, P, D] in row-major patch order.

    Args:
      config: sizes.
      image_size: pixels of a side; H = W = image_size.
      dtype: of the computation.
      remat: what blocks recompute in the backward pass.
    """

    def __init__(
        self,
        config: SigLIPConfig,
        image_size: int,
        *,
        dtype: jnp.dtype,
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ):
        size = config.embed_dim
        self.patch_size, self.remat = config.patch_size, remat
        num_patches = (image_size // config.patch_size) ** 2
        self.patch_embed = linear(
            config.patch_size**2 * 3,
            size,
            dtype=dtype,
            kernel_init=nnx.initializers.lecun_normal(),
            rngs=rngs,
        )
        self.position_embed = nnx.Param(
            nnx.initializers.normal(size**-0.5)(rngs.params(), (num_patches, size), jnp.float32)
        )
        self.layers = stack_layers(
            lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.num_layers, rngs
        )
        self.post_norm = layer_norm(size, config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        x_BPD = self.patch_embed(patches(image_BHWC, self.patch_size))
        x_BPD = x_BPD + self.position_embed[...].astype(x_BPD.dtype)[None]
        x_BPD, _ = run_layers(
            self.layers, x_BPD, lambda block, x, _: (block(x), None), remat=self.remat
        )
        return self.post_norm(x_BPD)


def patches(image_BHWC: jax.Array, size: int) -> jax.Array:
    """Non-overlapping squares, flattened (row, column, channel): [B, P, size * size * channels]."""
    B, H, W, C = image_BHWC.shape
    x = image_BHWC.reshape(B, H // size, size, W // size, size, C).swapaxes(2, 3)
    return x.reshape(B, (H // size) * (W // size), size * size * C)
