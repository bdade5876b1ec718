"""`standard` with the choices of the PyTorch original for Levels 1 and 2.

One map of alpha for all pairs, the affine on features, so that Level 1 blends images that are not
registered, and values of the fused image, which SigLIP then reads too: 14.4 TFLOP of a step for a
sample, not 12.5. The reconstruction's features do not stand beside the result. A checkpoint of the
original was trained so, and a run that starts from one (`pretrained.htfa`) takes these choices by
itself. RESULTS.md compares them.

    python -m htfa_jax.train --config configs/pytorch_original.py \\
        --config.data.train=train.jsonl ...
"""

from htfa_jax.config import Config, override


def get_config() -> Config:
    """The differences from `standard`."""
    return override(
        Config(),
        {
            "level1.alpha": "map",
            "level2.alignment": "features",
            "level2.values": "fused",
            "level2.append_reconstruction": False,
        },
    )
