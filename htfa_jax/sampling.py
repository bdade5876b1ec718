"""How the next word is chosen: options, and one pure function of the logits."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from htfa_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How an answer is decoded. Raises ConfigError for values that cannot work."""

    max_new_tokens: int | None = None  # longest answer (None: the run's eval.max_new_tokens)
    temperature: float = 0.0  # 0: always the most probable word
    top_k: int = 0  # choose among so many words only (0: all)
    top_p: float = 1.0  # choose among the likeliest words that together are this probable
    repetition_penalty: float = 1.0  # above 1: words of the conversation become less likely
    stop: tuple[str, ...] = ()  # texts that end an answer; they are not part of it
    seed: int = 0  # of the sampling

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature={self.temperature} must be 0 or above")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k} must be 0 (all words) or above")
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sampling:
    """The numbers of a `Decoding` that the compiled step reads, so that none compiles anew.

    Attributes:
      temperature, top_k, top_p, penalty: scalars.
      seed_B: of each row.
      sample: whether the temperature is above 0; the only one that another program is made for.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    penalty: jax.Array
    seed_B: jax.Array
    sample: bool = dataclasses.field(metadata={"static": True})


def sampling_of(decoding: Decoding, rows: int) -> Sampling:
    """The options as arrays, each row with the same seed."""
    return Sampling(
        temperature=np.float32(decoding.temperature),
        top_k=np.int32(decoding.top_k),
        top_p=np.float32(decoding.top_p),
        penalty=np.float32(decoding.repetition_penalty),
        seed_B=np.full(rows, decoding.seed, np.uint32),
        sample=decoding.temperature > 0,
    )


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array, sampling: Sampling, step: jax.Array
) -> jax.Array:
    """The next word of each row, int32 [B].

    A row's choice is a function of its logits, its seed and the step: never of the other rows.

    Args:
      logits_BV: float32.
      seen_BV: words that the conversation holds already.
      sampling: the options.
      step: number of the word in its answer.
    """
    logits_BV = penalize(logits_BV, seen_BV, sampling.penalty)
    if not sampling.sample:
        return logits_BV.argmax(axis=-1).astype(jnp.int32)
    logits_BV = truncate(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p)

    def draw(seed: jax.Array, logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), logits_V)

    return jax.vmap(draw)(sampling.seed_B, logits_BV).astype(jnp.int32)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits of seen words divided by the penalty, or multiplied where they are negative.

    Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation"
    (2019), with the sign rule that transformers uses.
    """
    changed_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, changed_BV, logits_BV)


def truncate(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits of minus infinity outside the `top_k` best and outside the `top_p` nucleus of these.

    The nucleus is the shortest list of likeliest words whose probabilities add up to `top_p`
    (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020).
    """
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    rank_V = jnp.arange(logits_BV.shape[-1])
    sorted_BV = jnp.where((rank_V < top_k)[None] | (top_k == 0), sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # At 1 rounding must not cut anything off.
    kept_BV = ((before_BV < top_p) | (top_p >= 1)) & (sorted_BV > -jnp.inf)
    lowest_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
