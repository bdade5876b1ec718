"""What a checkpoint's config.json says of its language model, read whole or refused by name.

Models of many architectures have tensors of the same names and shapes and compute something else
with them. So an architecture is converted only if it is listed here, what config.json leaves out is
the default of the architecture's own configuration class (never a guess), and a field that changes
the computation has the value with which it is this decoder's.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from htfa_jax.errors import CheckpointError
from weights_convert.source import Source

log = logging.getLogger("htfa_jax.weights_convert")

SECTIONS = ("llm_config", "text_config", "language_config")

# Defaults of the configuration classes; a test compares them with transformers' own. InternLM2's
# stand in the configuration that is published with its weights.
_COMMON: dict[str, Any] = {
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "attention_bias": False, "mlp_bias": False},
    "internlm2": {**_COMMON},
    "mistral": {
        **_COMMON,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        **_COMMON,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
    },
}
# Those whose queries, keys and values have biases.
BIASED = ("qwen2",)

# What the models of which a part is named so take when the part does not say what it is.
PARTS = {
    "janus": "llama",
    "multi_modality": "llama",
    "llava": "llama",
    "llava_next": "llama",
    "vipllava": "llama",
    "video_llava": "llama",
    "llava_onevision": "qwen2",
    "internvl": "qwen2",
}

# What other architectures do with tensors of the same or similar names.
OTHERS = {
    "granite": "multiplies embeddings, attention, residuals and logits by factors of its own",
    "smollm3": "leaves the rotary positions out of every fourth layer",
    "qwen3": "norms queries and keys",
    "gemma": "scales embeddings, adds one to the scales of its norms and has a GELU",
    "gemma2": "has Gemma's norms and caps its logits",
    "gemma3": "has Gemma's norms, norms queries and keys and slides windows",
    "gemma3_text": "has Gemma's norms, norms queries and keys and slides windows",
    "phi": "has parallel blocks, partial rotary positions and biases",
    "phi3": "has fused projections and scales positions in a way of its own",
    "olmo": "has norms without scales",
    "olmo2": "norms behind its layers, and queries and keys",
    "stablelm": "rotates only a part of each head",
    "cohere": "has parallel blocks and scales its logits",
    "mixtral": "has several experts instead of one MLP",
    "qwen2_moe": "has several experts instead of one MLP",
    "qwen2_vl": "rotates by three positions for each token",
    "qwen2_5_vl": "rotates by three positions for each token",
    "internlm": "has biases in all of its attention",
    "internlm3": "has another choice of biases and head sizes",
    "ministral": "slides windows in some of its layers",
}

# Fields that change nothing of what the weights compute, or that the tensors tell as well.
_HARMLESS = re.compile(
    r"_.*|architectures|model_type|auto_map|transformers_version|torch_dtype|dtype|use_cache|"
    r"use_bfloat16|torchscript|attn_implementation|vocab_size|.*token_id|.*token_index|.*token|"
    r"initializer_.*|pretraining_tp|.*dropout.*|.*pdrop|output_.*|return_dict.*|"
    r"gradient_checkpointing|is_decoder|chunk_size_feed_forward|problem_type|"
    r"id2label|label2id|num_labels|finetuning_task|task_specific_params|prefix|max_length|"
    r"min_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|"
    r"temperature|top_k|top_p|typical_p|repetition_penalty|length_penalty|.*ngram_size|"
    r"bad_words_ids|num_return_sequences|remove_invalid_values|exponential_decay_length_penalty|"
    r".*suppress_tokens|tokenizer_.*|tie_encoder_decoder|pruned_heads|tf_legacy_loss|"
    r"cross_attention_hidden_size|max_sequence_length|unsloth_.*|max_window_layers|"
    r"mm_.*|image_.*|vision_.*|tune_.*|(un)?freeze_.*|use_mm_.*|hidden_size|intermediate_size|"
    r"num_hidden_layers|rope_scaling|rope_parameters|_name_or_path"
)
# Words in the names of fields that change what is computed.
_TELLING = re.compile(
    r"multiplier|scal|softcap|capping|window|sliding|bias|norm|rope|rotary|alibi|expert|moe|"
    r"(^|_)qk|qkv|clip|parallel|residual|layer_types|(^|_)act(ivation)?(_|$)|position|attn|"
    r"attention|sparse|mup|router|conv|ssm|mamba|sink|gate|quant|compress|lora|per_layer|"
    r"kv_|shared?_|interval|theta|eps"
)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What config.json says, with the defaults of its class.

    Attributes:
      kind: "llama", "internlm2", "mistral" or "qwen2".
      num_heads: query heads.
      num_kv_heads: heads of keys and values, None unless it is said.
      rope_theta, rope_factor: of the rotary positions.
      max_positions: longest sequence for which the rotary positions are these.
      rms_norm_eps: epsilon of the norms.
      tied: whether the LM head is said to be the embedding.
      biased: whether queries, keys and values have biases.
    """

    kind: str
    num_heads: int
    num_kv_heads: int | None
    rope_theta: float
    rope_factor: float
    max_positions: int
    rms_norm_eps: float
    tied: bool
    biased: bool


