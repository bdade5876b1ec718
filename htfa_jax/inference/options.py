"""What a caller may ask of the engine: how to decode, how to complete, where to look."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from htfa_jax.config import EvalConfig
from htfa_jax.config.renamed import takes_old_names
from htfa_jax.errors import ConfigError

ExportDType = Literal["bfloat16", "float32"]

# Logits are divided by a temperature: by less than this they are no longer finite in float32.
LEAST = 1e-6

# How the engine may keep the decoder's weights.
Quantize = Literal["int8"]


def _is_temperature(value: float) -> bool:
    return math.isfinite(value) and (value == 0 or value >= LEAST)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How an answer is decoded. Raises ConfigError for values that cannot work."""

    max_new_tokens: int | None = None  # longest answer (None: the run's eval.max_new_tokens)
    temperature: float = 0.0  # 0: always the most probable token
    top_k: int = 0  # choose among so many tokens only (0: all)
    top_p: float = 1.0  # choose among the most probable tokens that together are this probable
    repetition_penalty: float = 1.0  # above 1: tokens of the conversation become less likely
    stop: tuple[str, ...] = ()  # texts that end an answer; they are not part of it
    seed: int = 0  # of the sampling

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not _is_temperature(self.temperature):
            problems.append(f"temperature={self.temperature} must be 0, or {LEAST} or above")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k} must be 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be in (0, 1]")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            problems.append(f"repetition_penalty={self.repetition_penalty} must be above 0")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            problems.append(f"stop={self.stop!r} must be a tuple of texts that are not empty")
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed={self.seed} must be in [0, 2^32)")
        if problems:
            raise ConfigError("this decoding cannot work: " + "; ".join(problems))

    def for_run(self, defaults: EvalConfig) -> Decoding:
        """The options with what the run decides where they do not."""
        if self.max_new_tokens is not None:
            return self
        return dataclasses.replace(self, max_new_tokens=defaults.max_new_tokens)


@takes_old_names
@dataclasses.dataclass(frozen=True)
class Completion:
    """How an image is completed."""

    temperature: float = 0.0  # of drawn codes (0: none is drawn, each cell gets the expected one)
    refinement_steps: int = 1  # more: the most confident codes stay, others are predicted again
    paste_back: bool = False  # replace only what the occluder mask covers
    seed: int = 0  # of the sampling

    def __post_init__(self) -> None:
        right = _is_temperature(self.temperature) and 0 <= self.seed < 2**32
        if not right or self.refinement_steps < 1:
            raise ConfigError(
                f"{self} cannot work: temperature must be 0, or {LEAST} or above, "
                "refinement_steps at least 1, seed in [0, 2^32)"
            )


# The expected code of every cell, in one step.
ONE_PASS = Completion()


@dataclasses.dataclass(frozen=True)
class View:
    """Which of the decoder's attention to look at; the mean over all of it by default."""

    layer: int | None = None  # of the decoder, counted from 0
    head: int | None = None  # of that layer, or of every layer
    rollout: bool = False  # follow the attention through all layers (Abnar and Zuidema, 2020)

    def __post_init__(self) -> None:
        if self.rollout and (self.layer is not None or self.head is not None):
            raise ConfigError(f"{self} cannot be: a rollout goes through all layers and heads")

    def __str__(self) -> str:
        if self.rollout:
            return "rollout"
        layer = "all layers" if self.layer is None else f"layer {self.layer}"
        return layer + (", all heads" if self.head is None else f", head {self.head}")
