"""A SigLIP of 2.3 million parameters: both towers, its loss, its training.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023): every image of a batch meets
every caption, and a logistic loss says whether they fit. The architecture is that of transformers'
`SiglipModel`, so that what is written opens there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_text
from flax import nnx
from tokenizers import Tokenizer

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, SigLIPConfig
from htfa_jax.data.batch import Batch
from htfa_jax.data.pipeline import Loaded, training_batches
from htfa_jax.data.records import Dataset
from htfa_jax.kernels.attention import attention
from htfa_jax.models.layers import layer_norm, linear, run_layers, stack_layers
from htfa_jax.models.registration import Affine, resample
from htfa_jax.models.siglip import Block, SigLIP
from htfa_jax.training.vq_losses import all_images
from weights_convert import siglip, to_hf
from weights_convert.convert import linear as transposed
from weights_convert.convert import same

CAPTION_TOKENS = 24
PAD = 1  # "</s>"
# Augmentation: an image is enlarged by up to this factor either way and moved, its light changed.
ZOOM, SHIFT, LIGHT = 1.35, 0.12, 0.12


class Pooling(nnx.Module):
    """One vector of an image: a learned query attends to the patches, an MLP follows."""

    def __init__(self, config: SigLIPConfig, *, rngs: nnx.Rngs):
        size, dtype = config.embed_dim, jnp.dtype("float32")
        self.num_heads = config.num_heads
        self.probe = nnx.Param(nnx.initializers.normal(size**-0.5)(rngs.params(), (size,)))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, linear(size, size, dtype=dtype, rngs=rngs))
        self.norm = layer_norm(size, config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.fc1 = linear(size, config.mlp_dim, dtype=dtype, rngs=rngs)
        self.fc2 = linear(config.mlp_dim, size, dtype=dtype, rngs=rngs)

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        B, P, D = x_BPD.shape
        probe_B1D = jnp.broadcast_to(self.probe[...][None, None], (B, 1, D))
        out_B1NH = attention(
            self.q_proj(probe_B1D).reshape(B, 1, self.num_heads, -1),
            self.k_proj(x_BPD).reshape(B, P, self.num_heads, -1),
            self.v_proj(x_BPD).reshape(B, P, self.num_heads, -1),
        )
        y_BD = self.o_proj(out_B1NH.reshape(B, 1, D))[:, 0]
        hidden_BF = jax.nn.gelu(self.fc1(self.norm(y_BD)), approximate=True)
        return y_BD + self.fc2(hidden_BF)


def text_sizes(sizes: SigLIPConfig, kept: bool) -> SigLIPConfig:
    """Sizes of a text tower: of the one that the vision tower learns from, or of the one kept.

    Captions of a few words need far less than images. The tower that is kept learns when the
    vision tower is finished and stays as it is (Zhai et al., "LiT: Zero-Shot Transfer with
    Locked-image text Tuning", 2022).

    Args:
      sizes: of the vision tower.
      kept: which of the two.
    """
    if kept:
        return dataclasses.replace(sizes, num_layers=1, mlp_dim=sizes.mlp_dim // 2)
    return dataclasses.replace(sizes, num_layers=2)


class TextTower(nnx.Module):
    """Padded captions [B, L] -> one vector each: the last position's, padding included."""

    def __init__(self, config: SigLIPConfig, vocab_size: int, *, rngs: nnx.Rngs):
        size, dtype = config.embed_dim, jnp.dtype("float32")
        init = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (vocab_size, size)))
        self.position_embed = nnx.Param(init(rngs.params(), (CAPTION_TOKENS, size)))
        self.layers = stack_layers(
            lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.num_layers, rngs
        )
        self.norm = layer_norm(size, config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.head = linear(size, size, dtype=dtype, rngs=rngs)

    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        x_BLD = self.embedding[...][tokens_BL] + self.position_embed[...][None]
        x_BLD, _ = run_layers(self.layers, x_BLD, lambda block, x, _: (block(x), None))
        return self.head(self.norm(x_BLD)[:, -1])


class TwoTowers(nnx.Module):
    """Images and captions in one space of unit vectors.

    Args:
      config: sizes of the vision tower, and the captions' vocabulary.
      kept: which of the text towers of `text_sizes`.
    """

    def __init__(self, config: Config, *, kept: bool = True, rngs: nnx.Rngs):
        dtype = jnp.dtype("float32")
        self.vision = SigLIP(config.siglip, config.image_size, dtype=dtype, rngs=rngs)
        self.pooling = Pooling(config.siglip, rngs=rngs)
        sizes = text_sizes(config.siglip, kept)
        self.text = TextTower(sizes, config.decoder.vocab_size, rngs=rngs)
        # Where the paper starts them: nearly all pairs do not fit.
        self.logit_scale = nnx.Param(jnp.full((1,), math.log(10.0)))
        self.logit_bias = nnx.Param(jnp.full((1,), -10.0))

    def see(self, image_BHWC: jax.Array) -> jax.Array:
        """Unit vectors [B, D] of images."""
        return unit(self.pooling(self.vision(image_BHWC)))

    def read(self, tokens_BL: jax.Array) -> jax.Array:
        """Unit vectors [B, D] of captions."""
        return unit(self.text(tokens_BL))

    def logits(self, image_XD: jax.Array, text_YD: jax.Array) -> jax.Array:
        """Log-odds [X, Y] that an image and a caption fit."""
        scale, bias = jnp.exp(self.logit_scale[...]), self.logit_bias[...]
        return image_XD @ text_YD.T * scale[None] + bias[None]


def unit(x_BD: jax.Array) -> jax.Array:
    """Vectors of length 1."""
    return x_BD / jnp.linalg.norm(x_BD, axis=-1, keepdims=True)


def fitting(
    shown_XF: jax.Array, unknown_XF: jax.Array, stated_YF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which images and captions fit [X, Y], and of which pairs that can be said.

    Args:
      shown_XF: facts that are so in an image, 0 or 1.
      unknown_XF: facts that cannot be judged of it.
      stated_YF: facts that a caption states.
    """
    return (1 - shown_XF) @ stated_YF.T == 0, unknown_XF @ stated_YF.T == 0


def sigmoid_loss(logits_XY: jax.Array, fits_XY: jax.Array, counts_XY: jax.Array) -> jax.Array:
    """The loss of the paper, summed over captions and averaged over images.

    Args:
      logits_XY: of images and captions.
      fits_XY: bool, pairs that fit.
      counts_XY: bool, pairs of which that can be said.
    """
    sign = jnp.where(fits_XY, 1.0, -1.0)
    return -jnp.sum(jax.nn.log_sigmoid(sign * logits_XY) * counts_XY) / len(logits_XY)


def views(batch: Batch, key: jax.Array, config: Config) -> jax.Array:
    """All images of the records [kinds * B, H, W, 3], in the order of `tiny_text.KINDS`.

    Blends of original and aligned reconstruction are among them, because a fused image is what
    the encoder will see. Each is enlarged, moved, mirrored and lit at random.
    """
    keys = jax.random.split(key, 5)
    images = all_images(batch, keys[0], config)
    image_BHWC = jnp.concatenate([images[kind] for kind in tiny_text.KINDS])
    X, H, W, _ = image_BHWC.shape
    scale_X1 = ZOOM ** jax.random.uniform(keys[1], (X, 1), minval=-1.0)
    moved_X2 = SHIFT * jax.random.uniform(keys[2], (X, 2), minval=-1.0)
    size_2 = jnp.array([W, H], jnp.float32)
    shift_X2 = (0.5 - 0.5 * scale_X1 + moved_X2) * size_2[None]
    scale_X2 = jnp.broadcast_to(scale_X1, (X, 2))
    image_BHWC = resample(image_BHWC, Affine(scale_X2, shift_X2), (H, W))
    mirrored_X = jax.random.bernoulli(keys[3], 0.5, (X,))
    image_BHWC = jnp.where(mirrored_X[:, None, None, None], image_BHWC[:, :, ::-1], image_BHWC)
    light_X2 = LIGHT * jax.random.normal(keys[4], (X, 2))
    gain, offset = (light_X2[:, i][:, None, None, None] for i in range(2))
    return jnp.clip(image_BHWC * (1 + gain) + offset, -1, 1)


def captioned_batches(
    config: Config, records: Dataset, tokenizer: Tokenizer, step: int, samples: int
) -> Iterator[Loaded]:
    """Batches with a caption for each view, and which facts captions state and images show."""
    metas = [records[i].meta for i in range(len(records))]
    for loaded in training_batches(config, records, None, step * samples, samples):
        rng = np.random.default_rng((config.seed, step))
        words = {name: [] for name in ("tokens", "stated", "shown", "unknown")}
        for kind in tiny_text.KINDS:
            for index in loaded.batch.index:
                image = tiny_text.truth(kind, metas[index])
                text, stated = tiny_text.caption(image, rng)
                words["tokens"].append(caption_tokens(tokenizer, text))
                words["stated"].append(tiny_text.vectors(stated))
                words["shown"].append(tiny_text.vectors(image.facts))
                words["unknown"].append(tiny_text.unknown(image))
        arrays = {name: np.stack(rows) for name, rows in words.items()}
        yield loaded._replace(batch={"images": loaded.batch, **arrays})
        step += 1


def caption_tokens(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """A caption as SigLIP reads it, int32 [CAPTION_TOKENS]: its words, padded to one length."""
    ids = tokenizer.encode(text).ids[:CAPTION_TOKENS]
    return np.array(ids + [PAD] * (CAPTION_TOKENS - len(ids)), np.int32)


def loss(
    model: TwoTowers, batch: dict[str, Any], key: jax.Array, config: Config
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch of `captioned_batches`, and metrics."""
    image_XD = model.see(views(batch["images"], key, config))
    text_YD = model.read(batch["tokens"])
    facts = (batch[name].astype(jnp.float32) for name in ("shown", "unknown", "stated"))
    fits_XY, counts_XY = fitting(*facts)
    logits_XY = model.logits(image_XD, text_YD)
    right = ((logits_XY > 0) == fits_XY) & counts_XY
    caught = jnp.sum(right & fits_XY) / jnp.maximum(jnp.sum(fits_XY & counts_XY), 1)
    return sigmoid_loss(logits_XY, fits_XY, counts_XY), {"fitting_accuracy": caught}


def tensors(params: Flat, sizes: SigLIPConfig) -> Flat:
    """Both towers under the names of transformers' `SiglipModel`."""
    vision, rest = param_paths.split(params, r"vision\..*")
    text, rest = param_paths.split(rest, r"text\..*")
    pool = {path.removeprefix("pooling."): value for path, value in rest.items()}
    out = to_hf.siglip_tensors(_inside(vision, "vision"), sizes)
    layers = {k: v for k, v in _inside(text, "text").items() if k.startswith("layers.")}
    block_rules = [rule for rule in siglip.rules() if rule.path.startswith(r"layers")]
    inverses = {same: same, transposed: transposed}
    inverse = to_hf.undo(layers, block_rules, inverses)
    out |= {f"text_model.{key}": value for key, value in inverse.items()}
    names = {
        "text.embedding": "text_model.embeddings.token_embedding.weight",
        "text.position_embed": "text_model.embeddings.position_embedding.weight",
        "text.norm.scale": "text_model.final_layer_norm.weight",
        "text.norm.bias": "text_model.final_layer_norm.bias",
        "text.head.bias": "text_model.head.bias",
        "pooling.norm.scale": "vision_model.head.layernorm.weight",
        "pooling.norm.bias": "vision_model.head.layernorm.bias",
        "pooling.o_proj.bias": "vision_model.head.attention.out_proj.bias",
        "pooling.fc1.bias": "vision_model.head.mlp.fc1.bias",
        "pooling.fc2.bias": "vision_model.head.mlp.fc2.bias",
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
    }
    out |= {theirs: params[ours] for ours, theirs in names.items()}
    kernels = {
        "text.head.kernel": "text_model.head.weight",
        "pooling.o_proj.kernel": "vision_model.head.attention.out_proj.weight",
        "pooling.fc1.kernel": "vision_model.head.mlp.fc1.weight",
        "pooling.fc2.kernel": "vision_model.head.mlp.fc2.weight",
    }
    out |= {theirs: params[ours].T for ours, theirs in kernels.items()}
    out["vision_model.head.probe"] = pool["probe"][None, None]
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
        fused = [pool[f"{p}_proj.{ours}"].T for p in "qkv"]
        out[f"vision_model.head.attention.in_proj_{theirs}"] = np.concatenate(fused)
    return out


def description(config: Config) -> dict[str, Any]:
    """config.json of transformers' `SiglipModel`."""
    vision = to_hf.siglip_config(config)
    vision.pop("architectures")
    sizes = text_sizes(config.siglip, kept=True)
    text = {
        "bos_token_id": 0,
        "eos_token_id": PAD,
        "pad_token_id": PAD,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": sizes.embed_dim,
        "intermediate_size": sizes.mlp_dim,
        "layer_norm_eps": sizes.layer_norm_eps,
        "max_position_embeddings": CAPTION_TOKENS,
        "model_type": "siglip_text_model",
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "projection_size": sizes.embed_dim,
        "vocab_size": config.decoder.vocab_size,
    }
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": text,
        "vision_config": vision | {"vision_use_head": True},
    }


def _inside(params: Flat, part: str) -> Flat:
    return {path.removeprefix(part + "."): value for path, value in params.items()}
