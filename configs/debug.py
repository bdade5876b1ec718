"""Everything small, on the embedded dataset, on a CPU.

It starts as a real run does, from pretrained parts in PyTorch's form, only small ones that this
package brings along (`scripts/tiny_parts/pretrain.py` made them): converted, frozen where
`standard` freezes, levels and decoder trained.

python -m htfa_jax.train --config configs/debug.py
"""

from htfa_jax.config import Config, override


def get_config() -> Config:
    """The differences from `standard`."""
    return override(
        Config(),
        {
            "image_size": 112,
            "siglip.patch_size": 16,
            "siglip.embed_dim": 160,
            "siglip.num_layers": 5,
            "siglip.num_heads": 5,
            "siglip.mlp_dim": 640,
            "vq.stem": 4,
            "vq.base_channels": 32,
            "vq.channel_multipliers": (1, 2, 4),
            "vq.num_res_blocks": 1,
            "vq.attention": "lowest",
            "vq.z_channels": 64,
            "vq.codebook_size": 512,
            "vq.codebook_dim": 8,
            "vq.normalize_codes": True,
            "decoder.vocab_size": 512,
            "decoder.embed_dim": 128,
            "decoder.num_layers": 2,
            "decoder.num_heads": 4,
            "decoder.num_kv_heads": 2,
            "decoder.mlp_dim": 384,
            "decoder.rope_theta": 10000.0,
            "decoder.max_positions": 32768,
            "level2.num_heads": 4,
            "level2.dropout": 0.0,
            "level3.adapter_mlp_dim": 256,
            "level3.adapter_dropout": 0.0,
            "loss.text_weight": 0.4,
            "loss.code_weight": 0.6,
            "loss.occluded_cell_weight": 5.0,
            "pretrained.siglip": "tiny",
            "pretrained.vq": "tiny",
            "pretrained.decoder": "tiny",
            "data.validation": "held_objects",
            "data.test": "held_objects",
            "data.max_text_length": 96,
            "data.text_buckets": (96,),
            "data.use_object_mask": False,
            "optim.learning_rate": 1.5e-3,
            "optim.learning_rate_factors": (),
            "optim.weight_decay": 0.5,
            "optim.warmup_steps": 100,
            "optim.min_ratio": 0.05,
            "train.batch_size": 8,
            "train.accumulation_steps": 1,
            "train.epochs": 3,
            "train.dtype": "float32",
            "train.frozen_dtype": "float32",
            "train.remat": "none",
            "eval.batch_size": 20,
            "eval.max_new_tokens": 8,
            "vq_train.num_steps": 500,
            "vq_train.learning_rate": 2e-3,
        },
    )
