"""`standard` that answers and completes nothing: no generation head, no target codes, no VQ
decoder.

The codes of the fused image stay in the sequence, where the text can read them;
`ablation_single_encoder` leaves them out too. It fits where `standard` does: a sample takes 12.0
TFLOP of a step, not 12.5. The answers are scored, nothing is completed.

    python -m htfa_jax.train --config configs/understanding_only.py \\
        --config.data.train=train.jsonl ...
"""

from htfa_jax.config import Config, override


def get_config() -> Config:
    """The differences from `standard`."""
    return override(Config(), {"loss.text_weight": 1.0, "loss.code_weight": 0.0})
