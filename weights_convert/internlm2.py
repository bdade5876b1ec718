"""InternLM2 and Llama decoders: the same architecture under two sets of names."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import DecoderConfig
from htfa_jax.errors import CheckpointError
from htfa_jax.models.internlm2 import VOCAB_MULTIPLE, InternLM2
from weights_convert.convert import ConversionSpec, Rule, Transform, linear, same
from weights_convert.siglip import OTHER_COMPONENTS, count_layers
from weights_convert.source import Source


def pad_vocab(x: np.ndarray) -> np.ndarray:
    """Rows of zeros behind the last token, up to our multiple."""
    return np.pad(x, ((0, -len(x) % VOCAB_MULTIPLE), (0, 0)))


def llama_rules() -> tuple[Rule, ...]:
    """Table for `LlamaForCausalLM` of transformers."""
    layer = "model.layers.{layer}."
    return (
        Rule(r"embed\.embedding", "model.embed_tokens.weight", pad_vocab),
        Rule(r"layers\.norm1\.scale", layer + "input_layernorm.weight", same),
        Rule(r"layers\.norm2\.scale", layer + "post_attention_layernorm.weight", same),
        Rule(
            r"layers\.attention\.([qkvo])_proj\.kernel",
            layer + r"self_attn.\1_proj.weight",
            linear,
        ),
        Rule(r"layers\.(gate|up|down)_proj\.kernel", layer + r"mlp.\1_proj.weight", linear),
        Rule(r"norm\.scale", "model.norm.weight", same),
        Rule(r"head\.kernel", "lm_head.weight", lambda x: linear(pad_vocab(x))),
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


def internlm2_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Table for `InternLM2ForCausalLM` as its own repository names it."""
    layer = "model.layers.{layer}."
    attention = [
        Rule(
            rf"layers\.attention\.{part}_proj\.kernel",
            layer + "attention.wqkv.weight",
            fused(config, part),
        )
        for part in "qkv"
    ]
    return (
        Rule(r"embed\.embedding", "model.tok_embeddings.weight", pad_vocab),
        Rule(r"layers\.norm1\.scale", layer + "attention_norm.weight", same),
        Rule(r"layers\.norm2\.scale", layer + "ffn_norm.weight", same),
        *attention,
        Rule(r"layers\.attention\.o_proj\.kernel", layer + "attention.wo.weight", linear),
        Rule(r"layers\.gate_proj\.kernel", layer + "feed_forward.w1.weight", linear),
        Rule(r"layers\.down_proj\.kernel", layer + "feed_forward.w2.weight", linear),
        Rule(r"layers\.up_proj\.kernel", layer + "feed_forward.w3.weight", linear),
        Rule(r"norm\.scale", "model.norm.weight", same),
        Rule(r"head\.kernel", "output.weight", lambda x: linear(pad_vocab(x))),
    )


IGNORED = {r".*rotary_emb\.inv_freq": "computed from rope_theta"}

# Head size of every published InternLM2, for checkpoints that do not say.
HEAD_DIM = 128


