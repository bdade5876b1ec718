"""Published checkpoints in transformers' own classes, built from their own config.json.

What `verify` compares with. Nothing here asks the converter: class, numbers and defaults are what
transformers makes of config.json, so that what the converter misreads becomes a difference. None of
the checkpoint's own code is run. transformers has no class for InternLM2's and Janus's own names;
each function says what the reference is instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from htfa_jax.errors import CheckpointError
from weights_convert import internlm2
from weights_convert.language_model import SECTIONS, kind_of
from weights_convert.reference import llama_names, siglip_names, tensor
from weights_convert.source import Source

# Configuration of InternLM2 as published with it, where it differs from transformers' Llama.
_INTERNLM2 = {"model_type": "llama", "attention_bias": False, "mlp_bias": False}


def decoder(source: Source, num_layers: int) -> tuple[torch.nn.Module, str]:
    """The language model of a checkpoint, and what it is.

    Args:
      source: the checkpoint.
      num_layers: only so many layers.

    Raises CheckpointError if transformers does not take it.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    place = internlm2.find(source)
    config, what = _text_config(source, place)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    state = {}
    for key in source.keys:
        layer = re.match(re.escape(place.body) + r"layers\.(\d+)\.", key)
        apart = re.fullmatch(re.escape(place.body) + internlm2.INSIDE, key)
        if apart or "inv_freq" in key or (layer and int(layer[1]) >= num_layers):
            continue
        if key.startswith(place.body) and key != place.head:
            state["model." + key.removeprefix(place.body)] = tensor(source.read(key))
    if place.head in source:
        state["lm_head.weight"] = tensor(source.read(place.head))
    if place.naming == "InternLM2":
        groups = config.num_key_value_heads
        state = llama_names(state, groups, config.hidden_size // config.num_attention_heads)
    try:
        cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return _loaded(cls, config, state, source), what
    except KeyError:
        raise CheckpointError(
            f"transformers has no language model for {type(config).__name__} of {source.name}"
        ) from None


def _text_config(source: Source, place: internlm2.Place) -> tuple[Any, str]:
    """transformers' configuration of the language model, and what the reference is."""
    part, whole = source.section(*SECTIONS), source.config
    # Without these, a tensor of another shape would say the same.
    shapes = _shapes(source, place)
    if place.naming == "InternLM2":
        told = {k: v for k, v in part.items() if k not in ("architectures", "bias", "auto_map")}
        config = _config(source, "llama", {**shapes, **told, **_INTERNLM2})
        return config, (
            "reference: transformers' Llama by the numbers of config.json (transformers has no "
            "InternLM2, and the checkpoint's own code is not run)"
        )
    if part is not whole and _is_known(whole.get("model_type")):
        config = _config(source, str(whole["model_type"]), whole).get_text_config(decoder=True)
        if whole.get("tie_word_embeddings"):
            config.tie_word_embeddings = True
    else:
        kind = kind_of(source)[0]
        config = _config(source, kind, {**shapes, **part, "model_type": kind})
    return config, f"reference: transformers' {type(config).__name__.removesuffix('Config')}"


def _shapes(source: Source, place: internlm2.Place) -> dict[str, int]:
    """Sizes that only tensors tell where config.json leaves them out."""
    named = {
        "InternLM2": ("tok_embeddings", "feed_forward.w1", "attention.wqkv"),
        "Llama": ("embed_tokens", "mlp.gate_proj", "self_attn.k_proj"),
    }[place.naming]
    layer = f"{place.body}layers.0."
    words, width = source.shape(f"{place.body}{named[0]}.weight", 2)
    found = {"vocab_size": words, "hidden_size": width}
    found["intermediate_size"] = source.shape(f"{layer}{named[1]}.weight", 2)[0]
    heads = source.section(*SECTIONS).get("num_attention_heads")
    if isinstance(heads, int) and heads > 0:
        rows = source.shape(f"{layer}{named[2]}.weight", 2)[0]
        wide = (rows - width) // 2 if place.naming == "InternLM2" else rows
        found["num_key_value_heads"] = wide * heads // width
    return found


def _is_known(kind: Any) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def _config(source: Source, kind: str, told: Mapping[str, Any]) -> Any:
    """transformers' configuration of a kind. Raises CheckpointError if it takes no such values."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not _is_known(kind):
        raise CheckpointError(f"transformers knows no model_type {kind!r} of {source.name}")
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(told))
    except Exception as error:  # its checks raise errors of their own kinds
        raise CheckpointError(
            f"transformers does not take config.json of {source.name}: {error}"
        ) from error


def siglip(source: Source, prefix: str, naming: str) -> tuple[torch.nn.Module, str]:
    """The vision tower of a checkpoint at its own image size, and what it is.

    Args:
      source: the checkpoint.
      prefix: of the tower's tensors.
      naming: "transformers" or "timm".
    """
    import transformers

    state = {
        key.removeprefix(prefix): tensor(source.read(key))
        for key in source.keys
        if key.startswith(prefix) and "position_ids" not in key
    }
    if naming == "timm":
        return _janus_tower(source, state)
    whole = source.config
    if _is_known(whole.get("model_type")):
        config = _config(source, str(whole["model_type"]), whole)
        config = getattr(config, "vision_config", config)
    else:
        part = source.section("vision_config")
        config = _config(source, str(part.get("model_type")), part)
    named = type(config).__name__.removesuffix("Config") + "Model"
    cls: Any = getattr(transformers, named, None) or _janus_class(named)
    if named == "SiglipVisionModel":
        config.vision_use_head = False
    state = {k: v for k, v in state.items() if not k.startswith("head.")}
    if named.startswith("Janus"):
        old, new = ".self_attn.out_proj.", ".self_attn.projection_layer."
        state = {k.replace(old, new): v for k, v in state.items()}
    return _loaded(cls, config, state, source), f"reference: transformers' {named}"


def _janus_class(named: str) -> Any:
    from transformers.models.janus import modeling_janus

    return getattr(modeling_janus, named)


def _janus_tower(source: Source, state: Mapping[str, Tensor]) -> tuple[torch.nn.Module, str]:
    """Janus's own tower in transformers' SiglipVisionModel with the exact GELU of Janus's code."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    name = source.section("vision_config").get("params", {}).get("model_name", "")
    used = {k: v for k, v in state.items() if not k.startswith(("head", "attn_pool", "fc_norm"))}
    out = siglip_names(used)
    table = "embeddings.position_embedding.weight"
    out[table] = out[table].squeeze(0)
    positions, width = out[table].shape
    patch = out["embeddings.patch_embedding.weight"].shape[-1]
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=len(out["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=sum(key.endswith(".layer_norm1.bias") for key in out),
        num_attention_heads=width // (72 if "so400m" in name else 64),
        patch_size=patch,
        image_size=patch * int(positions**0.5),
        hidden_act="gelu",
        vision_use_head=False,
    )
    return _loaded(SiglipVisionModel, config, out, source), (
        f"reference: transformers' SiglipVisionModel as Janus's code builds {name}: exact GELU "
        "(transformers does not read these names)"
    )


def _loaded(cls: Any, config: Any, state: dict[str, Tensor], source: Source) -> torch.nn.Module:
    """A model as `from_pretrained` makes it, which also decides what is tied."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config._attn_implementation = "eager"
    # Some releases of transformers put "vision_model." before an encoder's names, some do not.
    with torch.device("meta"):
        names = set(cls(config).state_dict())
    if not set(state) & names:
        state = {f"vision_model.{name}": value for name, value in state.items()}
    try:
        model, told = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"transformers' {cls.__name__} does not take {source.name}: {error}"
        ) from error
    wrong = [*told["missing_keys"], *told["unexpected_keys"], *map(str, told["mismatched_keys"])]
    if wrong:
        raise CheckpointError(
            f"transformers' {cls.__name__} by config.json of {source.name} has other tensors: "
            + ", ".join(sorted(wrong)[:10])
        )
    return model.eval()
