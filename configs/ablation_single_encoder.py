"""`standard` with one encoder, SigLIP: no VQ, no generation tokens, answers only.

It fits where `standard` does: 9.6 TFLOP of a step for a sample, not 12.5. Nothing is completed.
Without codes nothing reads the fused image, so Level 1 is absent too.

    python -m htfa_jax.train --config configs/ablation_single_encoder.py \\
        --config.data.train=train.jsonl ...
"""

from htfa_jax.config import Config, override


def get_config() -> Config:
    """The differences from `standard`."""
    return override(
        Config(),
        {"level3.generation": False, "loss.text_weight": 1.0, "loss.code_weight": 0.0},
    )
