"""A small model on 112-pixel images, in float32: where a step's overhead counts.

python scripts/benchmark.py --config scripts/benchmarks/configs/small.py --against torch
"""

from htfa_jax.config import Config, load_config, override


def get_config() -> Config:
    """The differences from `debug`."""
    return override(
        load_config("debug"),
        {
            **{f"pretrained.{part}": None for part in ("siglip", "vq", "decoder")},
            "vq.stem": 8,
            "vq.base_channels": 64,
            "vq.channel_multipliers": (1, 2),
            "vq.attention": "middle",
            "vq.codebook_size": 256,
            "siglip.embed_dim": 192,
            "siglip.num_layers": 4,
            "siglip.num_heads": 4,
            "siglip.mlp_dim": 768,
            "decoder.embed_dim": 256,
            "decoder.num_layers": 2,
            "decoder.mlp_dim": 768,
            "train.batch_size": 8,
            "train.remat": "none",
        },
    )
