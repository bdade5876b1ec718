"""`standard` that paints and does not answer: no words in the sequence, no embedding, no text head.

python -m htfa_jax.train --config configs/generation_only.py \\
        --config.data.train=train.jsonl ...
"""

from htfa_jax.config import Config
from htfa_jax.config_io import override


def get_config() -> Config:
    """The differences from `standard`."""
    return override(Config(), {"loss.text_weight": 0.0, "loss.code_weight": 1.0})
