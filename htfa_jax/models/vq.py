"""VQ tokenizer of the VQGAN family: convolutional encoder, codebook, convolutional decoder.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (2021); codes compared
l2-normalised as in Yu et al., "Vector-quantized Image Modeling with Improved VQGAN" (2022),
which Janus and LlamaGen use, or by Euclidean distance, as in Chameleon.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.config import VQConfig
from htfa_jax.errors import CheckpointError
from htfa_jax.kernels.attention import attention
from htfa_jax.kernels.matmul import exact_dot
from htfa_jax.models.feature_maps import Conv, ConvIn, Downsample, GroupNorm
from htfa_jax.models.siglip import patches


class ResBlock(nnx.Module):
    """norm, swish, conv, twice; a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(in_channels, dtype=dtype, rngs=rngs)
        self.conv1 = Conv(in_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, dtype=dtype, rngs=rngs)
        self.conv2 = Conv(out_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.shortcut = Conv(in_channels, out_channels, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWD: jax.Array) -> jax.Array:
        y_BHWD = self.conv1(self.norm1(x_BHWD, jax.nn.silu))
        y_BHWD = self.conv2(self.norm2(y_BHWD, jax.nn.silu))
        return (self.shortcut(x_BHWD) if self.has_shortcut else x_BHWD) + y_BHWD


class AttentionBlock(nnx.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, dtype=dtype, rngs=rngs)
        self.q_proj = Conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.k_proj = Conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.v_proj = Conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.o_proj = Conv(channels, channels, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWD: jax.Array) -> jax.Array:
        B, H, W, D = x_BHWD.shape
        y_BHWD = self.norm(x_BHWD)
        q, k, v = (
            proj(y_BHWD).reshape(B, H * W, 1, D) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BHWD = attention(q, k, v).reshape(B, H, W, D)
        return x_BHWD + self.o_proj(out_BHWD)


class Level(nnx.Module):
    """The residual blocks of one resolution, each followed by attention if asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        attention: bool,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nnx.List(
            ResBlock(a, b, dtype=dtype, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.attentions = nnx.List(
            AttentionBlock(out_channels, dtype=dtype, rngs=rngs)
            for _ in range(num_blocks if attention else 0)
        )

    def __call__(self, x_BHWD: jax.Array) -> jax.Array:
        for i, block in enumerate(self.blocks):
            x_BHWD = block(x_BHWD)
            if len(self.attentions):
                x_BHWD = self.attentions[i](x_BHWD)
        return x_BHWD


class Middle(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.block1 = ResBlock(channels, channels, dtype=dtype, rngs=rngs)
        self.attention = AttentionBlock(channels, dtype=dtype, rngs=rngs)
        self.block2 = ResBlock(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWD: jax.Array) -> jax.Array:
        return self.block2(self.attention(self.block1(x_BHWD)))


class VQEncoder(nnx.Module):
    """Image [B, H, W, 3] in [-1, 1] -> continuous codes [B, M, E], row-major.

    With `normalize_codes` they have length 1.
    """

    def __init__(self, config: VQConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        widths = [config.base_channels * m for m in config.channel_multipliers]
        lowest = len(widths) - 1
        self.stem, self.normalize_codes = config.stem, config.normalize_codes
        self.conv_in = ConvIn(3 * config.stem**2, config.base_channels, **options)
        self.levels = nnx.List(
            Level(
                widths[max(i - 1, 0)] if i else config.base_channels,
                width,
                config.num_res_blocks,
                config.attention == "lowest" and i == lowest,
                **options,
            )
            for i, width in enumerate(widths)
        )
        self.downsamples = nnx.List(Downsample(width, **options) for width in widths[:-1])
        self.middle = Middle(widths[-1], **options)
        self.norm_out = GroupNorm(widths[-1], **options)
        self.conv_out = Conv(widths[-1], config.z_channels, 3, **options)
        self.quant_conv = Conv(config.z_channels, config.codebook_dim, 1, **options)

    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        x_BHWD = self.conv_in(space_to_depth(image_BHWC, self.stem))
        for i, level in enumerate(self.levels):
            x_BHWD = level(x_BHWD)
            if i < len(self.downsamples):
                x_BHWD = self.downsamples[i](x_BHWD)
        x_BHWD = self.conv_out(self.norm_out(self.middle(x_BHWD), jax.nn.silu))
        z_BHWE = self.quant_conv(x_BHWD).astype(jnp.float32)
        z_BME = z_BHWE.reshape(len(z_BHWE), -1, z_BHWE.shape[-1])
        return l2_normalize(z_BME) if self.normalize_codes else z_BME


class VQDecoder(nnx.Module):
    """Code vectors [B, M, E] of a square grid -> image [B, H, W, 3], about in [-1, 1]."""

    def __init__(self, config: VQConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        widths = [config.base_channels * m for m in reversed(config.channel_multipliers)]
        self.stem = config.stem
        self.post_quant_conv = Conv(config.codebook_dim, config.z_channels, 1, **options)
        self.conv_in = Conv(config.z_channels, widths[0], 3, **options)
        self.middle = Middle(widths[0], **options)
        self.levels = nnx.List(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.num_res_blocks + 1,
                config.attention == "lowest" and i == 0,
                **options,
            )
            for i, width in enumerate(widths)
        )
        self.upsamples = nnx.List(Conv(width, width, 3, **options) for width in widths[:-1])
        self.norm_out = GroupNorm(widths[-1], **options)
        self.conv_out = Conv(widths[-1], 3 * config.stem**2, 3, **options)

    def __call__(self, vectors_BME: jax.Array) -> jax.Array:
        side = math.isqrt(vectors_BME.shape[1])
        z_BHWE = vectors_BME.reshape(len(vectors_BME), side, side, -1)
        x_BHWD = self.middle(self.conv_in(self.post_quant_conv(z_BHWE)))
        for i, level in enumerate(self.levels):
            x_BHWD = level(x_BHWD)
            if i < len(self.upsamples):
                x_BHWD = self.upsamples[i](x_BHWD.repeat(2, axis=1).repeat(2, axis=2))
        x_BHWD = self.conv_out(self.norm_out(x_BHWD, jax.nn.silu))
        return depth_to_space(x_BHWD, self.stem).astype(jnp.float32)


class VQ(nnx.Module):
    """The tokenizer: encoder, codebook [C, E], decoder if it has one."""

    def __init__(self, config: VQConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.normalize_codes, self.has_decoder = config.normalize_codes, config.has_decoder
        self.encoder = VQEncoder(config, dtype=dtype, rngs=rngs)
        self.codebook = nnx.Param(
            nnx.initializers.normal(1.0)(
                rngs.params(), (config.codebook_size, config.codebook_dim), jnp.float32
            )
        )
        if config.has_decoder:
            self.decoder = VQDecoder(config, dtype=dtype, rngs=rngs)

    def vectors(self) -> jax.Array:
        """The code vectors [C, E], as they are compared and decoded."""
        codebook_CE = self.codebook[...].astype(jnp.float32)
        return l2_normalize(codebook_CE) if self.normalize_codes else codebook_CE

    def nearest(self, z_BME: jax.Array) -> jax.Array:
        """Index [B, M] of the code vector nearest to each continuous code."""
        vectors_CE = self.vectors()
        # |v|^2 - 2 z v: the distance without what all codes share. A rounded z v would pick another
        # code wherever two are close.
        norm_C = jnp.sum(vectors_CE**2, axis=-1)
        return jnp.argmin(norm_C[None, None] - 2 * exact_dot(z_BME, vectors_CE), axis=-1)

    def straight_through(self, z_BME: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Code vectors whose gradient is that of `z_BME` itself, and their indices [B, M]."""
        codes_BM = self.nearest(jax.lax.stop_gradient(z_BME))
        vectors_BME = jax.lax.stop_gradient(self.vectors()[codes_BM])
        return z_BME + jax.lax.stop_gradient(vectors_BME - z_BME), codes_BM

    def encode(self, image_BHWC: jax.Array) -> jax.Array:
        """Codes [B, M] of an image."""
        return self.nearest(self.encoder(image_BHWC))

    def decode(self, codes_BM: jax.Array) -> jax.Array:
        """Image [B, H, W, 3] of codes, as `decode_vectors`."""
        return self.decode_vectors(self.vectors()[codes_BM])

    def decode_vectors(self, vectors_BME: jax.Array) -> jax.Array:
        """Image [B, H, W, 3] of code vectors, or of means of them.

        Raises CheckpointError if the tokenizer has no decoder.
        """
        if not self.has_decoder:
            raise CheckpointError(
                "this VQ tokenizer has no decoder (vq.has_decoder=False): it reads images but "
                "cannot make them. Convert it again with `--decoder_from` a checkpoint that has one"
            )
        return self.decoder(vectors_BME)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Vectors of length 1 along the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def space_to_depth(image_BHWC: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, H / size, W / size, size * size * C]."""
    if size == 1:
        return image_BHWC
    B, H, W, _ = image_BHWC.shape
    return patches(image_BHWC, size).reshape(B, H // size, W // size, -1)


def depth_to_space(x_BHWC: jax.Array, size: int) -> jax.Array:
    """The reverse of `space_to_depth`."""
    if size == 1:
        return x_BHWC
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H, W, size, size, C // size**2).swapaxes(2, 3)
    return x.reshape(B, H * size, W * size, C // size**2)
