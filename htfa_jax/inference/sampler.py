"""From prompts to texts: the compiled functions of `generate`, driven from the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from htfa_jax.config import Config
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.errors import DataError
from htfa_jax.inference.answer_attention import END, AnswerAttention, text_attention
from htfa_jax.inference.generate import DecodeState, Prefix, decode_until, prefill
from htfa_jax.inference.options import Decoding
from htfa_jax.inference.sampling import make_sampling
from htfa_jax.kernels import compiler
from htfa_jax.models.decoding import Decoder
from htfa_jax.models.internlm2 import VOCAB_MULTIPLE
from htfa_jax.models.kv_cache import Cache, num_slots
from htfa_jax.sharding.layout import Layout, to_host

# Prompts and rooms for answers are rounded up to multiples of these, so that few shapes compile:
# of the first as long as they are short, which most are, then of the second.
LENGTH_BUCKETS = 32, 128
# With stop sequences, tokens between two looks at the text.
STOP_CHECK = 8
# What an incomplete UTF-8 character decodes to.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """An answer, or what there is of it.

    Attributes:
      text: without what ended it.
      confidence: mean probability of its tokens, the one that ended it included, under the model
        itself: temperature 1, no penalty, nothing cut off.
      tokens: its tokens, the one that ended it included.
      ended: whether a stop token or stop sequence ended it.
      attention: behind each token; None unless asked for.
    """

    text: str
    confidence: float
    tokens: np.ndarray
    ended: bool
    attention: AnswerAttention | None = None


class Sampler:
    """Answers prompts from caches that hold the images.

    Args:
      config: of the run.
      tokenizer: of the run.
      decoder_of: from parameters to the decoder, inside a compiled function.
      layout: where parameters and caches are.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: ChatTokenizer,
        decoder_of: Callable[[Any], Decoder],
        layout: Layout,
    ):
        self.config, self.tokenizer = config, tokenizer
        self.num_image_tokens = config.num_patches + config.num_codes
        stop_ids = tuple(sorted(tokenizer.stop_ids))

        def first(params, *inputs, num_slots, max_new_tokens):
            return prefill(
                decoder_of(params),
                *inputs,
                stop_ids=stop_ids,
                num_slots=num_slots,
                max_new_tokens=max_new_tokens,
            )

        def further(params, state, until):
            return decode_until(decoder_of(params), state, until, stop_ids=stop_ids)

        def attend(params, *inputs):
            return text_attention(decoder_of(params), *inputs)

        static = ("num_slots", "max_new_tokens")
        self._prefill = jax.jit(layout.inside(first), static_argnames=static)
        # Donated, so that the tokens go into the cache that is there.
        self._decode = jax.jit(
            layout.inside(further),
            donate_argnums=1,
            compiler_options=compiler.DECODING.get(layout.platform),
        )
        self._attention = jax.jit(layout.inside(attend))

    def start(
        self,
        params: Any,
        cache: Cache,
        prompts: Sequence[np.ndarray],
        decoding: Decoding,
        kept: int = 0,
    ) -> DecodeState:
        """Reads prompts and chooses each answer's first token.

        Args:
          params: what `decoder_of` takes.
          cache: of the images, and of the first `kept` tokens of the prompts.
          prompts: the whole conversation of each row.
          decoding: options.
          kept: tokens that need not be read again.
        """
        fed = [prompt[kept:] for prompt in prompts]
        longest = kept + max(map(len, fed))
        self.check_room(longest, decoding)
        room = self.num_image_tokens + bucket(longest + decoding.max_new_tokens)
        prompt_BT, length_B = pad_prompts(fed, self.tokenizer.pad_id)
        vocab = round_up(self.config.decoder.vocab_size, VOCAB_MULTIPLE)
        seen_BV = np.zeros((len(prompts), vocab), bool)
        for row, prompt in zip(seen_BV, prompts, strict=True):
            row[prompt] = True
        return self._prefill(
            params,
            cache,
            np.int32(self.num_image_tokens + kept),
            prompt_BT,
            length_B,
            seen_BV,
            make_sampling(decoding, len(prompts)),
            num_slots=max(room, num_slots(cache)),
            max_new_tokens=bucket(decoding.max_new_tokens),
        )

    def check_room(self, prompt_length: int, decoding: Decoding) -> None:
        """Raises DataError unless prompt and answer fit into what the decoder can read."""
        limit = self.config.decoder.max_positions
        needed = self.num_image_tokens + prompt_length + decoding.max_new_tokens
        if limit is not None and needed > limit:
            raise DataError(
                f"{self.num_image_tokens} image tokens, {prompt_length} of the conversation "
                f"and max_new_tokens={decoding.max_new_tokens} are {needed} positions, and the "
                f"decoder reads decoder.max_positions={limit}: ask something shorter, begin a "
                "new conversation or lower max_new_tokens"
            )

    def proceed(
        self, params: Any, state: DecodeState, decoding: Decoding, tokens: int
    ) -> DecodeState:
        """At most `tokens` more tokens; `state` is used up."""
        until = min(int(state.step) + tokens, decoding.max_new_tokens)
        return self._decode(params, state, np.int32(until))

    def answers(
        self, params: Any, cache: Cache, prompts: Sequence[np.ndarray], decoding: Decoding
    ) -> list[GeneratedText]:
        """The answer to each prompt."""
        state = self.start(params, cache, prompts, decoding)
        return self.finish(params, state, decoding)[1]

    def with_attention(
        self,
        params: Any,
        prefix: Prefix,
        prompts: Sequence[np.ndarray],
        said: Sequence[GeneratedText],
    ) -> list[GeneratedText]:
        """The answers with their attention, from one more pass over each finished conversation.

        Args:
          params: what `decoder_of` takes.
          prefix: of the images, with their attention.
          prompts: what each row was asked.
          said: what it answered.
        """
        # A token is chosen at the position before its own.
        texts = [np.append(p, s.tokens[:-1]) for p, s in zip(prompts, said, strict=True)]
        text_BT, _ = pad_prompts(texts, self.tokenizer.pad_id)
        rows_BR = np.zeros((len(texts), bucket(max(len(s.tokens) for s in said))), np.int32)
        for row, prompt, s in zip(rows_BR, prompts, said, strict=True):
            row[: len(s.tokens)] = len(prompt) - 1 + np.arange(len(s.tokens))
        weights, rollout_BRS = jax.device_get(
            self._attention(params, prefix.cache, prefix.attention, text_BT, rows_BR)
        )
        out = []
        for i, s in enumerate(said):
            attention = AnswerAttention(
                tokens=tuple(map(self._token_text, s.tokens)),
                weights=weights[:, i, :, : len(s.tokens)],
                rollout_TS=rollout_BRS[i, : len(s.tokens)],
                num_patches=self.config.num_patches,
            )
            out.append(dataclasses.replace(s, attention=attention))
        return out

    def _token_text(self, token: int) -> str:
        return END if token in self.tokenizer.stop_ids else self._text([token])

    def finish(
        self, params: Any, state: DecodeState, decoding: Decoding
    ) -> tuple[DecodeState, list[GeneratedText]]:
        """All answers to their ends."""
        tokens = STOP_CHECK if decoding.stop else decoding.max_new_tokens
        while True:
            state = self.proceed(params, state, decoding, tokens)
            said = self.read(state, decoding)
            if self.is_full(state, decoding) or all(s.ended for s in said):
                return state, said

    def stream(
        self, params: Any, state: DecodeState, decoding: Decoding
    ) -> Iterator[tuple[str, DecodeState, GeneratedText]]:
        """One row's answer piece by piece: new text, state and answer so far.

        The pieces together are the answer's text. No piece ends inside a character, and none
        holds any part of a stop sequence.
        """
        shown = 0
        while True:
            said = self.read(state, decoding)[0]
            last = said.ended or self.is_full(state, decoding)
            text = said.text if last else settled(said.text, decoding.stop)
            if last or len(text) > shown:
                yield text[shown:], state, said
            if last:
                return
            shown = max(shown, len(text))
            state = self.proceed(params, state, decoding, 1)

    def is_full(self, state: DecodeState, decoding: Decoding) -> bool:
        """Whether the answers may not grow any more."""
        return int(state.step) >= decoding.max_new_tokens

    def read(self, state: DecodeState, decoding: Decoding) -> list[GeneratedText]:
        """The answers so far."""
        tokens_BT, probability_BT, step = (
            to_host(x) for x in (state.tokens_BT, state.probability_BT, state.step)
        )
        out = []
        for ids, probability_T in zip(tokens_BT[:, :step], probability_BT, strict=True):
            stops = np.isin(ids, list(self.tokenizer.stop_ids))
            ended = bool(stops.any())
            if ended:
                ids = ids[: stops.argmax() + 1]
            text = self._text(ids)
            if any(s in text for s in decoding.stop):
                text, ids, ended = *self._cut(ids, decoding.stop), True
            text = text.rstrip(INCOMPLETE).strip()
            out.append(GeneratedText(text, float(probability_T[: len(ids)].mean()), ids, ended))
        return out

    def _cut(self, ids: np.ndarray, stop: tuple[str, ...]) -> tuple[str, np.ndarray]:
        """The text before the first stop sequence, and the tokens up to that which completes it."""
        for count in range(1, len(ids) + 1):
            text = self._text(ids[:count])
            places = [text.find(s) for s in stop if s in text]
            if places:
                return text[: min(places)], ids[:count]
        raise AssertionError("no stop sequence")

    def _text(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids, strip=False)


def settled(text: str, stop: tuple[str, ...]) -> str:
    """The part of an unfinished text that later tokens cannot change or cut off."""
    end = len(text.rstrip(INCOMPLETE))
    for s in stop:
        held = next((n for n in range(len(s) - 1, 0, -1) if text[:end].endswith(s[:n])), 0)
        end = min(end, len(text[:end]) - held)
    # An answer has no white space at its end.
    return text[:end].rstrip()


def bucket(length: int) -> int:
    """The length, rounded up to one that is compiled for."""
    short, long = LENGTH_BUCKETS
    return round_up(length, short if length <= long else long)


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def pad_prompts(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as one array [B, T], T a multiple, and their lengths [B]."""
    padded = np.full((len(prompts), bucket(max(map(len, prompts)))), pad_id, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, np.array([len(p) for p in prompts], np.int32)
