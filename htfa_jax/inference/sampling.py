"""How the next token is chosen: one pure function of the logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from htfa_jax.inference.options import Decoding


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


def make_sampling(decoding: Decoding, rows: int) -> Sampling:
    """The options as arrays, each row with the same seed."""
    return Sampling(
        temperature=np.float32(decoding.temperature),
        top_k=np.int32(decoding.top_k),
        top_p=np.float32(decoding.top_p),
        penalty=np.float32(decoding.repetition_penalty),
        seed_B=np.full(rows, decoding.seed, np.uint32),
        sample=decoding.temperature > 0,
    )


def sample_tokens(
    logits_BV: jax.Array, seen_BV: jax.Array, sampling: Sampling, step: jax.Array
) -> jax.Array:
    """The next token of each row, int32 [B].

    A row's choice is a function of its logits, its seed and the step: never of the other rows.

    Args:
      logits_BV: float32.
      seen_BV: tokens that the conversation holds already.
      sampling: the options.
      step: number of the token in its answer.
    """
    logits_BV = penalize(logits_BV, seen_BV, sampling.penalty)
    if not sampling.sample:
        return logits_BV.argmax(axis=-1).astype(jnp.int32)
    logits_BV = truncate(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p)

    def draw(seed: jax.Array, logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), logits_V)

    return jax.vmap(draw)(sampling.seed_B, logits_BV).astype(jnp.int32)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits of seen tokens divided by the penalty, or multiplied where they are negative.

    Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation"
    (2019), with the sign rule that transformers uses.
    """
    changed_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, changed_BV, logits_BV)


def truncate(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits of minus infinity outside the `top_k` best and outside the `top_p` nucleus of these.

    The nucleus is the shortest list of most probable tokens whose probabilities add up to `top_p`
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
