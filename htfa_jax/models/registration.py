"""The two images of a batch, normalised, and the affine that registers them."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from htfa_jax.config import Config, DataConfig
from htfa_jax.data.batch import Array, Batch

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


def normalize_image(image_BHWC: Array, region_B4: Array, config: DataConfig) -> jax.Array:
    """8-bit RGB to (x / 255 - mean) / std, and 0 outside the region (the letterbox's padding)."""
    mean, std = _channels(config)
    x_BHWC = (image_BHWC.astype(jnp.float32) / 255.0 - mean) / std
    return x_BHWC * box_mask(region_B4, image_BHWC.shape[1:3])[..., None]


def denormalize_image(x_BHWC: jax.Array, config: DataConfig) -> jax.Array:
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


def to_8bit(rgb_BHWC: jax.Array) -> jax.Array:
    """RGB in [0, 1] as whole numbers 0 to 255, in float32."""
    return jnp.round(jnp.clip(rgb_BHWC, 0.0, 1.0) * 255.0)


def box_of(mask_BHW: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Extent [B, 4] of the true pixels, and whether there are any [B].

    An empty mask gives the whole image.
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


def box_mask(box_B4: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Pixels [B, H, W] whose centres lie in the box."""
    x, y, w, h = jnp.split(box_B4.astype(jnp.float32), 4, axis=-1)
    row_H, column_W = (jnp.arange(n, dtype=jnp.float32)[None] + 0.5 for n in size)
    rows_BH = (row_H >= y) & (row_H < y + h)
    columns_BW = (column_W >= x) & (column_W < x + w)
    return rows_BH[:, :, None] & columns_BW[:, None, :]


def foreground(rgb_BHWC: jax.Array, region_B4: jax.Array, threshold: float) -> jax.Array:
    """Pixels [B, H, W] of the region whose mean RGB in [0, 1] is above the threshold."""
    inside_BHW = box_mask(region_B4, rgb_BHWC.shape[1:3])
    return (rgb_BHWC.mean(axis=-1) > threshold) & inside_BHW


def dark_background(foreground_BHW: jax.Array, region_B4: jax.Array) -> jax.Array:
    """Whether the intensity rule can be trusted [B]: nearly no foreground along the rim.

    On an ordinary photograph everything is foreground, and the box would be the whole image.
    """
    size = foreground_BHW.shape[1:]
    inner_B4 = region_B4 + jnp.array([1, 1, -2, -2], region_B4.dtype)[None]
    rim_BHW = box_mask(region_B4, size) & ~box_mask(inner_B4, size)
    bright_B = (rim_BHW & foreground_BHW).sum(axis=(1, 2))
    return bright_B <= RIM_TOLERANCE * rim_BHW.sum(axis=(1, 2))


def find_box(
    rgb_BHWC: jax.Array,
    region_B4: jax.Array,
    threshold: float,
    known: list[tuple[jax.Array, jax.Array, int]],
) -> tuple[jax.Array, jax.Array]:
    """The object's box [B, 4] in an image, and its source [B] (index into `SOURCES`).

    Args:
      rgb_BHWC: image in [0, 1].
      region_B4: where the image is, without padding.
      threshold: of the intensity rule, which comes last.
      known: (boxes [B, 4], which samples have one [B], source), the best first.
    """
    bright_BHW = foreground(rgb_BHWC, region_B4, threshold)
    box_B4, found_B = box_of(bright_BHW)
    # Where all is dark, `box_of` gives the whole image, padding included.
    box_B4 = jnp.where(found_B[:, None], box_B4, region_B4.astype(jnp.float32))
    by_intensity_B = found_B & dark_background(bright_BHW, region_B4)
    source_B = jnp.where(by_intensity_B, INTENSITY, NO_BOX)
    for candidate_B4, exists_B, source in reversed(known):
        box_B4 = jnp.where(exists_B[:, None], candidate_B4, box_B4)
        source_B = jnp.where(exists_B, source, source_B)
    return box_B4, source_B


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


def affine_between(box_orig_B4: jax.Array, box_recon_B4: jax.Array) -> Affine:
    """The affine that takes the reconstruction's box to the original's."""
    scale_B2 = box_orig_B4[:, 2:] / jnp.maximum(box_recon_B4[:, 2:], 1.0)
    return Affine(scale_B2, box_orig_B4[:, :2] - scale_B2 * box_recon_B4[:, :2])


def identity_affine(batch: int) -> Affine:
    """The affine that moves nothing."""
    return Affine(jnp.ones((batch, 2), jnp.float32), jnp.zeros((batch, 2), jnp.float32))


def select_affine(condition_B: jax.Array, yes: Affine, no: Affine) -> Affine:
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RegisteredPair:
    """Original and reconstruction.

    A missing reconstruction is the original: blending then returns the original whatever alpha
    is, and Level 2's keys are the original's features.

    Attributes:
      orig_BHWC: normalised original.
      recon_BHWC: normalised reconstruction as the levels read it: one of the next two, by
        `level2.alignment`.
      aligned_recon_BHWC: in the original's frame.
      own_recon_BHWC: in its own frame.
      affine: reconstruction point -> original point; None if nothing is to be aligned.
      box_orig_B4: the object's box in the original, of which the affine was made.
      box_recon_B4: the same in the reconstruction.
      source_B: index into `SOURCES`: where the affine came from.
      object_BHW: object mask that the model may use, zeros where there is none.
      has_object_B: whether there is one.
      region_B4: where `own_recon_BHWC` is, without padding.
    """

    orig_BHWC: jax.Array
    recon_BHWC: jax.Array
    aligned_recon_BHWC: jax.Array
    own_recon_BHWC: jax.Array
    affine: Affine | None
    box_orig_B4: jax.Array
    box_recon_B4: jax.Array
    source_B: jax.Array
    object_BHW: jax.Array
    has_object_B: jax.Array
    region_B4: jax.Array


def register(batch: Batch, config: Config) -> RegisteredPair:
    """Normalises the images and aligns the reconstruction, each sample by its own boxes."""
    has_recon_B = batch.has_recon
    has_object_B = batch.has_object_mask & config.data.use_object_mask
    object_BHW = batch.object_mask & has_object_B[:, None, None]
    orig_BHWC = normalize_image(batch.image_orig, batch.region_orig, config.data)
    own_recon_BHWC = jnp.where(
        has_recon_B[:, None, None, None],
        normalize_image(batch.image_recon, batch.region_recon, config.data),
        orig_BHWC,
    )
    threshold = config.level2.intensity_threshold
    mask_box_B4, mask_found_B = box_of(object_BHW)
    box_orig_B4, source_orig_B = find_box(
        denormalize_image(orig_BHWC, config.data),
        batch.region_orig,
        threshold,
        [
            (batch.bbox_orig, batch.has_bbox_orig, BOXES),
            (mask_box_B4, mask_found_B, MASK),
        ],
    )
    box_recon_B4, source_recon_B = find_box(
        denormalize_image(own_recon_BHWC, config.data),
        batch.region_recon,
        threshold,
        [(batch.bbox_recon, batch.has_bbox_recon, BOXES)],
    )
    source_B = jnp.maximum(source_orig_B, source_recon_B)
    if config.level2.alignment == "none":
        source_B = jnp.full_like(source_B, OFF)
    source_B = jnp.where(has_recon_B, source_B, NO_RECON)
    affine, aligned_recon_BHWC = None, own_recon_BHWC
    if config.level2.alignment != "none":
        affine = select_affine(
            source_B <= INTENSITY,
            affine_between(box_orig_B4, box_recon_B4),
            identity_affine(len(source_B)),
        )
        aligned_recon_BHWC = resample(own_recon_BHWC, affine, orig_BHWC.shape[1:3])
    on_pixels = config.level2.alignment == "pixels"
    return RegisteredPair(
        orig_BHWC=orig_BHWC,
        recon_BHWC=aligned_recon_BHWC if on_pixels else own_recon_BHWC,
        aligned_recon_BHWC=aligned_recon_BHWC,
        own_recon_BHWC=own_recon_BHWC,
        affine=affine,
        box_orig_B4=box_orig_B4,
        box_recon_B4=box_recon_B4,
        source_B=source_B,
        object_BHW=object_BHW.astype(jnp.float32),
        has_object_B=has_object_B,
        region_B4=jnp.where(has_recon_B[:, None], batch.region_recon, batch.region_orig),
    )


def object_at_cells(pair: RegisteredPair, grid: int) -> jax.Array:
    """The object mask at the cells of a square grid [B, P]; ones without a mask."""
    return jnp.where(pair.has_object_B[:, None], at_cells(pair.object_BHW, grid), 1.0)


def visible_keys(pair: RegisteredPair, grid: int) -> jax.Array:
    """Cells [B, P] that the aligned reconstruction covers, inside the object mask."""
    shown_BHW = box_mask(pair.region_B4, pair.orig_BHWC.shape[1:3])
    if pair.affine is not None:
        region_BHW1 = shown_BHW[..., None].astype(jnp.float32)
        shown_BHW = resample(region_BHW1, pair.affine, shown_BHW.shape[1:])[..., 0]
    return (at_cells(shown_BHW, grid) >= 0.5) & (object_at_cells(pair, grid) >= 0.5)