def shapes(sizes: DecoderConfig) -> Flat:
    """`{path: shape}` of the decoder; allocates nothing."""
    model = nnx.eval_shape(lambda: InternLM2(sizes, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    return param_paths.flatten(nnx.split(model)[1])


def conversion_spec(source: Source, num_layers: int | None = None) -> ConversionSpec:
    """What sort of InternLM2 or Llama decoder a checkpoint holds.

    Args:
      source: the checkpoint.
      num_layers: only so many layers from the first on; None for all.

    Raises:
      CheckpointError: no such decoder in it, or one that computes something else.
    """
    endings = {"InternLM2": "model.tok_embeddings.weight", "Llama": "model.embed_tokens.weight"}
    places = [
        (naming, key.removesuffix(ending), key)
        for naming, ending in endings.items()
        for key in source.keys
        if key == ending or key.endswith("." + ending)
    ]
    if len(places) != 1:
        raise CheckpointError(
            f"{source.name} holds no InternLM2 and no Llama: expected one embedding named "
            f"{' or '.join(endings.values())}; `python -m weights_convert info` shows what is "
            "inside"
        )
    naming, prefix, embedding = places[0]
    sizes, tied = _sizes(source, naming, prefix, embedding)
    total = sizes.num_layers
    if num_layers is not None:
        if not 0 < num_layers <= total:
            raise CheckpointError(f"--num_layers {num_layers}: {source.name} has {total} layers")
        sizes = DecoderConfig(**{**sizes.__dict__, "num_layers": num_layers})
    inside = re.escape(prefix)
    ignored = {rf"{inside}.*rotary_emb\.inv_freq": "computed from rope_theta"}
    if prefix:
        ignored[rf"(?!{inside}).*"] = OTHER_COMPONENTS
    if sizes.num_layers < total:
        above = "|".join(map(str, range(sizes.num_layers, total)))
        ignored[rf"{inside}model\.layers\.({above})\..*"] = "a layer above --num_layers"
    if tied:
        ignored[rf"{inside}(lm_head|output)\.weight"] = "the embedding once more"
    return ConversionSpec(
        family="internlm2",
        variant=f"decoder as {naming} names it ({prefix or 'no prefix'}), {sizes.embed_dim} wide, "
        f"{sizes.num_layers} of {total} layers, vocabulary of {sizes.vocab_size} tokens",
        sizes=sizes,
        shapes=shapes(sizes),
        rules=internlm2_rules(sizes) if naming == "InternLM2" else llama_rules(),
        prefix=prefix,
        ignored=ignored,
    )


def _sizes(source: Source, naming: str, prefix: str, embedding: str) -> tuple[DecoderConfig, bool]:
    """Sizes, and whether the LM head is the embedding."""
    config = source.section("llm_config", "text_config", "language_config")
    layer = prefix + "model.layers.0."
    vocab_size, width = source.shape(embedding, 2)
    if naming == "InternLM2":
        rows = source.shape(layer + "attention.wqkv.weight", 2)[0]
        mlp_dim = source.shape(layer + "feed_forward.w1.weight", 2)[0]
        head = prefix + "output.weight"
    else:
        rows = width + 2 * source.shape(layer + "self_attn.k_proj.weight", 2)[0]
        mlp_dim = source.shape(layer + "mlp.gate_proj.weight", 2)[0]
        head = prefix + "lm_head.weight"
    num_heads = config.get("num_attention_heads") or width // HEAD_DIM
    head_dim = width // num_heads
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish") or config.get("head_dim") not in (None, head_dim):
        raise CheckpointError(
            f"{source.name}: hidden_act {activation} and head_dim {config.get('head_dim')} are not "
            f"those of InternLM2 (silu, {head_dim})"
        )
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or rope.get("rope_theta")
    if theta is None:
        raise CheckpointError(
            f"{source.name}: no config.json beside the weights says rope_theta, and no tensor "
            "tells it"
        )
    factor, limit = _scaling(source, config)
    tied = bool(config.get("tie_word_embeddings")) or head not in source
    return DecoderConfig(
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=count_layers(source, re.escape(prefix) + r"model\.layers\.(\d+)\..*"),
        num_heads=num_heads,
        num_kv_heads=(rows - width) // (2 * head_dim),
        mlp_dim=mlp_dim,
        rope_theta=float(theta),
        rope_factor=factor,
        max_positions=limit,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-5)),
        tie_head=tied,
    ), tied


def _scaling(source: Source, config: dict[str, Any]) -> tuple[float, int | None]:
    """Factor of linear rope scaling, and the longest sequence.

    Dynamic scaling changes nothing up to the length that the checkpoint was trained with, and
    everything with every length beyond: it is taken up to there.
    """
    length = config.get("max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return 1.0, length
    if kind == "linear":
        return float(scaling["factor"]), length
    if kind == "dynamic":
        return 1.0, length
    raise CheckpointError(
        f"{source.name}: rope scaling of type {kind}; default, linear and dynamic can be converted"
    )
