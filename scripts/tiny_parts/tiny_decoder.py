"""A language model of InternLM2's architecture that has read conversations about held objects."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_text

from htfa_jax.config import Config
from htfa_jax.data.pipeline import Loaded
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.models.internlm2 import InternLM2

LENGTH = 128  # tokens of a row


def token_batches(
    config: Config, tokenizer: ChatTokenizer, step: int, rows: int
) -> Iterator[Loaded]:
    """Rows [B, LENGTH + 1] of conversations, one behind the other; a function of seed and step."""
    for number in itertools.count(step):
        rng = np.random.default_rng((config.seed, number))
        ids = np.zeros(0, np.int32)
        while len(ids) < rows * (LENGTH + 1):
            ids = np.append(ids, tokenizer.encode(tiny_text.dialogue(rng)).tokens)
        yield Loaded({"tokens": ids[: rows * (LENGTH + 1)].reshape(rows, -1)}, [], [])


def loss(
    model: InternLM2, batch: dict[str, jax.Array], key: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the next token in nats, and how often it is the most probable."""
    del key
    tokens_BT, labels_BT = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    hidden_BTD, _ = model(model.embed(tokens_BT), positions_BT)
    logits_BTV = model.logits(hidden_BTD)
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, labels_BT)
    right = jnp.mean(jnp.argmax(logits_BTV, axis=-1) == labels_BT)
    return losses_BT.mean(), {"accuracy": right}
