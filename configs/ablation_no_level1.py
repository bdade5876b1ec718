"""`standard` without Level 1: the fused image is half the original, half the reconstruction.

Alpha is the constant 0.5, without parameters, and no gradient goes through the encoders: 12.1
TFLOP of a step for a sample, not 12.5. It fits where `standard` does.

    python -m htfa_jax.train --config configs/ablation_no_level1.py \\
        --config.data.train=train.jsonl ...
"""

from htfa_jax.config import Config, override


def get_config() -> Config:
    """The differences from `standard`."""
    return override(Config(), {"level1.learnable": False})
