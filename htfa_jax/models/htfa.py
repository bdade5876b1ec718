"""HTFA: the three levels, both encoders and the decoder, wired together."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.config import Config
from htfa_jax.data.batch import Batch
from htfa_jax.models.decoding import Decoder
from htfa_jax.models.internlm2 import InternLM2
from htfa_jax.models.kv_cache import Cache
from htfa_jax.models.layers import split_key
from htfa_jax.models.level1_adaptive_fusion import AdaptiveFusion
from htfa_jax.models.level2_spatial_attention import SpatialAttention
from htfa_jax.models.level3_encoder_decoupling import EncoderDecoupling
from htfa_jax.models.registration import (
    RegisteredPair,
    normalize_image,
    object_at_cells,
    register,
    resample_tokens,
    visible_keys,
)
from htfa_jax.models.siglip import SigLIP
from htfa_jax.models.vq import VQ, VQEncoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Fusion:
    """What Levels 1 and 2 make of a batch, or what stands in their place (`Config.fusion`).

    Attributes:
      pair: the images, registered.
      alpha_BHW: weight of the original; None without Level 1.
      images: what the generation branch encodes, [B, H, W, 3] each: the fused image, or those
        that are read without fusion, the original last.
      spatial_BPD: what the understanding branch reads: F_spatial [B, P, D], with
        `level2.append_reconstruction` the aligned reconstruction's features behind it
        [B, P, 2 D]; without fusion the features of those images one after the other.
      attention_BNTS: Level 2's weights, None unless asked for.
    """

    pair: RegisteredPair
    alpha_BHW: jax.Array | None
    images: list[jax.Array]
    spatial_BPD: jax.Array
    attention_BNTS: Any

    @property
    def fused_BHWC(self) -> jax.Array:
        """The fused image; without fusion the one that the completed codes stand on."""
        return self.images[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Output:
    """Result of a forward pass.

    Attributes:
      fusion: Levels 1 and 2.
      text_BLD: hidden states of the text positions, None without text loss.
      code_logits_BMC: logits of the completed image's codes, None without code loss.
    """

    fusion: Fusion
    text_BLD: jax.Array | None
    code_logits_BMC: jax.Array | None


class HTFA(nnx.Module):
    """The whole model. Parts that the configuration leaves out do not exist.

    Args:
      config: of the run.
      decoder: the form of the decoder: the one that trains, or the one that decodes.
    """

    def __init__(
        self,
        config: Config,
        *,
        decoder: type[Decoder] = InternLM2,
        rngs: nnx.Rngs,
    ):
        dtype, remat = jnp.dtype(config.train.dtype), config.train.remat
        self.config = config
        self.has_text = config.loss.text_weight > 0
        self.has_codes = config.loss.code_weight > 0
        self.siglip = SigLIP(config.siglip, config.image_size, dtype=dtype, remat=remat, rngs=rngs)
        if config.fusion == "levels":
            # What no gradient reaches is not there.
            level1 = dataclasses.replace(config.level1, learnable=config.has_alpha)
            self.level1 = AdaptiveFusion(level1, config.image_size, dtype=dtype, rngs=rngs)
            self.level2 = SpatialAttention(
                config.level2, config.siglip.embed_dim, dtype=dtype, rngs=rngs
            )
        if config.level3.generation:
            completes = self.has_codes and config.vq.has_decoder
            sizes = dataclasses.replace(config.vq, has_decoder=completes)
            self.vq = VQ(sizes, dtype=dtype, rngs=rngs)
            # The tokenizer gives the targets and decodes completions, so it must not move: an
            # encoder that trains is a second one, which starts as a copy.
            if not config.is_frozen("vq"):
                self.vq_encoder = VQEncoder(config.vq, dtype=dtype, rngs=rngs)
        self.level3 = EncoderDecoupling(
            config.level3,
            understand_dim=config.understand_dim,
            code_dim=config.vq.codebook_dim,
            codebook_size=config.vq.codebook_size if self.has_codes else 0,
            decoder_dim=config.decoder.embed_dim,
            dtype=dtype,
            rngs=rngs,
        )
        self.decoder = decoder(
            config.decoder,
            with_text=self.has_text,
            dtype=dtype,
            remat=remat,
            rngs=rngs,
        )

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> Output:
        """One pass over the joint sequence [understanding | generation | text].

        Args:
          batch: B samples.
          key: dropout key, None in evaluation.
        """
        prefix_key, decoder_key = split_key(key, 2)
        prefix_BTD, fusion = self.encode(batch, prefix_key)
        sequence = [prefix_BTD] + ([self.decoder.embed(batch.tokens)] if self.has_text else [])
        hidden_BTD, _ = self.decode(jnp.concatenate(sequence, axis=1), 0, key=decoder_key)
        code_end = prefix_BTD.shape[1]
        code_start = code_end - self.config.code_grid**2
        return Output(
            fusion=fusion,
            text_BLD=hidden_BTD[:, code_end:] if self.has_text else None,
            code_logits_BMC=self.level3.code_logits(hidden_BTD[:, code_start:code_end])
            if self.has_codes
            else None,
        )

    def encode(
        self, batch: Batch, key: jax.Array | None = None, *, with_weights: bool = False
    ) -> tuple[jax.Array, Fusion]:
        """The image tokens [B, P + M, D] that stand before the text, and what led to them."""
        fusion_key, understand_key, generate_key = split_key(key, 3)
        fusion = self.fuse(batch, fusion_key, with_weights=with_weights)
        tokens = [self.level3.understand(fusion.spatial_BPD, understand_key)]
        if self.config.level3.generation:
            encoder = self.vq.encoder if self.config.is_frozen("vq") else self.vq_encoder
            vectors = [self.vq.straight_through(encoder(x))[0] for x in fusion.images]
            vectors_BME = jnp.concatenate(vectors, axis=1)
            tokens.append(self.level3.generate(vectors_BME, generate_key))
        return jnp.concatenate(tokens, axis=1), fusion

    def decode(
        self,
        x_BTD: jax.Array,
        start_B: jax.Array | int,
        cache: Cache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the decoder on embeddings at positions start, start + 1, ..."""
        B, T, _ = x_BTD.shape
        start_B1 = jnp.broadcast_to(start_B, (B,))[:, None]
        return self.decoder(x_BTD, start_B1 + jnp.arange(T)[None], cache, key)

    def fuse(
        self, batch: Batch, key: jax.Array | None = None, *, with_weights: bool = False
    ) -> Fusion:
        """Levels 1 and 2, with Level 2's attention weights if they are wanted."""
        alignment, grid = self.config.level2.alignment, self.config.patch_grid
        pair = register(batch, self.config)
        if self.config.fusion != "levels":
            return self.unfused(pair)
        fused_BHWC, alpha_BHW = self.level1(pair.orig_BHWC, pair.recon_BHWC, pair.object_BHW)
        orig_BPD, recon_BPD, *fused = self.features(batch, pair, fused_BHWC)
        if alignment == "features":
            recon_BPD = resample_tokens(recon_BPD, pair.affine, pair.recon_BHWC.shape[1:3])
        recon_BPD *= object_at_cells(pair, grid)[..., None].astype(recon_BPD.dtype)
        spatial_BPD, attention_BNTS = self.level2(
            orig_BPD,
            recon_BPD,
            fused[0] if fused else recon_BPD,
            visible_keys(pair, grid) if self.config.level2.mask_keys else None,
            key,
            with_weights=with_weights,
        )
        if self.config.level2.append_reconstruction:
            spatial_BPD = jnp.concatenate([spatial_BPD, recon_BPD], axis=-1)
        return Fusion(pair, alpha_BHW, [fused_BHWC], spatial_BPD, attention_BNTS)

    def unfused(self, pair: RegisteredPair) -> Fusion:
        """One image, or both side by side, in place of Levels 1 and 2."""
        images = {
            "original": [pair.orig_BHWC],
            "reconstruction": [pair.recon_BHWC],
            "tokens": [pair.recon_BHWC, pair.orig_BHWC],
        }[self.config.fusion]
        features = jnp.concatenate(self.encode_images(images), axis=1)
        return Fusion(pair, None, images, features, None)

    def features(
        self, batch: Batch, pair: RegisteredPair, fused_BHWC: jax.Array
    ) -> list[jax.Array]:
        """SigLIP's features [B, P, D] of original, reconstruction, and fused if Level 2 asks."""
        fused = [fused_BHWC] if self.config.level2.values == "fused" else []
        if self.config.is_frozen("siglip"):
            return [*self.frozen_features(batch, pair), *map(self.siglip, fused)]
        return self.encode_images([pair.orig_BHWC, pair.recon_BHWC, *fused])

    def encode_images(self, images: list[jax.Array]) -> list[jax.Array]:
        """SigLIP's features [B, P, D] of one or more images of each sample, in one pass."""
        # Along the batch a sample's images stay together: stacked image after image, XLA sends
        # images and features between the devices of a mesh.
        images_BNHWC = jnp.stack(images, axis=1)
        features = self.siglip(images_BNHWC.reshape(-1, *images_BNHWC.shape[2:]))
        features_BNPD = features.reshape(*images_BNHWC.shape[:2], *features.shape[1:])
        return [features_BNPD[:, i] for i in range(len(images))]

    def frozen_features(self, batch: Batch, pair: RegisteredPair) -> list[jax.Array]:
        """A frozen SigLIP's features of original and reconstruction, each [B, P, D]."""
        if batch.features is None:
            # Nothing before these two learns, so they store nothing for the backward pass.
            return self.encode_images(jax.lax.stop_gradient([pair.orig_BHWC, pair.recon_BHWC]))
        orig_BPD, recon_BPD = batch.features[:, 0], batch.features[:, 1]
        # A sample that lost its reconstruction has the original in its place.
        return [orig_BPD, jnp.where(batch.has_recon[:, None, None], recon_BPD, orig_BPD)]

    def target_codes(self, batch: Batch, pair: RegisteredPair) -> jax.Array:
        """Codes [B, M] of the completed image, or of the aligned reconstruction without one."""
        if batch.target_codes is not None:
            return batch.target_codes
        target_BHWC = normalize_image(batch.image_target, batch.region_orig, self.config.data)
        target_BHWC = jnp.where(
            batch.has_target[:, None, None, None], target_BHWC, pair.aligned_recon_BHWC
        )
        return jax.lax.stop_gradient(self.vq.encode(target_BHWC))
