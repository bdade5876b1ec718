"""Arithmetic on pictures inside the model: normalisation, resizing, cells."""

import jax
import jax.numpy as jnp

from htfa_jax.batch import Array
from htfa_jax.config import DataConfig
from htfa_jax.models.alignment import box_mask


def normalize(image_BHWC: Array, region_B4: Array, config: DataConfig) -> jax.Array:
    """8-bit RGB to (x / 255 - mean) / std, and 0 outside the region (the letterbox's padding)."""
    mean, std = _channels(config)
    x_BHWC = (image_BHWC.astype(jnp.float32) / 255.0 - mean) / std
    return x_BHWC * box_mask(region_B4, image_BHWC.shape[1:3])[..., None]


def denormalize(x_BHWC: jax.Array, config: DataConfig) -> jax.Array:
    """Back to RGB in [0, 1]."""
    mean, std = _channels(config)
    return jnp.clip(x_BHWC * std + mean, 0.0, 1.0)


def _channels(config: DataConfig) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation, [1, 1, 1, 3]."""
    return tuple(jnp.array(x)[None, None, None] for x in (config.image_mean, config.image_std))


def resize(x_BHWC: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear, half-pixel centres, no antialias."""
    if x_BHWC.shape[1:3] == size:
        return x_BHWC
    B, _, _, C = x_BHWC.shape
    return jax.image.resize(x_BHWC, (B, *size, C), method="bilinear", antialias=False)


def at_cells(mask_BHW: jax.Array, grid: int) -> jax.Array:
    """A mask read at the centres of a square grid of cells: [B, grid * grid] in [0, 1]."""
    cells_BHW1 = resize(mask_BHW.astype(jnp.float32)[..., None], (grid, grid))
    return cells_BHW1.reshape(len(mask_BHW), grid * grid)


def cell_means(mask_BHW: jax.Array, grid: int) -> jax.Array:
    """Part of each cell that a mask covers: [B, grid * grid] in [0, 1]."""
    B, H, W = mask_BHW.shape
    cells = mask_BHW.astype(jnp.float32).reshape(B, grid, H // grid, grid, W // grid)
    return cells.mean(axis=(2, 4)).reshape(B, grid * grid)
