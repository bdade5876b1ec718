"""What the VQ stage learns from: images of a record, losses, the revival of dead codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.checkpoints.weights import load_component
from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config
from htfa_jax.data.batch import Batch
from htfa_jax.models.factory import Model
from htfa_jax.models.layers import make_rngs
from htfa_jax.models.level1_adaptive_fusion import blend
from htfa_jax.models.registration import RegisteredPair, normalize_image, register, resize
from htfa_jax.models.siglip import SigLIP
from htfa_jax.models.vq import VQ

# Images [B, H, W, 3] to features [B, P, D].
See = Callable[[jax.Array], jax.Array]

# Coarse random weights of the blends: cells along a side, and their spread before the sigmoid.
BLEND_CELLS, BLEND_SPREAD = 4, 3.0


def training_images(batch: Batch, key: jax.Array, config: Config) -> jax.Array:
    """One image of each record, [B, H, W, 3]: original, reconstruction, target or a blend.

    Blends of original and aligned reconstruction, because that is what the generation branch
    will encode. A record that lacks the chosen image gives its original.
    """
    blend_key, choice_key = jax.random.split(key)
    images = jnp.stack(list(all_images(batch, blend_key, config).values()))
    B = images.shape[1]
    choice_B = jax.random.randint(choice_key, (B,), 0, len(images))
    return images[choice_B, jnp.arange(B)]


def all_images(batch: Batch, key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """Each record's images [B, H, W, 3] by kind, and a blend of two; see `training_images`."""
    pair = register(batch, config)
    target_BHWC = normalize_image(batch.image_target, batch.region_orig, config.data)
    return {
        "original": pair.orig_BHWC,
        "reconstruction": pair.own_recon_BHWC,
        "target": jnp.where(batch.has_target[:, None, None, None], target_BHWC, pair.orig_BHWC),
        "blend": random_blend(pair, key),
    }


def random_blend(pair: RegisteredPair, key: jax.Array) -> jax.Array:
    """Original and aligned reconstruction [B, H, W, 3], mixed by smooth random weights."""
    B, H, W, _ = pair.orig_BHWC.shape
    raw = BLEND_SPREAD * jax.random.normal(key, (B, BLEND_CELLS, BLEND_CELLS, 1))
    alpha_BHW = resize(jax.nn.sigmoid(raw), (H, W))[..., 0]
    return blend(alpha_BHW, pair.orig_BHWC, pair.aligned_recon_BHWC)


def perceptual_encoder(config: Config) -> tuple[Model, Flat]:
    """The frozen SigLIP whose features `vq_train.perceptual_weight` compares, and its weights.

    Raises CheckpointError if these do not fit the configuration.
    """
    dtype = jnp.dtype(config.train.dtype)
    graphdef, state = nnx.split(
        nnx.eval_shape(
            lambda: SigLIP(config.siglip, config.image_size, dtype=dtype, rngs=make_rngs(0))
        )
    )
    model = Model(graphdef, param_paths.flatten(state))
    folder, facts = config.pretrained.siglip, {"image_size": config.image_size}
    return model, load_component(folder, "siglip", config.siglip, model.shapes, **facts)


def losses(
    model: VQ,
    image_BHWC: jax.Array,
    weight_B: jax.Array,
    config: Config,
    see: See | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Reconstruction, codebook and commitment loss of a VQ autoencoder.

    van den Oord et al., "Neural Discrete Representation Learning" (2017). Means over the images
    by their weights. With `see`, the squared error of a frozen encoder's features counts too
    (Johnson et al., "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", 2016).
    """

    def mean(x: jax.Array) -> jax.Array:
        each_B = x.mean(axis=tuple(range(1, x.ndim)))
        return jnp.sum(each_B * weight_B) / jnp.maximum(weight_B.sum(), 1)

    weights = config.vq_train
    z_BME = model.encoder(image_BHWC)
    codes_BM = model.nearest(jax.lax.stop_gradient(z_BME))
    vectors_BME = model.vectors()[codes_BM]
    codebook = mean((vectors_BME - jax.lax.stop_gradient(z_BME)) ** 2)
    commitment = mean((z_BME - jax.lax.stop_gradient(vectors_BME)) ** 2)
    decoded = model.decoder(z_BME + jax.lax.stop_gradient(vectors_BME - z_BME))
    l1 = mean(jnp.abs(decoded - image_BHWC))
    l2 = mean((decoded - image_BHWC) ** 2)
    total = weights.l1_weight * l1 + weights.l2_weight * l2
    total += codebook + weights.commitment_weight * commitment
    aux = {"l1": l1, "l2": l2, "commitment": commitment, "codes": codes_BM, "z": z_BME}
    if see is not None:
        aux["perceptual"] = mean((see(decoded) - see(image_BHWC)).astype(jnp.float32) ** 2)
        total += weights.perceptual_weight * aux["perceptual"]
    return total, aux


def revive(
    codebook_CE: jax.Array,
    unused_C: jax.Array,
    codes_BM: jax.Array,
    z_BME: jax.Array,
    after: int,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Puts codes that nothing chose for `after` steps onto continuous codes of this batch.

    Returns the codebook and the steps [C] since each code was used.
    """
    used_C = jnp.zeros(len(codebook_CE), bool).at[codes_BM.reshape(-1)].set(True)
    unused_C = jnp.where(used_C, 0, unused_C + 1)
    dead_C = unused_C >= after
    z_XE = z_BME.reshape(-1, z_BME.shape[-1])
    seeds_CE = z_XE[jax.random.randint(key, (len(codebook_CE),), 0, len(z_XE))]
    codebook_CE = jnp.where(dead_C[:, None], seeds_CE, codebook_CE)
    return codebook_CE, jnp.where(dead_C, 0, unused_C)
