"""Configurations side by side: parameters, tokens, operations, memory; nothing is allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from htfa_jax import flops
from htfa_jax.config_io import load_config, override
from htfa_jax.plan import abstract_step
from htfa_jax.report import columns


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
    """What a preset or a file is made of, with pretrained parts."""
    config = override(load_config(name), {"pretrained.random_parts": "as_configured"})
    abstract = abstract_step(config, jax.devices()[:1])
    length = config.data.text_buckets[-1]
    kept, beside = abstract.device_bytes(), abstract.step_bytes(config)
    return Sizes(
        trainable=_number(abstract.state["params"]),
        frozen=_number(abstract.frozen),
        tokens=flops.sequence_length(config, length),
        operations=sum(flops.training_step(config, length).values()),
        memory=sum(kept.values()) + sum(beside.values()),
    )


def _number(arrays: Mapping[str, Any]) -> int:
    return sum(math.prod(x.shape) for x in arrays.values())


def table(names: Sequence[str]) -> str:
    """Configurations by row, as text."""
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
                f"{found.memory / 2**30:,.2f} GiB",
            ]
        )
    return columns(lines)
