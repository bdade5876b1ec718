"""HTFA at the size that pretrained parts have.

SigLIP so400m at 448 pixels (1024 tokens), a VQGAN tokenizer (784 codes), InternLM2-1.8B cut to
its first 4 layers; 8 samples per update. It fits 8 chips of 16 GB (v5e:2x4, less than 7.6 GiB of
each). One H200 makes 71.6 samples/s in 84.5 GB with `train.batch_size=64`,
`train.accumulation_steps=1` and `train.remat=none`.

    python -m htfa_jax.train --config configs/standard.py \\
        --config.data.train=train.jsonl --config.data.validation=val.jsonl \\
        --config.data.test=test.jsonl
"""

from htfa_jax.config import Config


def get_config() -> Config:
    """The defaults are this configuration."""
    return Config()
