"""Decoding: the pictures once, then answers word by word from a key-value cache."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from htfa_jax.batch import Batch
from htfa_jax.models.htfa import HTFA, Fusion
from htfa_jax.models.internlm2 import KVCache, init_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Prefix:
    """A batch's pictures, as far as the decoder has read them.

    Attributes:
      fusion: Levels 1 and 2.
      cache: keys and values of the picture tokens, with room for the text; None without text.
      code_logits_BMC: logits of the completed picture's codes; None without codes.
    """

    fusion: Fusion
    cache: KVCache | None
    code_logits_BMC: jax.Array | None


def read_pictures(
    model: HTFA, batch: Batch, text_length: int, with_weights: bool = False
) -> Prefix:
    """Encodes the pictures and runs the decoder over them.

    Args:
      model: the merged model.
      batch: its text is not looked at.
      text_length: positions to leave room for: prompt and answer.
      with_weights: Level 2's attention weights are wanted.
    """
    config = model.config
    prefix_BTD, fusion = model.encode(batch, with_weights=with_weights)
    B, length, _ = prefix_BTD.shape
    cache = None
    if model.has_text:
        cache = init_cache(config.decoder, B, length + text_length, prefix_BTD.dtype)
    hidden_BTD, cache = model.decode(prefix_BTD, 0, cache)
    code_logits_BMC = None
    if model.has_codes:
        code_logits_BMC = model.level3.code_logits(hidden_BTD[:, -(config.code_grid**2) :])
    return Prefix(fusion, cache, code_logits_BMC)


def greedy(
    model: HTFA,
    cache: KVCache,
    prompt_BT: jax.Array,
    prompt_length_B: jax.Array,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
) -> jax.Array:
    """The most probable word, again and again, until every row has stopped.

    Args:
      model: the merged model.
      cache: of `read_pictures`, with room for T + max_new_tokens.
      prompt_BT: tokens, padded behind.
      prompt_length_B: of each prompt, at least 1.
      stop_ids: tokens that end an answer.
      max_new_tokens: longest answer.

    Returns:
      Tokens [B, max_new_tokens]; behind a row's stop token they repeat it.
    """
    B, T = prompt_BT.shape
    start_B = jnp.full(B, cache.k.shape[2] - T - max_new_tokens)
    stops = jnp.array(stop_ids, jnp.int32)

    def next_token(hidden_BD: jax.Array) -> jax.Array:
        return model.decoder.logits(hidden_BD[:, None])[:, 0].argmax(axis=-1).astype(jnp.int32)

    hidden_BTD, cache = model.decode(model.decoder.embed(prompt_BT), start_B, cache)
    token_B = next_token(hidden_BTD[jnp.arange(B), prompt_length_B - 1])

    def is_stop(token_B: jax.Array) -> jax.Array:
        return (token_B[:, None] == stops[None]).any(axis=1)

    def running(carry) -> jax.Array:
        i, token_B, _, _ = carry
        return (i < max_new_tokens) & ~is_stop(token_B).all()

    def step(carry):
        i, token_B, out_BT, cache = carry
        hidden_B1D, cache = model.decode(
            model.decoder.embed(token_B[:, None]), start_B + prompt_length_B + i - 1, cache
        )
        token_B = jnp.where(is_stop(token_B), token_B, next_token(hidden_B1D[:, 0]))
        return i + 1, token_B, out_BT.at[:, i].set(token_B), cache

    # Rows that stop early stay at their stop token, which also fills what the loop never wrote.
    out_BT = jnp.broadcast_to(token_B[:, None], (B, max_new_tokens))
    i, token_B, out_BT, _ = jax.lax.while_loop(running, step, (1, token_B, out_BT, cache))
    return jnp.where(jnp.arange(max_new_tokens)[None] < i, out_BT, token_B[:, None])


def pad_prompts(
    prompts: Sequence[np.ndarray], pad_id: int, multiple: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as one array [B, T], T a multiple, and their lengths [B]."""
    longest = max(map(len, prompts))
    padded = np.full((len(prompts), -(-longest // multiple) * multiple), pad_id, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, np.array([len(p) for p in prompts], np.int32)


def paint(model: HTFA, code_logits_BMC: jax.Array) -> jax.Array:
    """The completed picture [B, H, W, 3] of the most probable codes, normalised."""
    return model.vq.decode(code_logits_BMC.argmax(axis=-1))
