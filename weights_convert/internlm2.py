"""InternLM2, Llama, Mistral and Qwen2 decoders: one architecture under two sets of names."""

from __future__ import annotations

import dataclasses
import logging
import re

import jax.numpy as jnp
import numpy as np
from flax import nnx

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import DecoderConfig
from htfa_jax.errors import CheckpointError
from htfa_jax.models.internlm2 import VOCAB_MULTIPLE, InternLM2
from weights_convert.adapters import refuse_adapters
from weights_convert.convert import ConversionSpec, Rule, Transform, linear, same
from weights_convert.language_model import read
from weights_convert.siglip import OTHER_COMPONENTS, count_layers
from weights_convert.source import Source

log = logging.getLogger("htfa_jax.weights_convert")

# Names of the embedding, behind the body, and of the head, behind the prefix.
NAMES = {
    "InternLM2": ("tok_embeddings.weight", "output.weight"),
    "Llama": ("embed_tokens.weight", "lm_head.weight"),
}
# What LLaVA's own checkpoints keep in the body beside the decoder.
INSIDE = r"(mm_projector|vision_tower|vision_resampler|image_newline)(\..*)?"


def pad_vocab(x: np.ndarray) -> np.ndarray:
    """Rows of zeros behind the last token, up to our multiple."""
    return np.pad(x, ((0, -len(x) % VOCAB_MULTIPLE), (0, 0)))


def llama_rules(body: str = "model.", head: str = "lm_head.weight") -> tuple[Rule, ...]:
    """Table for `LlamaForCausalLM` and `Qwen2ForCausalLM` of transformers.

    Args:
      body: what stands before the names of all but the head.
      head: the head's name.
    """
    layer = body + "layers.{layer}."
    return (
        Rule(r"embed\.embedding", body + "embed_tokens.weight", pad_vocab),
        Rule(r"layers\.norm1\.scale", layer + "input_layernorm.weight", same),
        Rule(r"layers\.norm2\.scale", layer + "post_attention_layernorm.weight", same),
        Rule(
            r"layers\.attention\.([qkvo])_proj\.kernel",
            layer + r"self_attn.\1_proj.weight",
            linear,
        ),
        Rule(r"layers\.attention\.([qkv])_proj\.bias", layer + r"self_attn.\1_proj.bias", same),
        Rule(r"layers\.(gate|up|down)_proj\.kernel", layer + r"mlp.\1_proj.weight", linear),
        Rule(r"norm\.scale", body + "norm.weight", same),
        Rule(r"head\.kernel", head, lambda x: linear(pad_vocab(x))),
    )


def fused(config: DecoderConfig, part: str) -> Transform:
    """Queries, keys or values out of InternLM2's `wqkv`, [in, out].

    Its rows are grouped by key head: that head's queries, then its key, then its value.
    """
    groups, head_dim = config.num_kv_heads, config.embed_dim // config.num_heads
    queries = config.num_heads // groups
    place = {"q": slice(0, queries), "k": slice(queries, queries + 1), "v": slice(-1, None)}[part]

    def transform(x: np.ndarray) -> np.ndarray:
        rows = x.reshape(groups, queries + 2, head_dim, x.shape[1])
        return rows[:, place].reshape(-1, x.shape[1]).T

    return transform


def internlm2_rules(
    config: DecoderConfig, body: str = "model.", head: str = "output.weight"
) -> tuple[Rule, ...]:
    """Table for `InternLM2ForCausalLM` as its own repository names it; see `llama_rules`."""
    layer = body + "layers.{layer}."
    attention = [
        Rule(
            rf"layers\.attention\.{part}_proj\.kernel",
            layer + "attention.wqkv.weight",
            fused(config, part),
        )
        for part in "qkv"
    ]
    return (
        Rule(r"embed\.embedding", body + "tok_embeddings.weight", pad_vocab),
        Rule(r"layers\.norm1\.scale", layer + "attention_norm.weight", same),
        Rule(r"layers\.norm2\.scale", layer + "ffn_norm.weight", same),
        *attention,
        Rule(r"layers\.attention\.o_proj\.kernel", layer + "attention.wo.weight", linear),
        Rule(r"layers\.gate_proj\.kernel", layer + "feed_forward.w1.weight", linear),
        Rule(r"layers\.down_proj\.kernel", layer + "feed_forward.w2.weight", linear),
        Rule(r"layers\.up_proj\.kernel", layer + "feed_forward.w3.weight", linear),
        Rule(r"norm\.scale", body + "norm.weight", same),
        Rule(r"head\.kernel", head, lambda x: linear(pad_vocab(x))),
    )


