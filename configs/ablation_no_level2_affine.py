"""`standard` without Level 2's affine: the attention's keys stay where the reconstruction has them.

It costs what `standard` costs: the affine itself is next to nothing.

    python -m htfa_jax.train --config configs/ablation_no_level2_affine.py \\
        --config.data.train=train.jsonl ...
"""

from htfa_jax.config import Config, override


def get_config() -> Config:
    """The differences from `standard`."""
    return override(Config(), {"level2.alignment": "none"})
