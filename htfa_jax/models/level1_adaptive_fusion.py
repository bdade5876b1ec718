"""Level 1: adaptive weighted fusion, fused = alpha * original + (1 - alpha) * reconstruction.

alpha = sigmoid(raw). raw is a learned map, the same for every image; `alpha="predicted"` adds
what a small convolutional head sees in this pair, so that alpha can know where the hand is.
With `learnable=False` alpha is the constant it starts at, and the level has no parameters.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.config import Level1Config
from htfa_jax.models.feature_maps import Conv
from htfa_jax.models.registration import resize

# The head works on images shrunk by this factor: it needs to see a hand, not single pixels,
# and costs a sixteenth.
HEAD_SHRINK = 4


class AlphaHead(nnx.Module):
    """(original, reconstruction, object mask) -> what to add to raw, zero at the start."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.conv1 = Conv(7, channels, 3, **options)
        self.conv2 = Conv(channels, channels, 3, **options)
        self.conv3 = Conv(channels, 1, 3, kernel_init=nnx.initializers.zeros, **options)

    def __call__(
        self, orig_BHWC: jax.Array, recon_BHWC: jax.Array, mask_BHW: jax.Array
    ) -> jax.Array:
        B, H, W, _ = orig_BHWC.shape
        x_BHWC = jnp.concatenate([orig_BHWC, recon_BHWC, mask_BHW[..., None]], axis=-1)
        x_BHWC = nnx.avg_pool(
            x_BHWC, (HEAD_SHRINK, HEAD_SHRINK), (HEAD_SHRINK, HEAD_SHRINK), padding="SAME"
        )
        x_BHWC = jax.nn.gelu(self.conv1(x_BHWC))
        x_BHWC = jax.nn.gelu(self.conv2(x_BHWC))
        return resize(self.conv3(x_BHWC).astype(jnp.float32), (H, W))[..., 0]


class AdaptiveFusion(nnx.Module):
    """Fuses two images at one or several scales.

    With `num_scales` above 1, scale s fuses both images shrunk by 2^s with a map of its own,
    the results are enlarged again and summed with softmax(scale_weights).

    Args:
      config: Level 1 part of the configuration.
      image_size: side of the map in pixels; images of another size resize alpha.
      dtype: of the predicting head; the blend itself is float32.
    """

    def __init__(self, config: Level1Config, image_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.num_scales = config.num_scales
        self.constant = None if config.learnable else config.init_alpha
        self.predicted = config.learnable and config.alpha == "predicted"
        if not config.learnable:
            return
        raw = math.log(config.init_alpha / (1.0 - config.init_alpha))
        sizes = [image_size // 2**s for s in range(self.num_scales)]
        self.raw = nnx.List(nnx.Param(jnp.full((n, n), raw, jnp.float32)) for n in sizes)
        if self.num_scales > 1:
            weights = jnp.full((self.num_scales,), 1.0 / self.num_scales, jnp.float32)
            self.scale_weights = nnx.Param(weights)
        if self.predicted:
            self.head = AlphaHead(config.head_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, orig_BHWC: jax.Array, recon_BHWC: jax.Array, mask_BHW: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the fused image [B, H, W, 3] and alpha [B, H, W] of the finest scale.

        Args:
          orig_BHWC: original.
          recon_BHWC: reconstruction, of the same size.
          mask_BHW: 1 where the object is, for the predicting head; None if unknown.
        """
        B, H, W, _ = orig_BHWC.shape
        if self.predicted:
            alpha_BHW = self._predict(orig_BHWC, recon_BHWC, mask_BHW)
            return blend(alpha_BHW, orig_BHWC, recon_BHWC), alpha_BHW
        if self.num_scales == 1:
            alpha_BHW = jnp.broadcast_to(self._map(0, (H, W)), (B, H, W))
            return blend(alpha_BHW, orig_BHWC, recon_BHWC), alpha_BHW
        learns = self.constant is None
        raw = self.scale_weights[...] if learns else jnp.zeros(self.num_scales)
        weights = jax.nn.softmax(raw)
        fused_BHWC, alphas = 0.0, []
        for s in range(self.num_scales):
            size = (H // 2**s, W // 2**s)
            orig, recon = resize(orig_BHWC, size), resize(recon_BHWC, size)
            alphas.append(jnp.broadcast_to(self._map(s, size), (B, *size)))
            fused_BHWC += weights[s] * resize(blend(alphas[s], orig, recon), (H, W))
        return fused_BHWC, alphas[0]

    def _map(self, scale: int, size: tuple[int, int]) -> jax.Array:
        """Alpha [1, H, W] of a scale, the same for every image."""
        if self.constant is not None:
            return jnp.full((1, *size), self.constant, jnp.float32)
        return resize(jax.nn.sigmoid(self.raw[scale][...])[None, ..., None], size)[..., 0]

    def _predict(
        self, orig_BHWC: jax.Array, recon_BHWC: jax.Array, mask_BHW: jax.Array | None
    ) -> jax.Array:
        """Alpha [B, H, W] of each pair: the map, before its sigmoid, plus what the head sees."""
        B, H, W, _ = orig_BHWC.shape
        if mask_BHW is None:
            mask_BHW = jnp.zeros((B, H, W), jnp.float32)
        raw_1HW = resize(self.raw[0][...][None, ..., None], (H, W))[..., 0]
        return jax.nn.sigmoid(raw_1HW + self.head(orig_BHWC, recon_BHWC, mask_BHW))


def blend(alpha_BHW: jax.Array, orig_BHWC: jax.Array, recon_BHWC: jax.Array) -> jax.Array:
    """alpha * original + (1 - alpha) * reconstruction."""
    alpha_BHW1 = alpha_BHW[..., None]
    return alpha_BHW1 * orig_BHWC + (1.0 - alpha_BHW1) * recon_BHWC
