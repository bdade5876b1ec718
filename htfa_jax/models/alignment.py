"""Boxes of the object in both pictures, the affine between them, and resampling with it.

Boxes are (x, y, w, h) in pixels, w = x_max - x_min + 1. The affine has no rotation: it maps
reconstruction points p to original points scale * p + shift, per axis (x, y), in continuous
coordinates where pixel i spans [i, i + 1).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

# How a sample was aligned, in order of preference.
SOURCES = (
    "boxes",
    "mask",
    "intensity",
    "identity: no box",
    "identity: alignment off",
    "identity: no reconstruction",
)
BOXES, MASK, INTENSITY, NO_BOX, OFF, NO_RECON = range(len(SOURCES))

# Part of the rim that may be bright on a dark background: an object that touches the frame.
RIM_TOLERANCE = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Affine:
    """Reconstruction point -> original point: scale * p + shift.

    Attributes:
      scale_B2: per sample and axis (x, y).
      shift_B2: in pixels.
    """

    scale_B2: jax.Array
    shift_B2: jax.Array


def box_of(mask_BHW: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Extent [B, 4] of the true pixels, and whether there are any [B].

    An empty mask gives the whole picture.
    """
    H, W = mask_BHW.shape[1:]
    start_size = []
    for axis, length in ((1, W), (2, H)):
        present = mask_BHW.any(axis=axis)
        first = jnp.argmax(present, axis=1)
        last = length - 1 - jnp.argmax(present[:, ::-1], axis=1)
        start_size.append((first, last - first + 1))
    (x, w), (y, h) = start_size
    found_B = mask_BHW.any(axis=(1, 2))
    whole = jnp.array([0, 0, W, H], jnp.float32)
    box_B4 = jnp.stack([x, y, w, h], axis=-1).astype(jnp.float32)
    return jnp.where(found_B[:, None], box_B4, whole[None]), found_B


def foreground(rgb_BHWC: jax.Array, region_B4: jax.Array, threshold: float) -> jax.Array:
    """Pixels [B, H, W] of the region whose mean RGB in [0, 1] is above the threshold."""
    inside_BHW = box_mask(region_B4, rgb_BHWC.shape[1:3])
    return (rgb_BHWC.mean(axis=-1) > threshold) & inside_BHW


def dark_background(foreground_BHW: jax.Array, region_B4: jax.Array) -> jax.Array:
    """Whether the intensity rule can be trusted [B]: nearly no foreground along the rim.

    On an ordinary photograph everything is foreground, and the box would be the whole picture.
    """
    size = foreground_BHW.shape[1:]
    inner_B4 = region_B4 + jnp.array([1, 1, -2, -2], region_B4.dtype)[None]
    rim_BHW = box_mask(region_B4, size) & ~box_mask(inner_B4, size)
    bright_B = (rim_BHW & foreground_BHW).sum(axis=(1, 2))
    return bright_B <= RIM_TOLERANCE * rim_BHW.sum(axis=(1, 2))


def box_mask(box_B4: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Pixels [B, H, W] whose centres lie in the box."""
    x, y, w, h = jnp.split(box_B4.astype(jnp.float32), 4, axis=-1)
    row_H, column_W = (jnp.arange(n, dtype=jnp.float32)[None] + 0.5 for n in size)
    rows_BH = (row_H >= y) & (row_H < y + h)
    columns_BW = (column_W >= x) & (column_W < x + w)
    return rows_BH[:, :, None] & columns_BW[:, None, :]


def find_box(
    rgb_BHWC: jax.Array,
    region_B4: jax.Array,
    threshold: float,
    known: list[tuple[jax.Array, jax.Array, int]],
) -> tuple[jax.Array, jax.Array]:
    """The object's box [B, 4] in a picture, and its source [B] (index into `SOURCES`).

    Args:
      rgb_BHWC: picture in [0, 1].
      region_B4: where the picture is, without padding.
      threshold: of the intensity rule, which comes last.
      known: (boxes [B, 4], which samples have one [B], source), the best first.
    """
    bright_BHW = foreground(rgb_BHWC, region_B4, threshold)
    box_B4, _ = box_of(bright_BHW)
    source_B = jnp.where(dark_background(bright_BHW, region_B4), INTENSITY, NO_BOX)
    for candidate_B4, exists_B, source in reversed(known):
        box_B4 = jnp.where(exists_B[:, None], candidate_B4, box_B4)
        source_B = jnp.where(exists_B, source, source_B)
    return box_B4, source_B


def affine_of(box_orig_B4: jax.Array, box_recon_B4: jax.Array) -> Affine:
    """The affine that takes the reconstruction's box to the original's."""
    scale_B2 = box_orig_B4[:, 2:] / jnp.maximum(box_recon_B4[:, 2:], 1.0)
    return Affine(scale_B2, box_orig_B4[:, :2] - scale_B2 * box_recon_B4[:, :2])


def identity(batch: int) -> Affine:
    """The affine that moves nothing."""
    return Affine(jnp.ones((batch, 2), jnp.float32), jnp.zeros((batch, 2), jnp.float32))


def select(condition_B: jax.Array, yes: Affine, no: Affine) -> Affine:
    """Per sample, one of two affines."""
    return jax.tree.map(lambda a, b: jnp.where(condition_B[:, None], a, b), yes, no)


def resample(
    x_BHWD: jax.Array,
    affine: Affine,
    image_size: tuple[int, int],
    *,
    offset: float = 0.5,
) -> jax.Array:
    """Moves a reconstruction's grid (pixels or features) into the original's frame.

    Output cell (i, j) lies at the image point ((j + offset) * W / w, (i + offset) * H / h); the
    affine's inverse leads to a point of the reconstruction, read bilinearly, zeros outside.
    Because the affine has no rotation, that is one small matrix per axis.

    Args:
      x_BHWD: grid of h x w cells over the image.
      affine: in image pixels.
      image_size: (H, W) in pixels.
      offset: place of a cell's sample: 0.5 its centre, 0 its corner (the PyTorch original).
    """
    (H, W), (h, w) = image_size, x_BHWD.shape[1:3]
    rows_BIh = _hat(affine.scale_B2[:, 1], affine.shift_B2[:, 1], h, H / h, offset)
    columns_BJw = _hat(affine.scale_B2[:, 0], affine.shift_B2[:, 0], w, W / w, offset)
    # Full precision: on a tensor core the weights would be rounded to 8 or 10 bits.
    return jnp.einsum(
        "BIh,BJw,BhwD->BIJD",
        rows_BIh,
        columns_BJw,
        x_BHWD.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    ).astype(x_BHWD.dtype)


def resample_tokens(
    x_BPD: jax.Array, affine: Affine, image_size: tuple[int, int], *, offset: float = 0.5
) -> jax.Array:
    """`resample` for the tokens of a square grid, row-major."""
    B, P, D = x_BPD.shape
    side = math.isqrt(P)
    grid_BHWD = x_BPD.reshape(B, side, side, D)
    return resample(grid_BHWD, affine, image_size, offset=offset).reshape(B, P, D)


def _hat(
    scale_B: jax.Array, shift_B: jax.Array, cells: int, cell_size: float, offset: float
) -> jax.Array:
    """Bilinear weights [B, output cell, input cell] along one axis."""
    point_T = (jnp.arange(cells, dtype=jnp.float32) + offset) * cell_size
    source_BT = (point_T[None] - shift_B[:, None]) / scale_B[:, None] / cell_size - offset
    cell_S = jnp.arange(cells, dtype=jnp.float32)
    return jnp.maximum(1.0 - jnp.abs(source_BT[..., None] - cell_S[None, None]), 0.0)
