"""Lists the packaged configurations and what each is made of.

python -m htfa_jax.configs
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed

import jax

from htfa_jax import flops
from htfa_jax.commands import command
from htfa_jax.config_io import load_config, override, preset_names
from htfa_jax.plan import abstract_step
from htfa_jax.report import columns
from htfa_jax.train_step import copy_dtype

NOTES = """\
With pretrained SigLIP, VQ and decoder, which are frozen where the configuration freezes them.
tokens: of a sample with the longest text. TFLOP: of a sample in a training step, without what
rematerialisation computes again. memory: weights, optimizer state, gradients and copies, if one
device holds them all; exact, but activations come on top. scripts/plan.py compiles the step for the
devices you name and says what it needs there."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a configuration is made of.

    Attributes:
      trainable, frozen: parameters.
      tokens: of a sample with the longest text.
      operations: floating-point operations of a sample in a training step.
      memory: bytes of all weights, moments, gradients and copies; activations not counted.
    """

    trainable: int
    frozen: int
    tokens: int
    operations: float
    memory: int


def sizes(name: str) -> Sizes:
    """What a preset is made of, with pretrained parts; nothing is allocated or compiled."""
    config = override(load_config(name), {"pretrained.random_parts": "as_configured"})
    abstract = abstract_step(config, jax.devices()[:1])
    trainable, length = _number(abstract.state["params"]), config.data.text_buckets[-1]
    width = copy_dtype(config).itemsize
    # As `plan` counts them: gradients of several micro-steps add up in float32.
    copy = width if width < 4 else 0
    gradient = 4 if config.train.accumulation_steps > 1 else width
    return Sizes(
        trainable=trainable,
        frozen=_number(abstract.frozen),
        tokens=flops.sequence_length(config, length),
        operations=sum(flops.training_step(config, length).values()),
        memory=sum(abstract.device_bytes().values()) + (copy + gradient) * trainable,
    )


def _number(arrays: Mapping[str, Any]) -> int:
    return sum(math.prod(x.shape) for x in arrays.values())


def table(names: Sequence[str]) -> str:
    """Presets by row, as text."""
    lines = [["preset", "trainable", "frozen", "tokens", "TFLOP", "memory"]]
    for name in names:
        found = sizes(name)
        lines.append(
            [
                name,
                f"{found.trainable / 1e6:,.1f} M",
                f"{found.frozen / 1e6:,.1f} M",
                f"{found.tokens:,}",
                f"{found.operations / 1e12:,.3g}",
                f"{found.memory / 2**30:,.1f} GiB",
            ]
        )
    return columns(lines)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m htfa_jax.configs", description=__doc__)
    parser.parse_args(argv)
    print(f"{table(preset_names())}\n\n{NOTES}")


if __name__ == "__main__":
    main()
