"""Where the decoder looks while it answers: its attention over the picture tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from htfa_jax.errors import ConfigError
from htfa_jax.inference.options import View
from htfa_jax.models.decoding import Decoder
from htfa_jax.models.kv_cache import Cache, num_slots, with_room

# Stands for the word that ends an answer.
END = "(end)"


@dataclasses.dataclass(frozen=True)
class AnswerAttention:
    """The attention behind each word of an answer, at the position where it was chosen.

    S counts the picture tokens, P + M: those of the understanding branch, then those of the
    generation branch. What is missing to a sum of 1 went to words.

    Attributes:
      words: of the answer; the one that ended it is `END`.
      weights: [layers, N, T, S].
      rollout_TS: the weights followed back through all layers, residual connections included:
        how much of each picture token has come into the word's position.
      num_patches: P.
    """

    words: tuple[str, ...]
    weights: np.ndarray
    rollout_TS: np.ndarray
    num_patches: int

    def over_pictures(self, view: View) -> np.ndarray:
        """The attention [T, S] of a view.

        Raises:
          ConfigError: if the decoder has no such layer or head.
        """
        if view.rollout:
            return self.rollout_TS
        chosen = self.weights
        for axis, (name, index) in enumerate((("layer", view.layer), ("head", view.head))):
            count = chosen.shape[axis]
            if index is not None and not 0 <= index < count:
                raise ConfigError(f"{name}={index}: the decoder has {count}, 0 to {count - 1}")
            if index is not None:
                chosen = chosen.take([index], axis)
        return chosen.mean(axis=(0, 1))


def watch_text(
    decoder: Decoder,
    cache: Cache,
    attention: jax.Array,
    text_BT: jax.Array,
    rows_BR: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Reads a finished conversation once more and looks at its attention to the pictures.

    Args:
      decoder: with text.
      cache: of the S picture tokens alone.
      attention: between these [layers, B, S, S], mean over heads.
      text_BT: words of the conversation, padded behind.
      rows_BR: which of them to look at.

    Returns:
      The weights [layers, B, N, R, S] and their rollout [B, R, S].
    """
    B, T = text_BT.shape
    S = num_slots(cache)
    positions_BT = jnp.broadcast_to(S + jnp.arange(T)[None], (B, T))

    def keep(weights_BNTS: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows_B1R1 = rows_BR[:, None, :, None]
        return jnp.take_along_axis(weights_BNTS[..., :S], rows_B1R1, 2), weights_BNTS.mean(axis=1)

    seen = decoder.with_attention(
        decoder.embed(text_BT), positions_BT, with_room(cache, S + T), keep
    )
    weights, text_attention = seen.attention
    return weights, rollout(attention, text_attention, rows_BR)


def rollout(attention: jax.Array, text_attention: jax.Array, rows_BR: jax.Array) -> jax.Array:
    """Attention rollout [B, R, S] of some words over the picture tokens.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020): the product over the
    layers of (A + I) / 2, A the mean over heads and I the residual connection.

    Args:
      attention: rows of the picture tokens [layers, B, S, S].
      text_attention: rows of the words [layers, B, T, S + T].
      rows_BR: words to begin at.
    """
    S, T = attention.shape[-1], text_attention.shape[2]
    # From the last layer down only the wanted rows of the product are needed. Pictures stand
    # before all words, so they attend to none.
    on_text_BRT = jax.nn.one_hot(rows_BR, T)
    on_pictures_BRS = jnp.zeros((*rows_BR.shape, S))
    for pictures_BSU, text_BTU in zip(attention[::-1], text_attention[::-1], strict=True):
        moved_BRS = on_pictures_BRS @ pictures_BSU + on_text_BRT @ text_BTU[..., :S]
        on_pictures_BRS = (on_pictures_BRS + moved_BRS) / 2
        on_text_BRT = (on_text_BRT + on_text_BRT @ text_BTU[..., S:]) / 2
    return on_pictures_BRS
