"""What the data pipeline hands to the model: one dataclass of arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from htfa_jax.config import Config

# On devices, or on the host on its way there.
Array = jax.Array | np.ndarray
# Shape and type of an array.
Kind = tuple[tuple[int, ...], np.dtype]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """Samples of equal shape; H = W = `image_size`, letters as in `layers`.

    Regions and boxes are (x, y, w, h) in pixels of the preprocessed image. What a record does
    not have is zero and flagged.

    Attributes:
      image_orig: uint8 [B, H, W, 3], the original.
      image_recon: uint8 [B, H, W, 3], the reconstruction.
      image_target: uint8 [B, H, W, 3], the whole object in the original's frame.
      region_orig: float32 [B, 4], where the original (and target, masks) is; padding around it.
      region_recon: float32 [B, 4], where the reconstruction is.
      object_mask: bool [B, H, W], where the object is, its occluded part included.
      occluder_mask: bool [B, H, W], where something covers the image.
      bbox_orig: float32 [B, 4], the object in the original.
      bbox_recon: float32 [B, 4], the object in the reconstruction.
      has_recon, has_target, has_object_mask, has_occluder_mask, has_bbox_orig,
      has_bbox_recon: bool [B].
      tokens: int32 [B, L], text, padded behind.
      labels: int32 [B, L], the token after each.
      loss_mask: float32 [B, L], 1 where that token is learned.
      weight: float32 [B], 0 for records that were skipped or pad a batch.
      index: int32 [B], number of the record in its dataset; -1 for padding.
      target_codes: int32 [B, M], as `HTFA.target_codes` gives them; None unless kept on disk.
      features: [B, 2, P, D], SigLIP's of the original and of the reconstruction that the record
        has (whatever `has_recon` says); None unless kept on disk.
    """

    image_orig: Array
    image_recon: Array
    image_target: Array
    region_orig: Array
    region_recon: Array
    object_mask: Array
    occluder_mask: Array
    bbox_orig: Array
    bbox_recon: Array
    has_recon: Array
    has_target: Array
    has_object_mask: Array
    has_occluder_mask: Array
    has_bbox_orig: Array
    has_bbox_recon: Array
    tokens: Array
    labels: Array
    loss_mask: Array
    weight: Array
    index: Array
    target_codes: Array | None = None
    features: Array | None = None


def split_for_accumulation(batch: Batch, steps: int) -> Batch:
    """[samples, ...] -> [accumulation steps, samples, ...], on the host."""
    return jax.tree.map(lambda x: x.reshape(steps, -1, *x.shape[1:]), batch)


def cached_spec(config: Config) -> dict[str, Kind]:
    """Shapes and types of what a configuration keeps of a record, by field of `Batch`."""
    kinds: dict[str, Kind] = {}
    if config.data.cache_codes:
        kinds["target_codes"] = (config.code_grid**2,), np.dtype(np.int32)
    if config.data.cache_features:
        shape = (2, config.patch_grid**2, config.siglip.embed_dim)
        kinds["features"] = shape, jnp.dtype(config.train.dtype)
    return kinds