def read(source: Source, width: int, num_layers: int, mlp_dim: int, words: int) -> LanguageModel:
    """Reads the language model's part of config.json.

    Args:
      source: the checkpoint.
      width, num_layers, mlp_dim, words: what the tensors say of it.

    Raises:
      CheckpointError: no config.json, an architecture or a value with which it computes something
        else, or one that contradicts the tensors.
    """
    kind, section = kind_of(source)
    told = {**DEFAULTS[kind], **section}

    def refuse(name: str, value: Any, why: str) -> CheckpointError:
        return CheckpointError(f"{source.name}: config.json says {name} {value!r}: {why}")

    for name, found in (
        ("hidden_size", width),
        ("num_hidden_layers", num_layers),
        ("intermediate_size", mlp_dim),
        ("vocab_size", words),
    ):
        if section.get(name, found) != found:
            raise refuse(name, section[name], f"the tensors say {found}; is it the right file?")

    def number(name: str, positive: type = int) -> Any:
        value = told[name]
        if not is_positive(value) or (positive is int and value != int(value)):
            raise refuse(name, value, f"expected a positive {positive.__name__}")
        return positive(value)

    heads = number("num_attention_heads")
    if width % heads:
        said = "config.json" if "num_attention_heads" in section else f"the default of {kind}"
        raise CheckpointError(
            f"{source.name}: num_attention_heads is {heads} by {said}, which does not divide the "
            f"width {width}: add num_attention_heads to its config.json"
        )
    longest = number("max_position_embeddings")
    _check(told, kind, width // heads, longest, refuse)
    theta, factor, limit = _rope(told, longest, refuse)
    tied = told["tie_word_embeddings"] or source.config.get("tie_word_embeddings")
    kv_heads = section.get("num_key_value_heads")
    return LanguageModel(
        kind=kind,
        num_heads=heads,
        num_kv_heads=None if kv_heads is None else number("num_key_value_heads"),
        rope_theta=theta,
        rope_factor=factor,
        max_positions=limit,
        rms_norm_eps=number("rms_norm_eps", float),
        tied=bool(tied),
        biased=kind in BIASED,
    )


def kind_of(source: Source) -> tuple[str, dict[str, Any]]:
    """The architecture, and its part of config.json.

    Raises CheckpointError unless it is one that computes what this decoder does.
    """
    if not source.config:
        raise CheckpointError(
            f"{source.name}: no config.json beside the weights says what they compute with "
            "(model_type, num_attention_heads, rope_theta, ...): put the checkpoint's own there"
        )
    section = source.section(*SECTIONS)
    named = _of_architectures(section.get("architectures"))
    kind = section.get("model_type")
    whole = source.config.get("model_type")
    if section is not source.config:
        kind = kind or named or PARTS.get(str(whole))
    elif named and str(kind).startswith("llava"):
        kind = named  # LLaVA's own checkpoints have no part for it
    kind = kind or named
    if not isinstance(kind, str):
        raise CheckpointError(
            f"{source.name}: config.json says no model_type, and many architectures have tensors "
            "of these names: put the checkpoint's own config.json there"
        )
    if named and named != kind and (named in DEFAULTS or named in OTHERS):
        raise CheckpointError(
            f"{source.name}: config.json says model_type {kind!r} and architectures of {named!r}; "
            "they must be of one model"
        )
    if kind not in DEFAULTS:
        why = OTHERS.get(str(kind), "is not known to compute what this decoder does")
        raise CheckpointError(
            f"{source.name} is of model_type {kind!r}, whose tensors may have the same names: "
            f"{kind} {why}. These are converted: {', '.join(DEFAULTS)}"
        )
    return kind, section


def is_positive(value: Any) -> bool:
    """Whether a value of config.json is a positive number, and not an absurd one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e15


def _of_architectures(names: Any) -> str | None:
    """The model_type that the name of a class says: LlamaForCausalLM is a llama."""
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        return None
    match = re.fullmatch(r"(?:Llava)?(\w+?)(For\w+|Model|LMHeadModel)", names[0])
    kind = match[1].lower() if match else None
    return "qwen2" if kind == "qwen" and names[0].startswith("Llava") else kind


def _check(
    told: Mapping[str, Any],
    kind: str,
    head_dim: int,
    longest: int,
    refuse: Callable[[str, Any, str], CheckpointError],
) -> None:
    """Raises CheckpointError for a field with which the computation is another."""

    def is_one(value: Any) -> bool:
        return value == 1 and not isinstance(value, bool)

    def is_full(value: Any) -> bool:
        return isinstance(value, list) and all(v == "full_attention" for v in value)

    def reaches(value: Any) -> bool:
        return isinstance(value, int) and value >= longest

    wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
        "hidden_act": (lambda v: v in ("silu", "swish"), "this decoder's is silu"),
        "head_dim": (lambda v: v == head_dim, f"this decoder's is width / heads, {head_dim}"),
        "layer_types": (is_full, "this decoder attends to all earlier tokens in every layer"),
        "no_rope_layers": (
            lambda v: isinstance(v, list) and all(one == 1 for one in v),
            "this decoder rotates in every layer",
        ),
        "partial_rotary_factor": (is_one, "this decoder rotates whole heads"),
        "rope_interleaved": (lambda v: not v, "this decoder rotates halves"),
        "attention_multiplier": (
            lambda v: v == head_dim**-0.5,
            "this decoder's is one over the root of the head size",
        ),
        "query_pre_attn_scalar": (lambda v: v == head_dim, f"this decoder's is {head_dim}"),
    }
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"):
        wanted[name] = (is_one, "this decoder has no such factor")
    if kind != "qwen2" or told.get("use_sliding_window"):
        wanted["sliding_window"] = (
            reaches,
            f"this decoder attends to all earlier tokens, up to {longest}",
        )
    if kind == "internlm2":
        wanted["bias"] = (lambda v: not v, "InternLM2 with biases is not converted")
    read = {*DEFAULTS[kind], *wanted} - {"attention_bias", "mlp_bias"}
    for name, value in told.items():
        if value is None or value is False or value in ("", [], {}):
            continue
        if name in wanted:
            fits, why = wanted[name]
            if not fits(value):
                raise refuse(name, value, f"{why}; with it, the weights compute something else")
        elif name in read or _HARMLESS.fullmatch(name):
            continue
        elif name in ("use_sliding_window", "sliding_window"):
            continue  # looked at above: an unused window, or one that is judged by its length
        elif _TELLING.search(name):
            raise refuse(
                name, value, "nothing here knows what it changes; without it, they might convert"
            )
        else:
            log.warning("config.json says %s %r, which is not read", name, value)


def _rope(
    told: Mapping[str, Any], longest: int, refuse: Callable[[str, Any, str], CheckpointError]
) -> tuple[float, float, int]:
    """Base, factor of linear scaling, and the longest sequence.

    Dynamic scaling changes nothing up to the length that the checkpoint was trained with, and
    everything with every length beyond: it is taken up to there.
    """
    field = "rope_scaling" if told.get("rope_scaling") else "rope_parameters"
    rope = told.get(field) or {}
    if not isinstance(rope, dict):
        raise refuse(field, rope, "expected an object")
    known = {"type", "rope_type", "factor", "rope_theta", "partial_rotary_factor"}
    known |= {"original_max_position_embeddings"}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "dynamic"):
        raise refuse(
            field, rope, f"rope scaling of type {kind}; default, linear and dynamic are converted"
        )
    if unknown := sorted(set(rope) - known):
        raise refuse(field, rope, f"nothing here knows what {', '.join(unknown)} changes")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise refuse(field, rope, "this decoder rotates whole heads")
    # As in transformers, what stands in the object goes first.
    theta, factor = rope.get("rope_theta") or told["rope_theta"], rope.get("factor", 1.0)
    if not is_positive(theta):
        raise refuse("rope_theta", theta, "expected a positive number")
    if kind != "linear":
        factor = 1.0
    elif not is_positive(factor):
        raise refuse(field, rope, "expected a positive number as its factor")
    trained = rope.get("original_max_position_embeddings")
    if kind == "dynamic" and isinstance(trained, int) and 0 < trained < longest:
        longest = trained
    return float(theta), float(factor), longest
