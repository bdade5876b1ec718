"""Any configuration at test size: `--config standard:tiny`, `--config configs/standard.py:tiny`.

Only sizes, amounts and the pretrained weights, which are made for other sizes, are replaced. What
is switched on or off, what learns, and how, stay as they are.
"""

from __future__ import annotations

from htfa_jax.config import Config
from htfa_jax.config_io import override

# All different where they may be, and no head as wide as another model's.
SIZES = {
    "image_size": 48,
    "siglip.patch_size": 12,
    "siglip.embed_dim": 24,
    "siglip.num_layers": 2,
    "siglip.num_heads": 3,
    "siglip.mlp_dim": 36,
    "vq.stem": 8,
    "vq.base_channels": 12,
    "vq.channel_multipliers": (1,),
    "vq.num_res_blocks": 1,
    "vq.z_channels": 20,
    "vq.codebook_size": 22,
    "vq.codebook_dim": 6,
    "decoder.vocab_size": 390,
    "decoder.embed_dim": 40,
    "decoder.num_layers": 2,
    "decoder.num_heads": 4,
    "decoder.num_kv_heads": 2,
    "decoder.mlp_dim": 56,
    "level1.head_channels": 5,
    "level2.num_heads": 4,
    "level3.adapter_mlp_dim": 28,
    "loss.text_chunk": 32,
    "data.max_text_length": 70,
    "data.text_buckets": (70,),
    "data.tokenizer_vocab_size": 390,
    "held_objects.num_train": 8,
    "held_objects.num_validation": 3,
    "held_objects.num_test": 3,
    "train.max_steps": 4,
    "eval.batch_size": 3,
    "eval.max_new_tokens": 5,
    "vq_train.num_steps": 3,
    "vq_train.batch_size": 4,
}


def tiny(config: Config) -> Config:
    """The configuration at test size; its parts start at random and keep their freeze flags."""
    fewer = {
        "train.batch_size": min(config.train.batch_size, 2),
        "train.accumulation_steps": min(config.train.accumulation_steps, 2),
    }
    none = dict.fromkeys(
        f"pretrained.{part}" for part in ("siglip", "vq", "decoder", "htfa", "run")
    )
    return override(config, SIZES | fewer | none | {"pretrained.random_parts": "as_configured"})
