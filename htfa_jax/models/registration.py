"""The two pictures of a batch, normalised, and the affine that registers them."""

import dataclasses

import jax
import jax.numpy as jnp

from htfa_jax.batch import Batch
from htfa_jax.config import Config
from htfa_jax.models import alignment
from htfa_jax.models.alignment import Affine
from htfa_jax.models.pictures import at_cells, denormalize, normalize


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    """Original and reconstruction.

    A missing reconstruction is the original: blending then returns the original whatever alpha
    is, and Level 2's keys are the original's features.

    Attributes:
      orig_BHWC: normalised original.
      recon_BHWC: normalised reconstruction, in its own frame.
      aligned_BHWC: reconstruction in the original's frame.
      affine: reconstruction point -> original point; None if nothing is to be aligned.
      box_orig_B4: the object's box in the original, of which the affine was made.
      box_recon_B4: the same in the reconstruction.
      source_B: index into `alignment.SOURCES`: where the affine came from.
      object_BHW: object mask that the model may use, zeros where there is none.
      has_object_B: whether there is one.
      region_B4: where `recon_BHWC` is, without padding.
    """

    orig_BHWC: jax.Array
    recon_BHWC: jax.Array
    aligned_BHWC: jax.Array
    affine: Affine | None
    box_orig_B4: jax.Array
    box_recon_B4: jax.Array
    source_B: jax.Array
    object_BHW: jax.Array
    has_object_B: jax.Array
    region_B4: jax.Array


def register(batch: Batch, config: Config) -> Pair:
    """Normalises the pictures and aligns the reconstruction, each sample by its own boxes."""
    has_recon_B = batch.has_recon
    has_object_B = batch.has_object_mask & config.data.use_object_mask
    object_BHW = batch.object_mask & has_object_B[:, None, None]
    orig_BHWC = normalize(batch.image_orig, batch.region_orig, config.data)
    recon_BHWC = jnp.where(
        has_recon_B[:, None, None, None],
        normalize(batch.image_recon, batch.region_recon, config.data),
        orig_BHWC,
    )
    threshold = config.level2.intensity_threshold
    mask_box_B4, mask_found_B = alignment.box_of(object_BHW)
    box_orig_B4, source_orig_B = alignment.find_box(
        denormalize(orig_BHWC, config.data),
        batch.region_orig,
        threshold,
        [
            (batch.bbox_orig, batch.has_bbox_orig, alignment.BOXES),
            (mask_box_B4, mask_found_B, alignment.MASK),
        ],
    )
    box_recon_B4, source_recon_B = alignment.find_box(
        denormalize(recon_BHWC, config.data),
        batch.region_recon,
        threshold,
        [(batch.bbox_recon, batch.has_bbox_recon, alignment.BOXES)],
    )
    source_B = jnp.maximum(source_orig_B, source_recon_B)
    if config.level2.alignment == "none":
        source_B = jnp.full_like(source_B, alignment.OFF)
    source_B = jnp.where(has_recon_B, source_B, alignment.NO_RECON)
    affine, aligned_BHWC = None, recon_BHWC
    if config.level2.alignment != "none":
        affine = alignment.select(
            source_B <= alignment.INTENSITY,
            alignment.affine_of(box_orig_B4, box_recon_B4),
            alignment.identity(len(source_B)),
        )
        aligned_BHWC = alignment.resample(recon_BHWC, affine, orig_BHWC.shape[1:3])
    return Pair(
        orig_BHWC=orig_BHWC,
        recon_BHWC=recon_BHWC,
        aligned_BHWC=aligned_BHWC,
        affine=affine,
        box_orig_B4=box_orig_B4,
        box_recon_B4=box_recon_B4,
        source_B=source_B,
        object_BHW=object_BHW.astype(jnp.float32),
        has_object_B=has_object_B,
        region_B4=jnp.where(has_recon_B[:, None], batch.region_recon, batch.region_orig),
    )


def object_at_cells(pair: Pair, grid: int) -> jax.Array:
    """The object mask at the cells of a square grid [B, P]; ones without a mask."""
    return jnp.where(pair.has_object_B[:, None], at_cells(pair.object_BHW, grid), 1.0)


def visible_keys(pair: Pair, grid: int) -> jax.Array:
    """Cells [B, P] that the aligned reconstruction covers, inside the object mask."""
    covered_BHW = alignment.box_mask(pair.region_B4, pair.orig_BHWC.shape[1:3])
    if pair.affine is not None:
        region_BHW1 = covered_BHW[..., None].astype(jnp.float32)
        covered_BHW = alignment.resample(region_BHW1, pair.affine, covered_BHW.shape[1:])[..., 0]
    return (at_cells(covered_BHW, grid) >= 0.5) & (object_at_cells(pair, grid) >= 0.5)
