"""HTFA with the 32 layers of InternVL2-8B's language model, on 8 H100 (24.1 GiB of each) or more.

Compiled for a v5p:2x2x4 it needs 13.9 GiB of each.

    python -m htfa_jax.train --config configs/internvl2_8b.py \\
        --config.data.train=train.jsonl --config.pretrained.decoder=weights/internvl2_8b ...
"""

from htfa_jax.config import Config, override


def get_config() -> Config:
    """The differences from `standard`; sizes of the decoder as in the published checkpoint."""
    return override(
        Config(),
        {
            "decoder.vocab_size": 92553,
            "decoder.embed_dim": 4096,
            "decoder.num_layers": 32,
            "decoder.num_heads": 32,
            "decoder.num_kv_heads": 8,
            "decoder.mlp_dim": 14336,
            "sharding.mode": "fsdp",
            "train.batch_size": 1,
            "train.accumulation_steps": 8,
        },
    )
