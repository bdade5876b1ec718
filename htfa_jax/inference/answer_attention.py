"""Where the decoder looks while it answers: its attention over the image tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from htfa_jax.config.renamed import takes_old_names
from htfa_jax.errors import ConfigError
from htfa_jax.inference.options import View
from htfa_jax.models.decoding import Decoder
from htfa_jax.models.kv_cache import Cache, num_slots, with_room

# Stands for the token that ends an answer.
END = "(end)"


@takes_old_names
@dataclasses.dataclass(frozen=True)
class AnswerAttention:
    """The attention behind each token of an answer, at the position where it was chosen.

    S counts the image tokens, P + M: those of the understanding branch, then those of the
    generation branch. What is missing to a sum of 1 went to text tokens.

    Attributes:
      tokens: of the answer, as text; the one that ended it is `END`.
      weights: [layers, N, T, S].
      rollout_TS: the weights followed back through all layers, residual connections included:
        how much of each image token has come into the token's position.
      num_patches: P.
    """

    tokens: tuple[str, ...]
    weights: np.ndarray
    rollout_TS: np.ndarray
    num_patches: int

    def over_images(self, view: View) -> np.ndarray:
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


def text_attention(
    decoder: Decoder,
    cache: Cache,
    attention: jax.Array,
    text_BT: jax.Array,
    rows_BR: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Reads a finished conversation once more, for its attention to the images.

    Args:
      decoder: with text.
      cache: of the S image tokens alone.
      attention: between these [layers, B, S, S], mean over heads.
      text_BT: tokens of the conversation, padded behind.
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

    output = decoder.with_attention(
        decoder.embed(text_BT), positions_BT, with_room(cache, S + T), keep
    )
    weights, on_text = output.attention
    return weights, rollout(attention, on_text, rows_BR)


def rollout(attention: jax.Array, text_attention: jax.Array, rows_BR: jax.Array) -> jax.Array:
    """Attention rollout [B, R, S] of some tokens over the image tokens.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020): the product over the
    layers of (A + I) / 2, A the mean over heads and I the residual connection.

    Args:
      attention: rows of the image tokens [layers, B, S, S].
      text_attention: rows of the tokens [layers, B, T, S + T].
      rows_BR: tokens to begin at.
    """
    S, T = attention.shape[-1], text_attention.shape[2]
    # From the last layer down only the wanted rows of the product are needed. Images stand
    # before all text, so they attend to none of it.
    on_text_BRT = jax.nn.one_hot(rows_BR, T)
    on_images_BRS = jnp.zeros((*rows_BR.shape, S))
    for images_BSU, text_BTU in zip(attention[::-1], text_attention[::-1], strict=True):
        moved_BRS = on_images_BRS @ images_BSU + on_text_BRT @ text_BTU[..., :S]
        on_images_BRS = (on_images_BRS + moved_BRS) / 2
        on_text_BRT = (on_text_BRT + on_text_BRT @ text_BTU[..., S:]) / 2
    return on_images_BRS
