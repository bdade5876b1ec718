"""SigLIP vision tower as transformers names it (`SiglipVisionModel`)."""

from __future__ import annotations

import numpy as np

from weights_convert.convert import Rule, linear, same


def patch_kernel(x: np.ndarray) -> np.ndarray:
    """[D, 3, p, p] -> [p * p * 3, D]: our patches are flattened (row, column, channel)."""
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


_LAYER = r"encoder.layers.{layer}."

RULES = (
    Rule(r"patch_embed\.kernel", "embeddings.patch_embedding.weight", patch_kernel),
    Rule(r"patch_embed\.bias", "embeddings.patch_embedding.bias", same),
    Rule(r"position_embed", "embeddings.position_embedding.weight", same),
    Rule(r"layers\.norm([12])\.scale", _LAYER + r"layer_norm\1.weight", same),
    Rule(r"layers\.norm([12])\.bias", _LAYER + r"layer_norm\1.bias", same),
    Rule(r"layers\.attention\.([qkv])_proj\.kernel", _LAYER + r"self_attn.\1_proj.weight", linear),
    Rule(r"layers\.attention\.([qkv])_proj\.bias", _LAYER + r"self_attn.\1_proj.bias", same),
    Rule(r"layers\.attention\.o_proj\.kernel", _LAYER + "self_attn.out_proj.weight", linear),
    Rule(r"layers\.attention\.o_proj\.bias", _LAYER + "self_attn.out_proj.bias", same),
    Rule(r"layers\.fc([12])\.kernel", _LAYER + r"mlp.fc\1.weight", linear),
    Rule(r"layers\.fc([12])\.bias", _LAYER + r"mlp.fc\1.bias", same),
    Rule(r"post_norm\.scale", "post_layernorm.weight", same),
    Rule(r"post_norm\.bias", "post_layernorm.bias", same),
)

IGNORED = {
    r"head\..*": "the pooling head makes one vector of a picture; HTFA reads the patches",
    r"embeddings\.position_ids": "numbers 0, 1, 2, ...",
}
