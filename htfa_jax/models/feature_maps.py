"""Layers of feature maps: convolutions, group norm."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.kernels.conv import HALVING, halving_conv, image_conv
from htfa_jax.kernels.norm import Activation, group_norm


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

    def arrays(self, x_BHWD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The map, the kernel and the bias in the dtype of the computation."""
        arrays = x_BHWD, self.kernel[...], self.bias[...]
        return tuple(x.astype(self.dtype) for x in arrays)


class ConvIn(Conv):
    """A 3 x 3 convolution of an image."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(in_channels, out_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        return image_conv(*self.arrays(image_BHWC))


class Downsample(Conv):
    """Halves a map's sides, zeros appended below and to the right."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(channels, channels, 3, strides=2, padding=HALVING, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWD: jax.Array) -> jax.Array:
        return halving_conv(*self.arrays(x_BHWD))


class GroupNorm(nnx.GroupNorm):
    """Group norm of feature maps (Wu and He, "Group Normalization", 2018), float32 inside.

    In 32 groups, or the most that a smaller width allows.
    """

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        groups = math.gcd(32, channels)
        super().__init__(
            channels, groups, epsilon=1e-6, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, x_BHWD: jax.Array, activate: Activation = lambda x: x) -> jax.Array:
        """Normalised maps in `dtype`, or what `activate` makes of them, rounded once."""
        scale_D, bias_D = self.scale[...], self.bias[...]
        out_BHWD = group_norm(x_BHWD, scale_D, bias_D, self.num_groups, self.epsilon, activate)
        return out_BHWD.astype(self.dtype)
