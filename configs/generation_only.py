"""`standard` that completes and does not answer: no text in the sequence, no embedding, no LM head.

It fits where `standard` does, with half of the weights to train (329 million) and 6.5 TFLOP of a
step for a sample, not 12.5. Completed images are scored, there are no answers.

python -m htfa_jax.train --config configs/generation_only.py \\
        --config.data.train=train.jsonl ...
"""

from htfa_jax.config import Config, override


def get_config() -> Config:
    """The differences from `standard`."""
    return override(Config(), {"loss.text_weight": 0.0, "loss.code_weight": 1.0})
