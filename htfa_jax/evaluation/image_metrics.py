"""How good completed images are, in three regions, beside four references.

PSNR is of all pixels of a region in the split together, on 8-bit sRGB; SSIM is the mean of the
SSIM map over them.
"""

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from htfa_jax.data.batch import Batch
from htfa_jax.evaluation.metrics import psnr, ssim_map
from htfa_jax.models.registration import box_mask, to_8bit

REGIONS = ("all", "occluder", "occluded")
CANDIDATES = ("completed", "original", "aligned_reconstruction", "flat_fill", "vq_round_trip")


def region_masks(batch: Batch) -> dict[str, jax.Array]:
    """Pixels [B, H, W] of each region, without padding and without scenes that lack the masks.

    occluder: what the occluder covers. occluded: what of the object it covers.
    """
    inside_BHW = box_mask(batch.region_orig, batch.image_orig.shape[1:3])
    counts_B = (batch.weight > 0) & batch.has_target
    all_BHW = inside_BHW & counts_B[:, None, None]
    occluder_BHW = all_BHW & (batch.occluder_mask & batch.has_occluder_mask[:, None, None])
    occluded_BHW = occluder_BHW & (batch.object_mask & batch.has_object_mask[:, None, None])
    return {"all": all_BHW, "occluder": occluder_BHW, "occluded": occluded_BHW}


def flat_fill(orig_BHWC: jax.Array, batch: Batch) -> jax.Array:
    """The original, its covered pixels filled with the mean colour of the visible ones."""
    inside_BHW = box_mask(batch.region_orig, orig_BHWC.shape[1:3])
    occluder_BHW1 = batch.occluder_mask[..., None]
    visible_BHW1 = inside_BHW[..., None] & ~occluder_BHW1
    count_B111 = jnp.maximum(visible_BHW1.sum(axis=(1, 2, 3), keepdims=True), 1)
    mean_B11C = (orig_BHWC * visible_BHW1).sum(axis=(1, 2), keepdims=True) / count_B111
    return jnp.where(occluder_BHW1, mean_B11C, orig_BHWC)


def image_sums(
    candidates: Mapping[str, jax.Array], target_BHWC: jax.Array, batch: Batch
) -> dict[str, jax.Array]:
    """Sums over pixels that `image_scores` turns into metrics.

    Args:
      candidates: {name of `CANDIDATES`: RGB in [0, 1], [B, H, W, 3]}.
      target_BHWC: the truth, RGB in [0, 1].
      batch: for the regions.
    """
    masks, target = region_masks(batch), to_8bit(target_BHWC)
    sums = {f"pixels/{region}": mask.sum().astype(jnp.float32) for region, mask in masks.items()}
    for name, image in candidates.items():
        error_BHW = jnp.mean((to_8bit(image) - target) ** 2, axis=-1)
        similarity_BHW = ssim_map(to_8bit(image), target)
        for region, mask_BHW in masks.items():
            sums[f"error/{region}/{name}"] = jnp.sum(error_BHW * mask_BHW)
            sums[f"ssim/{region}/{name}"] = jnp.sum(similarity_BHW * mask_BHW)
    return sums


def image_scores(totals: Mapping[str, float]) -> dict[str, dict[str, dict[str, float]]]:
    """{region: {candidate: {"psnr", "ssim"}}} of summed `image_sums`; empty regions left out."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for region, name in itertools.product(REGIONS, CANDIDATES):
        pixels = totals.get(f"pixels/{region}", 0)
        if pixels and f"error/{region}/{name}" in totals:
            table.setdefault(region, {})[name] = {
                "psnr": psnr(totals[f"error/{region}/{name}"] / pixels),
                "ssim": float(totals[f"ssim/{region}/{name}"] / pixels),
            }
    return table
