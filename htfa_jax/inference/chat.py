"""Conversations about one pair of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from htfa_jax.config import DataConfig
from htfa_jax.data.records import Turn
from htfa_jax.errors import DataError
from htfa_jax.inference.options import Decoding
from htfa_jax.inference.sampler import Sampler
from htfa_jax.models.kv_cache import Cache


class Chat:
    """Several turns about one pair; the images are encoded once, tokens read once.

    Attributes:
      turns: the conversation so far.
      confidence: of the newest answer, as in `Result`; None before the first.
    """

    def __init__(self, sampler: Sampler, params: Any, cache: Cache):
        self._sampler, self._params, self._cache = sampler, params, cache
        self._read = np.zeros(0, np.int32)
        self.turns: list[Turn] = []
        self.confidence: float | None = None

    def ask(self, query: str | None = None, *, decoding: Decoding | None = None) -> str:
        """The answer, which then is part of the conversation."""
        return "".join(self.stream(query, decoding=decoding))

    def stream(
        self, query: str | None = None, *, decoding: Decoding | None = None
    ) -> Iterator[str]:
        """The answer piece by piece. A turn that is not read to its end is not remembered.

        The conversation is tokenised as if it were new, and only what differs from what the
        cache holds is read: the answer is that of a fresh prompt with all turns.

        Raises:
          DataError: if the conversation is longer than the decoder can read.
        """
        sampler, params = self._sampler, self._params
        decoding = (decoding or Decoding()).for_run(sampler.config.eval)
        question = Turn("user", checked_query(sampler.config.data, query))
        prompt = sampler.tokenizer.encode_prompt([*self.turns, question])
        kept = common_prefix(prompt[:-1], self._read)
        start = sampler.start(params, self._cache, [prompt], decoding, kept)
        pieces = []
        for piece, state, said in sampler.stream(params, start, decoding):
            pieces.append(piece)
            # Taken at every piece: whoever stops listening has used up the older cache.
            self._cache = state.cache
            self._read = np.concatenate([prompt, said.tokens[:-1]])
            self.confidence = said.confidence
            if piece:
                yield piece
        self.turns += [question, Turn("assistant", "".join(pieces))]


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts begin with in common."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def checked_query(data: DataConfig, query: str | None) -> str:
    """A question, or the run's own. Raises DataError if it is not a text."""
    query = data.default_query if query is None else query
    if not isinstance(query, str) or not query.strip():
        raise DataError(f"a query must be a text that is not empty, it is {query!r}")
    return query.strip()
