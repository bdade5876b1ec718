"""What a checkpoint's config.json says of its vision tower, read whole or refused by name.

As `language_model`: what is left out is the default of the architecture's own configuration class,
and what would change the computation is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from htfa_jax.errors import CheckpointError
from weights_convert.language_model import is_positive
from weights_convert.source import Source

TANH, EXACT = "gelu_pytorch_tanh", "gelu"
NAFLEX = (
    "SigLIP 2 at free resolution (NaFlex): it has a linear layer for patches and one grid of "
    "positions for all shapes of images. Take a fixed-resolution SigLIP 2 such as "
    "google/siglip2-so400m-patch14-384, or a SigLIP"
)
TAKE = (
    "Take google/siglip-so400m-patch14-384, another SigLIP or fixed-resolution SigLIP 2, or a "
    "Janus checkpoint"
)

# Defaults of the configuration classes; a test compares them with transformers' own.
DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {
        "num_attention_heads": 12,
        "hidden_act": TANH,
        "layer_norm_eps": 1e-6,
    },
    "janus_vision_model": {
        "num_attention_heads": 16,
        "hidden_act": EXACT,
        "layer_norm_eps": 1e-6,
    },
}
# Which tower the models have whose part for it does not say.
PARTS = {"siglip": "siglip_vision_model", "janus": "janus_vision_model"}

# Janus's own names for its towers: head size of each. Its code builds them with PyTorch's GELU,
# which is the exact one (`janus/models/siglip_vit.py`), and with an epsilon of 1e-6.
JANUS_HEADS = {
    "siglip_large_patch16_384": 64,
    "siglip_so400m_patch14_384": 72,
    "siglip_so400m_patch14_224": 72,
}

_READ = ("num_attention_heads", "hidden_act", "layer_norm_eps")
# Values with which the tower is this project's.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "num_channels": (3,),
    "attention_bias": (True,),
    "use_qk_norm": (False,),
    "use_head": (True, False),
    "vision_use_head": (True, False),
}
_HARMLESS = {
    *("model_type", "architectures", "transformers_version", "torch_dtype", "dtype"),
    *("_name_or_path", "_attn_implementation_autoset", "attn_implementation"),
    *("attention_dropout", "hidden_dropout_rate", "projection_dropout", "dropout"),
    *("initializer_range", "initializer_factor", "projection_dim", "depth", "num_image_tokens"),
    *("image_size", "hidden_size", "intermediate_size", "num_hidden_layers", "patch_size"),
    *("mlp_ratio", "vocab_size", "base_config_key", "output_attentions", "return_dict"),
    *("output_hidden_states", "num_positions", "projector_hidden_act", "num_patches"),
}
# Words in the names of fields that change what is computed.
_TELLING = ("norm", "bias", "rope", "rotary", "window", "scal", "act", "qk", "pos", "pool", "attn")


@dataclasses.dataclass(frozen=True)
class VisionTower:
    """What config.json says, with the defaults of its class.

    Attributes:
      kind: "siglip_vision_model", "janus_vision_model", or "janus" in Janus's own names.
      num_heads: of the attention.
      hidden_act: "gelu_pytorch_tanh" or "gelu".
      layer_norm_eps: epsilon of the norms.
    """

    kind: str
    num_heads: int
    hidden_act: Any
    layer_norm_eps: float


def read_transformers(source: Source, found: Mapping[str, int]) -> VisionTower:
    """Reads the tower's part of a config.json of transformers.

    Args:
      source: the checkpoint.
      found: sizes that the tensors tell, by the names of config.json.

    Raises:
      CheckpointError: no config.json, another tower, or a value with which it computes something
        else or which contradicts the tensors.
    """
    section = _section(source)
    kind, whole = section.get("model_type"), str(source.config.get("model_type"))
    if section is source.config or kind is None:
        kind = PARTS.get(whole, kind)
    kind = str(kind or _of_architectures(source.config))
    if kind.startswith("siglip2"):
        raise CheckpointError(f"{source.name} is {NAFLEX}")
    if kind not in DEFAULTS:
        raise CheckpointError(
            f"{source.name}: config.json says a vision tower of model_type {kind!r}, which is not "
            f"known to compute what SigLIP does. {TAKE}"
        )
    told = {**DEFAULTS[kind], **section}
    for name, value in found.items():
        said = section.get(name, value)
        one = said[0] if isinstance(said, list) and said else said
        if name == "image_size" and is_positive(one):
            # Published ones of 384 pixels have patches of 14, which do not fill them.
            one -= one % found["patch_size"]
        if one != value:
            raise _refusal(source, name, said, f"the tensors say {value}; is it the right file?")
    for name, value in told.items():
        if name in _READ or name in _HARMLESS or value in (None, "", [], {}):
            continue
        if name in _ALLOWED:
            if value not in _ALLOWED[name]:
                raise _refusal(source, name, value, f"expected {_ALLOWED[name]}")
        elif value is not False and any(word in name for word in _TELLING):
            raise _refusal(source, name, value, "nothing here knows what it changes")
    heads, eps = told["num_attention_heads"], told["layer_norm_eps"]
    if told["hidden_act"] not in (TANH, EXACT):
        raise _refusal(source, "hidden_act", told["hidden_act"], f"expected {TANH} or {EXACT}")
    if not is_positive(heads) or heads != int(heads) or found["hidden_size"] % int(heads):
        raise CheckpointError(
            f"{source.name}: num_attention_heads {heads!r} (of config.json, or the default of "
            f"{kind}) does not divide the width {found['hidden_size']}"
        )
    if not is_positive(eps):
        raise _refusal(source, "layer_norm_eps", eps, "expected a positive number")
    return VisionTower(kind, int(heads), told["hidden_act"], float(eps))


def read_janus(source: Source, width: int) -> VisionTower:
    """Reads what Janus's own config.json says of its tower, which is named as in timm.

    Args:
      source: the checkpoint.
      width: of the tower, as the tensors tell.

    Raises:
      CheckpointError: it names no tower of Janus.
    """
    section = _section(source)
    params = section.get("params", {})
    name = params.get("model_name") if isinstance(params, dict) else None
    size = JANUS_HEADS.get(str(name))
    if size is None:
        raise CheckpointError(
            f"{source.name}: config.json says no tower of Janus (vision_config.params.model_name "
            f"is {name!r}, expected {', '.join(JANUS_HEADS)}), and towers named as in timm differ "
            f"in heads and in their GELU. {TAKE}"
        )
    if width % size:
        raise CheckpointError(
            f"{source.name}: the heads of {name} are {size} wide, which does not divide the width "
            f"{width} of the tensors"
        )
    for field, expected in (("select_layer", -1), ("select_feature", "same")):
        if params.get(field, expected) != expected:
            raise _refusal(source, field, params[field], f"HTFA reads the last layer ({expected})")
    return VisionTower("janus", width // size, EXACT, 1e-6)


def _section(source: Source) -> dict[str, Any]:
    if not source.config:
        raise CheckpointError(
            f"{source.name}: no config.json beside the weights says what they compute with (heads, "
            "which GELU): put the checkpoint's own there"
        )
    return source.section("vision_config")


def _of_architectures(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    known = {"SiglipVisionModel": "siglip_vision_model", "SiglipModel": "siglip_vision_model"}
    return known.get(str(named[0])) if isinstance(named, list) and len(named) == 1 else None


def _refusal(source: Source, name: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(f"{source.name}: config.json says {name} {value!r} of SigLIP: {why}")
