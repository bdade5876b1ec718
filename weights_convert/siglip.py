"""SigLIP vision towers: transformers' names, and timm's as in Janus checkpoints.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), and SigLIP 2 at fixed
resolution. The pooling head is left behind: HTFA reads the patches.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import SigLIPConfig
from htfa_jax.errors import CheckpointError
from htfa_jax.models.siglip import SigLIP
from weights_convert.adapters import refuse_adapters
from weights_convert.convert import ConversionSpec, Rule, Transform, linear, same
from weights_convert.source import Source
from weights_convert.vision_tower import (
    NAFLEX,
    TAKE,
    TANH,
    VisionTower,
    read_janus,
    read_transformers,
)

POOLING = "the pooling head makes one vector of an image; HTFA reads the patches"
OTHER_COMPONENTS = "belongs to another component of the checkpoint"


def patch_kernel(x: np.ndarray) -> np.ndarray:
    """[D, 3, p, p] -> [p * p * 3, D]: our patches are flattened (row, column, channel)."""
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def bicubic_weights(source: int, target: int) -> np.ndarray:
    """[target, source]: how each new sample is made of old ones along one axis.

    As torch's `interpolate(mode="bicubic", align_corners=False, antialias=False)`: Keys' kernel
    with a = -0.75 around half-pixel centres, the border repeated.
    """
    a = -0.75
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(centre).astype(int) - 1
    taps = first[:, None] + np.arange(4)[None]
    x = np.abs(centre[:, None] - taps)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    values = np.where(x <= 1, near, far)
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target)[:, None], np.clip(taps, 0, source - 1)), values)
    return weights


def resize_positions(grid: int) -> Transform:
    """Position embeddings [P, D] or [1, P, D] to `grid` x `grid` patches."""

    def transform(x: np.ndarray) -> np.ndarray:
        x = x.reshape(x.shape[-2:])
        side = math.isqrt(len(x))
        if side == grid:
            return x
        weights = bicubic_weights(side, grid)
        square = x.astype(np.float32).reshape(side, side, -1)
        resized = np.einsum("hi,wj,ijd->hwd", weights, weights, square, optimize=True)
        return resized.reshape(grid * grid, -1).astype(np.float32)

    return transform


def rules(positions: Transform = same, output: str = "out_proj") -> tuple[Rule, ...]:
    """Table for `SiglipVisionModel` of transformers, behind `vision_model.`.

    Args:
      positions: what is done to the position embeddings.
      output: name of the attention's last projection.
    """
    layer = r"encoder.layers.{layer}."
    attention = r"layers\.attention\.([qkv])_proj\."
    return (
        Rule(r"patch_embed\.kernel", "embeddings.patch_embedding.weight", patch_kernel),
        Rule(r"patch_embed\.bias", "embeddings.patch_embedding.bias", same),
        Rule(r"position_embed", "embeddings.position_embedding.weight", positions),
        Rule(r"layers\.norm([12])\.scale", layer + r"layer_norm\1.weight", same),
        Rule(r"layers\.norm([12])\.bias", layer + r"layer_norm\1.bias", same),
        Rule(attention + "kernel", layer + r"self_attn.\1_proj.weight", linear),
        Rule(attention + "bias", layer + r"self_attn.\1_proj.bias", same),
        Rule(r"layers\.attention\.o_proj\.kernel", layer + f"self_attn.{output}.weight", linear),
        Rule(r"layers\.attention\.o_proj\.bias", layer + f"self_attn.{output}.bias", same),
        Rule(r"layers\.fc([12])\.kernel", layer + r"mlp.fc\1.weight", linear),
        Rule(r"layers\.fc([12])\.bias", layer + r"mlp.fc\1.bias", same),
        Rule(r"post_norm\.scale", "post_layernorm.weight", same),
        Rule(r"post_norm\.bias", "post_layernorm.bias", same),
    )


def third(part: str, after: Callable[[np.ndarray], np.ndarray] = same) -> Transform:
    """Queries, keys or values out of timm's fused `qkv`, whose rows are q, then k, then v."""
    number = "qkv".index(part)

    def transform(x: np.ndarray) -> np.ndarray:
        return after(x[number * len(x) // 3 : (number + 1) * len(x) // 3])

    return transform


def timm_rules(positions: Transform = same) -> tuple[Rule, ...]:
    """Table for timm's `vit_*_siglip_*`, behind Janus's `vision_model.vision_tower.`."""
    block = r"blocks.{layer}."
    fused = [
        Rule(rf"layers\.attention\.{part}_proj\.{ours}", block + f"attn.qkv.{theirs}", transform)
        for part in "qkv"
        for ours, theirs, transform in (
            ("kernel", "weight", third(part, linear)),
            ("bias", "bias", third(part)),
        )
    ]
    return (
        Rule(r"patch_embed\.kernel", "patch_embed.proj.weight", patch_kernel),
        Rule(r"patch_embed\.bias", "patch_embed.proj.bias", same),
        Rule(r"position_embed", "pos_embed", positions),
        Rule(r"layers\.norm([12])\.scale", block + r"norm\1.weight", same),
        Rule(r"layers\.norm([12])\.bias", block + r"norm\1.bias", same),
        *fused,
        Rule(r"layers\.attention\.o_proj\.kernel", block + "attn.proj.weight", linear),
        Rule(r"layers\.attention\.o_proj\.bias", block + "attn.proj.bias", same),
        Rule(r"layers\.fc([12])\.kernel", block + r"mlp.fc\1.weight", linear),
        Rule(r"layers\.fc([12])\.bias", block + r"mlp.fc\1.bias", same),
        Rule(r"post_norm\.scale", "norm.weight", same),
        Rule(r"post_norm\.bias", "norm.bias", same),
    )


RULES = rules()
IGNORED = {r"head\..*": POOLING, r"embeddings\.position_ids": "numbers 0, 1, 2, ..."}


def shapes(sizes: SigLIPConfig, image_size: int) -> Flat:
    """`{path: shape}` of the encoder; allocates nothing."""
    model = nnx.eval_shape(
        lambda: SigLIP(sizes, image_size, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    )
    return param_paths.flatten(nnx.split(model)[1])


def conversion_spec(source: Source, image_size: int = 448) -> ConversionSpec:
    """What sort of SigLIP a checkpoint holds.

    Args:
      source: the checkpoint.
      image_size: pixels of a side of the images that the encoder will see; position embeddings
        are resized to its grid of patches.

    Raises:
      CheckpointError: no SigLIP in it, or an image size that patches do not fill.
    """
    refuse_adapters(source)
    patch_keys = {
        "transformers": "embeddings.patch_embedding.weight",
        "timm": "patch_embed.proj.weight",
    }
    places = [
        (naming, key.removesuffix(ending))
        for naming, ending in patch_keys.items()
        for key in source.keys
        if key == ending or key.endswith("." + ending)
    ]
    if len(places) != 1 or f"{places[0][1]}embeddings.class_embedding" in source:
        raise CheckpointError(not_siglip(source))
    naming, prefix = places[0]
    if naming == "transformers" and len(source.shape(prefix + patch_keys[naming])) == 2:
        raise CheckpointError(f"{source.name} is {NAFLEX}")
    make = functools.partial(_transformers if naming == "transformers" else _timm, source, prefix)
    sizes, table, ignored = make()
    if image_size % sizes.patch_size:
        raise CheckpointError(
            f"--image_size {image_size} is not a multiple of this encoder's patches of "
            f"{sizes.patch_size} pixels"
        )
    grid = image_size // sizes.patch_size
    return ConversionSpec(
        family="siglip",
        variant=f"SigLIP as {naming} names it ({prefix or 'no prefix'}), "
        f"{sizes.embed_dim} wide, {sizes.num_layers} layers, patches of {sizes.patch_size}, "
        f"{'tanh' if sizes.hidden_act == TANH else 'exact'} GELU",
        sizes=sizes,
        shapes=shapes(sizes, image_size),
        rules=table(resize_positions(grid)),
        prefix=prefix,
        ignored=ignored,
        notes={"image_size": image_size},
    )


def _transformers(source: Source, prefix: str):
    width, _, patch, _ = source.shape(prefix + "embeddings.patch_embedding.weight", 4)
    layers = count_layers(source, re.escape(prefix) + r"encoder\.layers\.(\d+)\..*")
    mlp = source.shape(prefix + "encoder.layers.0.mlp.fc1.weight", 2)[0]
    side = math.isqrt(source.shape(prefix + "embeddings.position_embedding.weight", 2)[0])
    found = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": mlp}
    found |= {"patch_size": patch, "image_size": side * patch}
    tower = read_transformers(source, found)
    sizes = _sizes(tower, patch, width, layers, mlp)
    inside = re.escape(prefix)
    ignored = {
        rf"{inside}head\..*": POOLING,
        rf"{inside}embeddings\.position_ids": "numbers 0, 1, 2, ...",
        r"(.*\.)?text_model\..*|logit_scale|logit_bias": "the text tower; HTFA reads images",
        rf"(?!{inside}).*" if prefix else r"(?!)": OTHER_COMPONENTS,
    }
    # transformers calls it otherwise in Janus.
    named = f"{prefix}encoder.layers.0.self_attn.projection_layer.weight"
    table = functools.partial(rules, output="projection_layer") if named in source else rules
    return sizes, table, ignored


def _timm(source: Source, prefix: str):
    width, _, patch, _ = source.shape(prefix + "patch_embed.proj.weight", 4)
    layers = count_layers(source, re.escape(prefix) + r"blocks\.(\d+)\..*")
    mlp = source.shape(prefix + "blocks.0.mlp.fc1.weight", 2)[0]
    sizes = _sizes(read_janus(source, width), patch, width, layers, mlp)
    inside = re.escape(prefix)
    ignored = {
        rf"{inside}(attn_pool|head|fc_norm)\..*": POOLING,
        rf"(?!{inside}).*" if prefix else r"(?!)": OTHER_COMPONENTS,
    }
    return sizes, timm_rules, ignored


def _sizes(tower: VisionTower, patch: int, width: int, layers: int, mlp: int) -> SigLIPConfig:
    return SigLIPConfig(
        patch_size=patch,
        embed_dim=width,
        num_layers=layers,
        num_heads=tower.num_heads,
        mlp_dim=mlp,
        layer_norm_eps=tower.layer_norm_eps,
        hidden_act=tower.hidden_act,
    )


def count_layers(source: Source, pattern: str) -> int:
    """Highest number that the first group of a regex of keys takes, plus one."""
    found = [int(m[1]) for key in source.keys if (m := re.fullmatch(pattern, key))]
    return max(found, default=-1) + 1


def not_siglip(source: Source) -> str:
    """Why there is no SigLIP, for the sources that users are likely to try."""
    kind = str(source.config.get("model_type", "")) + str(source.config.get("vision_config", ""))
    if "intern" in kind or any(".embeddings.class_embedding" in key for key in source.keys):
        return (
            f"{source.name} holds an InternViT (or another encoder with a class token), not a "
            f"SigLIP. {TAKE}; its decoder converts with `internlm2`"
        )
    return (
        f"{source.name} holds no SigLIP: expected one patch embedding named as in transformers "
        "(embeddings.patch_embedding.weight) or timm (patch_embed.proj.weight); "
        "`python -m weights_convert info` shows what is inside"
    )
