"""InternLM2 and Llama decoders: the same architecture under two sets of names."""

from __future__ import annotations

import numpy as np

from htfa_jax.config import DecoderConfig
from htfa_jax.models.internlm2 import VOCAB_MULTIPLE
from weights_convert.convert import Rule, Transform, linear, same


def pad_vocab(x: np.ndarray) -> np.ndarray:
    """Rows of zeros behind the last word, up to our multiple."""
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
