"""`standard` on one device of 16 GB: the decoder frozen, one sample at a time.

Only the levels, the adapters and the generation head learn, so nearly all memory is weights that
are read (bfloat16) and the activations of one sample, recomputed block by block. Compiled for
one v5e chip of 16 GB it needs 4.3 GiB. The decoder stays as it was pretrained.

    python -m htfa_jax.train --config configs/memory_efficient.py \\
        --config.data.train=train.jsonl --config.pretrained.decoder=weights/internlm2 ...
"""

from htfa_jax.config import Config, override


def get_config() -> Config:
    """The differences from `standard`."""
    return override(
        Config(),
        {
            "freeze.decoder": True,
            "train.batch_size": 1,
            "train.accumulation_steps": 8,
            "train.remat": "full",
        },
    )
