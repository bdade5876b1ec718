"""More of everything, for a host of several large devices: 8 decoder layers, 10 epochs.

Weights, moments, gradients and copies are 16.7 GiB (`python -m htfa_jax.configs`), sharded over all
devices as in `standard`; the activations of 4 samples on each come on top. A pretrained decoder
brings its own number of layers and heads: convert it with `--num_layers 8`. An update of 4 devices
sees 128 samples; of `standard` on one, 8.

    python -m htfa_jax.train --config configs/large_scale.py \\
        --config.data.train=train.jsonl --config.pretrained.decoder=weights/internlm2_8 ...
"""

from htfa_jax.config import Config, override


def get_config() -> Config:
    """The differences from `standard`."""
    return override(
        Config(),
        {
            "decoder.num_layers": 8,
            "decoder.num_heads": 32,
            "train.batch_size": 4,
            "train.accumulation_steps": 8,
            "train.epochs": 10,
            "train.save_every": 500,
        },
    )
