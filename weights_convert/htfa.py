"""The PyTorch original of HTFA: the `.pt` files of its trainer (commit a805e035e7e6).

The three levels, both adapters and the generation head carry over. What stays behind, and what
carries over with a reservation, is listed with the reasons in the weight folder's config.json.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Level1Config, Level2Config, Level3Config
from htfa_jax.errors import CheckpointError
from htfa_jax.models.level1_adaptive_fusion import AdaptiveFusion
from htfa_jax.models.level2_spatial_attention import SpatialAttention
from htfa_jax.models.level3_encoder_decoupling import EncoderDecoupling
from weights_convert.adapters import refuse_adapters
from weights_convert.convert import ConversionSpec, Rule, linear, same
from weights_convert.files import PICKLES
from weights_convert.siglip import count_layers
from weights_convert.source import Source

log = logging.getLogger("htfa_jax.weights_convert")

# Of every HTFA of the original; no shape tells it.
NUM_HEADS = 8

PLACEHOLDER = (
    "the placeholder VQ: random convolutions and codes, never trained, without a decoder; take a "
    "real VQ (`python -m weights_convert vq`) or let training make one"
)
# {beginning of keys: why these tensors stay behind}
LEFT_TENSORS = {
    "siglip_encoder": "the vision encoder has its own folder (`python -m weights_convert siglip`)",
    "llm_decoder": "it was never run; InternLM2 has its own folder "
    "(`python -m weights_convert internlm2`)",
    "vq_tokenizer": PLACEHOLDER,
    "level3_fusion.generation_branch.vq_tokenizer": PLACEHOLDER,
    "level3_fusion.autoregressive_decoder": "its layers attend to the whole sequence, later tokens "
    "included, and know no positions; the decoder here is InternLM2",
    "level3_fusion.output_norm": "the norm at the end of the decoder that stays behind",
    "prediction_heads.head_understand": "it reads the decoder that stays behind; the LM head "
    "here is InternLM2's own",
}
# {entry of the file beside the weights: why it stays behind}
LEFT_ENTRIES = {
    "optimizer_state_dict": "moments of other parameters than ours; the optimizer starts anew",
    "lr_scheduler_state_dict": "the schedule here is a function of the step",
    "epoch": "a run counts from 0",
    "global_step": "a run counts from 0",
    "best_val_loss": "of another loss: its codes were compared with random numbers",
    "config": "of another program; only level2_num_heads is read from it",
}
UNKNOWN_ENTRY = "not weights, and nothing that the original's trainer writes"
# {our paths: what to know about them}
RESERVATIONS = {
    "level2, level3.adapter_understand": "learned from images normalised with ImageNet's mean "
    "and std; data.image_mean and data.image_std are 0.5 here",
    "level3.adapter_generate": "learned from the placeholder VQ's code vectors, so a real VQ "
    "means other ones",
    "level3.head_generate": "learned from the decoder that stays behind, and to predict random "
    "numbers unless its trainer was mended",
}

# Tensors whose shapes tell the sizes.
QUERY = "level2_fusion.query_proj.weight"
UNDERSTAND = "level3_fusion.understanding_branch.adapter"
GENERATE = "level3_fusion.generation_branch.adapter"
HEAD = "prediction_heads.head_generate.weight"
ALPHA, SCALE = "level1_fusion.fusion_weight_raw", "level1_fusion.fusion_layers"


@dataclasses.dataclass(frozen=True)
class HTFASizes:
    """What a checkpoint of the original tells about the run that can take it."""

    image_size: int  # pixels of a side of the finest alpha
    num_scales: int  # alphas
    embed_dim: int  # width of SigLIP's features
    num_heads: int  # of Level 2
    adapter_mlp_dim: int  # hidden width of both adapters
    adapter_norm: bool  # layer norm at their ends
    codebook_dim: int  # length of a code vector
    codebook_size: int  # codes that the generation head chooses from
    decoder_dim: int  # width of the decoder


def plane(x: np.ndarray) -> np.ndarray:
    """[1, 1, height, width] -> [height, width]."""
    return x.reshape(x.shape[-2:])


def rules(num_scales: int = 1) -> tuple[Rule, ...]:
    """Table for `HTFAModel`; with more than one scale, for its multi-scale Level 1."""
    projections = {"q": "query", "k": "key", "v": "value", "o": "output"}
    table = [
        Rule(r"level1\.scale_weights", "level1_fusion.scale_weights", same),
        Rule(r"level2\.norm\.scale", "level2_fusion.layer_norm.weight", same),
        Rule(r"level2\.norm\.bias", "level2_fusion.layer_norm.bias", same),
        Rule(r"level3\.head_generate\.kernel", HEAD, linear),
    ]
    scale = ALPHA if num_scales == 1 else SCALE + r".\1.fusion_weight_raw"
    table.append(Rule(r"level1\.raw\.(\d+)", scale, plane))
    for ours, theirs in projections.items():
        key = f"level2_fusion.{theirs}_proj."
        table.append(Rule(rf"level2\.{ours}_proj\.kernel", key + "weight", linear))
        table.append(Rule(rf"level2\.{ours}_proj\.bias", key + "bias", same))
    for ours, theirs in {"understand": UNDERSTAND, "generate": GENERATE}.items():
        path = rf"level3\.adapter_{ours}\."
        table += [
            Rule(path + r"(fc[12])\.kernel", theirs + r".\1.weight", linear),
            Rule(path + r"(fc[12])\.bias", theirs + r".\1.bias", same),
            Rule(path + r"norm\.scale", theirs + ".layer_norm.weight", same),
            Rule(path + r"norm\.bias", theirs + ".layer_norm.bias", same),
        ]
    return tuple(table)


def levels(sizes: HTFASizes) -> nnx.Dict:
    """The three levels with fresh weights."""
    level1 = Level1Config(alpha="map", num_scales=sizes.num_scales)
    level2 = Level2Config(num_heads=sizes.num_heads)
    level3 = Level3Config(adapter_mlp_dim=sizes.adapter_mlp_dim, adapter_norm=sizes.adapter_norm)
    options = {"dtype": jnp.dtype("float32"), "rngs": nnx.Rngs(0)}
    return nnx.Dict(
        level1=AdaptiveFusion(level1, sizes.image_size, **options),
        level2=SpatialAttention(level2, sizes.embed_dim, **options),
        level3=EncoderDecoupling(
            level3,
            understand_dim=sizes.embed_dim,
            code_dim=sizes.codebook_dim,
            codebook_size=sizes.codebook_size,
            decoder_dim=sizes.decoder_dim,
            **options,
        ),
    )


def shapes(sizes: HTFASizes) -> Flat:
    """`{path: shape}` of the three levels; allocates nothing."""
    return param_paths.flatten(nnx.split(nnx.eval_shape(lambda: levels(sizes)))[1])


def conversion_spec(source: Source) -> ConversionSpec:
    """What an HTFA checkpoint of the original holds.

    The key prefixes of DataParallel, DDP and torch.compile may stand before all names.

    Raises:
      CheckpointError: no HTFA in it, tensors missing that tell its sizes, or heads that do not
        divide its width.
    """
    refuse_adapters(source)
    prefixes = [
        key.removesuffix(QUERY) for key in source.keys if key == QUERY or key.endswith("." + QUERY)
    ]
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{source.name} holds no HTFA of the PyTorch original: expected one tensor {QUERY}; "
            "`python -m weights_convert info` shows what is inside"
        )
    prefix, beside = prefixes[0], entries_beside(source)
    sizes, told = _sizes(source, prefix, beside)
    left = {
        name: why
        for name, why in LEFT_TENSORS.items()
        if any(key.startswith(f"{prefix}{name}.") for key in source.keys)
    }
    left |= {name: LEFT_ENTRIES.get(name, UNKNOWN_ENTRY) for name in beside}
    for name, why in left.items():
        log.info("%s stays behind: %s", name, why)
    for name, what in RESERVATIONS.items():
        log.warning("%s carries over, but: %s", name, what)
    return ConversionSpec(
        family="htfa",
        variant=f"HTFA as the PyTorch original names it ({prefix or 'no prefix'}), images of "
        f"{sizes.image_size} pixels, {sizes.num_scales} scales, {sizes.embed_dim} wide, "
        f"{sizes.num_heads} heads ({told}), decoder {sizes.decoder_dim} wide",
        sizes=sizes,
        shapes=shapes(sizes),
        rules=rules(sizes.num_scales),
        prefix=prefix,
        ignored={rf"{re.escape(f'{prefix}{name}.')}.*": why for name, why in LEFT_TENSORS.items()},
        notes={"left_behind": left, "reservations": RESERVATIONS},
    )


def _sizes(source: Source, prefix: str, beside: Mapping[str, Any]) -> tuple[HTFASizes, str]:
    """Sizes, and what tells the number of heads."""
    scales = count_layers(source, re.escape(prefix + SCALE) + r"\.(\d+)\..*")
    alpha = f"{SCALE}.0.fusion_weight_raw" if scales else ALPHA
    telling = [alpha, f"{UNDERSTAND}.fc1.weight", f"{UNDERSTAND}.fc2.weight"]
    telling += [f"{GENERATE}.fc1.weight", HEAD]
    missing = [prefix + key for key in telling if prefix + key not in source]
    if missing:
        raise CheckpointError(f"{source.name} is incomplete: no tensor {', '.join(missing)}")
    found = {key: source.shape(prefix + key) for key in [QUERY, *telling]}
    flat = [
        f"{prefix}{key} {shape}"
        for key, shape in found.items()
        if len(shape) != (4 if key == alpha else 2)
    ]
    if flat:
        raise CheckpointError(f"{source.name}: wrong number of dimensions: {', '.join(flat)}")
    config = beside.get("config")
    saved = config.get("level2_num_heads") if isinstance(config, Mapping) else None
    width, heads = found[QUERY][0], saved or NUM_HEADS
    told = "as its config says" if saved else "the original's default; the file does not say"
    if width % heads:
        raise CheckpointError(f"{source.name}: {heads} heads ({told}) do not divide {width}")
    sizes = HTFASizes(
        image_size=found[alpha][-1],
        num_scales=scales or 1,
        embed_dim=width,
        num_heads=heads,
        adapter_mlp_dim=found[f"{UNDERSTAND}.fc1.weight"][0],
        adapter_norm=any(".adapter.layer_norm." in key for key in source.keys),
        codebook_dim=found[f"{GENERATE}.fc1.weight"][1],
        codebook_size=found[HEAD][0],
        decoder_dim=found[f"{UNDERSTAND}.fc2.weight"][0],
    )
    return sizes, told


def entries_beside(source: Source) -> dict[str, Any]:
    """What a `.pt` file holds beside its weights, `{name: value}`; nothing in it is run."""
    files = [name for name in source.weight_files if name.endswith(PICKLES)]
    if len(files) != 1:
        return {}
    import torch

    try:
        content = torch.load(
            source.files.get(files[0]), map_location="cpu", weights_only=True, mmap=True
        )
    except RuntimeError:  # files of before PyTorch 1.6 cannot be mapped
        return {}
    weights = ("state_dict", "model_state_dict", "model", "module")
    return {
        name: value
        for name, value in content.items()
        if name not in weights and not isinstance(value, torch.Tensor)
    }
