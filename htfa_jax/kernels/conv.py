"""Layers of feature maps: convolutions, group norm.

On NVIDIA GPUs two convolutions are written as suits them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.sharding.mesh import target

Activation = Callable[[jax.Array], jax.Array]

STRIP = 8  # pixels that `ConvIn` computes together


class Conv(nnx.Conv):
    """A convolution with float32 weights that computes in `dtype`; it keeps the map's size.

    Args:
      in_channels, out_channels: of the maps.
      size: of the kernel's sides.
      dtype: of the computation.
      options: of `nnx.Conv`, such as strides that shrink the map.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        options |= {"dtype": dtype, "param_dtype": jnp.float32, "rngs": rngs}
        super().__init__(in_channels, out_channels, (size, size), **options)


class ConvIn(Conv):
    """A 3 x 3 convolution of an image."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(in_channels, out_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        B, H, W, C = image_BHWC.shape
        if not target().startswith("gpu") or C > 4 or W % STRIP:
            return super().__call__(image_BHWC)
        # A product of strips of pixels and what is around them. cuDNN computes as if there were 64
        # channels; around single pixels lies nine times the image, more work to lay out.
        image = jnp.pad(image_BHWC.astype(self.dtype), ((0, 0), (1, 1), (1, STRIP - 1), (0, 0)))
        in_strips = (B, H, W // STRIP, STRIP * C)
        parts = []
        for y in range(3):
            parts.append(image[:, y : y + H, :W].reshape(in_strips))
            parts.append(image[:, y : y + H, STRIP:].reshape(in_strips)[..., : 2 * C])
        around_BHSI = jnp.concatenate(parts, axis=-1)
        # What a place (s) of the strip takes from a column (x) around it.
        place_SKX = jnp.stack([jnp.eye(STRIP, STRIP + 2, k) for k in range(3)], axis=1)
        kernel = jnp.einsum("ykcd,skx->yxcsd", self.kernel[...], place_SKX, precision="highest")
        kernel_IO = kernel.reshape(around_BHSI.shape[-1], -1).astype(self.dtype)
        bias_O = jnp.tile(self.bias[...].astype(self.dtype), STRIP)
        return (around_BHSI @ kernel_IO + bias_O[None, None, None]).reshape(B, H, W, -1)


class Downsample(Conv):
    """Halves a map's sides, zeros appended below and to the right."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        padding = ((0, 1), (0, 1))
        super().__init__(channels, channels, 3, strides=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWD: jax.Array) -> jax.Array:
        if not target().startswith("gpu"):
            return super().__call__(x_BHWD)
        # cuDNN pads both ends alike, for anything else XLA copies the map. Of a map that is padded
        # by two the same windows are seen, and one more in front.
        H, W = x_BHWD.shape[1:3]
        y_BHWD = jax.lax.conv_general_dilated(
            x_BHWD.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            window_strides=(2, 2),
            padding=((2, 2), (2, 2)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y_BHWD += self.bias[...].astype(self.dtype)[None, None, None]
        return y_BHWD[:, 1 : 1 + H // 2, 1 : 1 + W // 2]


class GroupNorm(nnx.GroupNorm):
    """Group norm of feature maps (Wu and He, "Group Normalization", 2018), float32 inside.

    In 32 groups, or the most that a smaller width allows. Sums over places come first, for every
    channel, and are the only ones over the whole map, which is read once for them and once to be
    scaled.
    """

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        groups = math.gcd(32, channels)
        super().__init__(
            channels, groups, epsilon=1e-6, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, x_BHWD: jax.Array, activate: Activation = lambda x: x) -> jax.Array:
        """Normalised maps in `dtype`, or what `activate` makes of them, in float32 too."""
        B, H, W, D = x_BHWD.shape
        x_BHWD = x_BHWD.astype(jnp.float32)
        # Squares are of the distance to the channel's values in the middle: far from 0 they would
        # lose what tells the values apart. At the edges padding makes other values.
        base_B11D = jax.lax.stop_gradient(x_BHWD[:, H // 2, None].mean(axis=2, keepdims=True))
        distance_BHWD = x_BHWD - base_B11D
        mean_BD = distance_BHWD.mean(axis=(1, 2))
        squares_BD = jnp.square(distance_BHWD).mean(axis=(1, 2))
        variance_BD = jnp.maximum(squares_BD - jnp.square(mean_BD), 0.0)

        def grouped(x_BD: jax.Array) -> jax.Array:
            return x_BD.reshape(-1, self.num_groups, D // self.num_groups)

        mean_BGD = grouped(mean_BD + base_B11D[:, 0, 0])
        mean_BG1 = mean_BGD.mean(axis=-1, keepdims=True)
        between_BGD = jnp.square(mean_BGD - mean_BG1)
        variance_BG1 = (grouped(variance_BD) + between_BGD).mean(axis=-1, keepdims=True)
        scale_BGD = grouped(self.scale[...]) * jax.lax.rsqrt(variance_BG1 + self.epsilon)
        shift_BGD = grouped(self.bias[...]) - mean_BG1 * scale_BGD
        scale_BD, shift_BD = scale_BGD.reshape(B, D), shift_BGD.reshape(B, D)
        return _scaled(activate, x_BHWD, scale_BD, shift_BD).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled(
    activate: Activation, x_BHWD: jax.Array, scale_BD: jax.Array, shift_BD: jax.Array
) -> jax.Array:
    """What `activate` makes of x * scale + shift of every channel, in float32."""
    return activate(x_BHWD * scale_BD[:, None, None] + shift_BD[:, None, None])


def _scaled_forward(activate: Activation, *kept: jax.Array) -> Any:
    return _scaled(activate, *kept), kept


def _scaled_backward(
    activate: Activation, kept: tuple[jax.Array, ...], grad_BHWD: jax.Array
) -> Any:
    x_BHWD, *scale_shift = kept
    # Behind a barrier XLA does not find that it had the activation's insides before. It would keep
    # them, in float32, for longer than it takes to compute them again.
    scale_BD, shift_BD = jax.lax.optimization_barrier(scale_shift)
    y_BHWD = x_BHWD * scale_BD[:, None, None] + shift_BD[:, None, None]
    (grad_BHWD,) = jax.vjp(activate, y_BHWD)[1](grad_BHWD)
    grad_scale_BHWD = grad_BHWD * x_BHWD
    if target().startswith("gpu"):
        # Two sums of what takes an activation's gradient to compute keep XLA's kernel for longer
        # than one of complex numbers (1.35 and 0.56 ms for 16 maps of 448 x 448 x 128, H200).
        sums_BD = jax.lax.complex(grad_BHWD, grad_scale_BHWD).sum(axis=(1, 2))
        grad_shift_BD, grad_scale_BD = sums_BD.real, sums_BD.imag
    else:
        grad_shift_BD, grad_scale_BD = (x.sum(axis=(1, 2)) for x in (grad_BHWD, grad_scale_BHWD))
    return grad_BHWD * scale_BD[:, None, None], grad_scale_BD, grad_shift_BD


_scaled.defvjp(_scaled_forward, _scaled_backward)
