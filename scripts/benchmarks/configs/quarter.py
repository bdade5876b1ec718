"""`standard` at a quarter of its widths and half of its image size: seconds a step on a CPU.

python scripts/benchmark.py --config scripts/benchmarks/configs/quarter.py --against torch
"""

from htfa_jax.config import Config, override


def get_config() -> Config:
    """The differences from `standard`."""
    return override(
        Config(),
        {
            "image_size": 224,
            "siglip.embed_dim": 288,
            "siglip.num_heads": 4,
            "siglip.mlp_dim": 1076,
            "vq.base_channels": 32,
            "vq.z_channels": 64,
            "vq.codebook_size": 2048,
            "vq.codebook_dim": 64,
            "decoder.vocab_size": 23136,
            "decoder.embed_dim": 512,
            "decoder.num_heads": 4,
            "decoder.num_kv_heads": 2,
            "decoder.mlp_dim": 2048,
            "train.accumulation_steps": 1,
            "train.dtype": "float32",
            "train.frozen_dtype": "float32",
        },
    )