IGNORED = {r".*rotary_emb\.inv_freq": "computed from rope_theta"}


def shapes(sizes: DecoderConfig) -> Flat:
    """`{path: shape}` of the decoder; allocates nothing."""
    model = nnx.eval_shape(lambda: InternLM2(sizes, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    return param_paths.flatten(nnx.split(model)[1])


def conversion_spec(source: Source, num_layers: int | None = None) -> ConversionSpec:
    """What sort of decoder a checkpoint holds; see `language_model` for those that convert.

    Args:
      source: the checkpoint.
      num_layers: only so many layers from the first on; None for all.

    Raises:
      CheckpointError: no such decoder in it, or one that computes something else.
    """
    refuse_adapters(source)
    place = find(source)
    sizes, kind = _sizes(source, place)
    total = sizes.num_layers
    if num_layers is not None:
        if not 0 < num_layers <= total:
            raise CheckpointError(f"--num_layers {num_layers}: {source.name} has {total} layers")
        sizes = dataclasses.replace(sizes, num_layers=num_layers)
    body, head = re.escape(place.body), re.escape(place.head)
    ignored = {rf"{body}.*rotary_emb\.inv_freq": "computed from rope_theta"}
    ignored[body + INSIDE] = OTHER_COMPONENTS
    if sizes.num_layers < total:
        above = "|".join(map(str, range(sizes.num_layers, total)))
        ignored[rf"{body}layers\.({above})\..*"] = "a layer above --num_layers"
    if sizes.tie_head:
        ignored[head] = "the embedding once more"
    if place.body == f"{place.prefix}model.":
        if place.prefix:
            ignored[rf"(?!{re.escape(place.prefix)}|{head}).*"] = OTHER_COMPONENTS
    elif place.body:
        ignored[rf"(?!{body}|{head}).*"] = OTHER_COMPONENTS
    if place.naming == "InternLM2":
        rules = internlm2_rules(sizes, place.body, place.head)
    else:
        rules = llama_rules(place.body, place.head)
    return ConversionSpec(
        family="internlm2",
        variant=f"{kind} decoder as {place.naming} names it ({place.body or 'no prefix'}), "
        f"{sizes.embed_dim} wide, {sizes.num_layers} of {total} layers, vocabulary of "
        f"{sizes.vocab_size} tokens",
        sizes=sizes,
        shapes=shapes(sizes),
        rules=rules,
        ignored=ignored,
    )


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a checkpoint its only decoder is.

    Attributes:
      naming: "InternLM2" or "Llama".
      prefix: what stands before the decoder as a whole.
      body: what stands before all names but the head's.
      head: the head's name, whether it is there or not.
    """

    naming: str
    prefix: str
    body: str
    head: str


def find(source: Source) -> Place:
    """Where the decoder is. Raises CheckpointError unless there is one.

    Beside `PREFIX.model.layers`, as checkpoints are saved, these are a module's own names:
    `layers` of a body alone, and `model.language_model.layers` of transformers' models for images
    and text, with the head apart from it.
    """
    places = [
        (naming, key.removesuffix(ending))
        for naming, (ending, _) in NAMES.items()
        for key in source.keys
        if key == ending or key.endswith("." + ending)
    ]
    if len(places) != 1:
        names = " or ".join(f"model.{ending}" for ending, _ in NAMES.values())
        raise CheckpointError(
            f"{source.name} holds no InternLM2 and no Llama: expected one embedding named {names}"
            f"{_other_names(source)}; `python -m weights_convert info` shows what is inside"
        )
    naming, body = places[0]
    ending = NAMES[naming][1]
    steps = body.split(".")[:-1]
    above = [".".join([*steps[:i], ""]) if i else "" for i in range(len(steps), -1, -1)]
    found = [place + ending for place in above if place + ending in source]
    for inner in ("model.language_model.", "model."):
        if body == inner or body.endswith("." + inner):
            prefix = body.removesuffix(inner)
            break
    else:
        prefix = body
    return Place(naming, prefix, body, found[0] if found else prefix + ending)


def _other_names(source: Source) -> str:
    """What the names of the tensors are instead, where that is known."""
    if any(re.search(r"layers\.\d+\.attention\.w[qkv]\.weight", key) for key in source.keys):
        return " (these are Meta's own names; take the repository that ends in -hf)"
    if any(re.search(r"(^|\.)transformer\.h\.\d+\.", key) for key in source.keys):
        return " (these are a GPT's)"
    return ""


def _sizes(source: Source, place: Place) -> tuple[DecoderConfig, str]:
    """Sizes, and the architecture."""
    layer, embedding = f"{place.body}layers.0.", place.body + NAMES[place.naming][0]
    vocab_size, width = source.shape(embedding, 2)
    if place.naming == "InternLM2":
        rows = source.shape(layer + "attention.wqkv.weight", 2)[0]
        mlp_dim = source.shape(layer + "feed_forward.w1.weight", 2)[0]
    else:
        rows = width + 2 * source.shape(layer + "self_attn.k_proj.weight", 2)[0]
        mlp_dim = source.shape(layer + "mlp.gate_proj.weight", 2)[0]
    num_layers = count_layers(source, re.escape(place.body) + r"layers\.(\d+)\..*")
    told = read(source, width, num_layers, mlp_dim, vocab_size)
    if (told.kind == "internlm2") != (place.naming == "InternLM2"):
        raise CheckpointError(
            f"{source.name}: config.json says {told.kind}, the tensors have the names of "
            f"{place.naming}: is it the right config.json?"
        )
    head_dim = width // told.num_heads
    kv_heads, rest = divmod(rows - width, 2 * head_dim)
    if rest or told.num_kv_heads not in (None, kv_heads) or told.num_heads % max(kv_heads, 1):
        raise CheckpointError(
            f"{source.name}: {told.num_heads} heads of {head_dim} and num_key_value_heads "
            f"{told.num_kv_heads}, by config.json and the defaults of {told.kind}, do not fit the "
            f"keys and values of the tensors, {(rows - width) // 2} wide"
        )
    sizes = DecoderConfig(
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=num_layers,
        num_heads=told.num_heads,
        num_kv_heads=kv_heads,
        mlp_dim=mlp_dim,
        rope_theta=told.rope_theta,
        rope_factor=told.rope_factor,
        max_positions=told.max_positions,
        rms_norm_eps=told.rms_norm_eps,
        tie_head=_is_tied(source, embedding, place.head, told.tied),
        attention_bias=told.biased,
    )
    return sizes, told.kind


def _is_tied(source: Source, embedding: str, head: str, said: bool) -> bool:
    """Whether the LM head is the embedding. What config.json says is compared with the tensors."""
    if head not in source:
        if said:
            return True
        raise CheckpointError(
            f"{source.name} has no LM head ({head}), and its config.json does not say "
            "tie_word_embeddings true, so it is not the embedding: the head was lost. Save the "
            "whole model (...ForCausalLM) or take another copy"
        )
    if not said:
        return False
    same_shape = source.shape(head) == source.shape(embedding)
    if same_shape and np.array_equal(source.read(head), source.read(embedding)):
        return True
    log.warning(
        "%s: config.json says tie_word_embeddings true, and %s is another tensor than %s: the head "
        "is kept",
        source.name,
        head,
        embedding,
    )
    return False
