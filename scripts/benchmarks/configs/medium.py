"""A medium model on 448-pixel images, everything from random weights, for one GPU.

HeldObjects at 448 pixels, a VQ stage of its own, 5 epochs of 8,000 scenes. On an H200 with 32
cores to draw the scenes it should take about ten minutes, evaluation included (`RESULTS.md`).

python -m htfa_jax.train --config scripts/benchmarks/configs/medium.py --workdir runs/medium
"""

from htfa_jax.config import Config, load_config, override


def get_config() -> Config:
    """The differences from `debug`."""
    return override(
        load_config("debug"),
        {
            **{f"pretrained.{part}": None for part in ("siglip", "vq", "decoder")},
            "image_size": 448,
            "held_objects.num_train": 8000,
            "siglip.embed_dim": 384,
            "siglip.num_layers": 8,
            "siglip.num_heads": 6,
            "siglip.mlp_dim": 1536,
            "vq.stem": 2,
            "vq.base_channels": 64,
            "vq.channel_multipliers": (1, 2, 4, 4),
            "vq.attention": "middle",
            "vq.z_channels": 128,
            "vq.codebook_size": 2048,
            "decoder.embed_dim": 512,
            "decoder.num_layers": 6,
            "decoder.num_heads": 8,
            "decoder.num_kv_heads": 4,
            "decoder.mlp_dim": 1536,
            "level3.adapter_mlp_dim": 1024,
            "data.validation": None,
            "data.num_workers": 12,
            "eval.during_training": "no",
            "optim.learning_rate": 6e-4,
            "optim.warmup_steps": 100,
            "train.batch_size": 32,
            "train.epochs": 5,
            "train.dtype": "bfloat16",
            "vq_train.num_steps": 1000,
            "vq_train.batch_size": 32,
            "vq_train.learning_rate": 1e-3,
        },
    )
