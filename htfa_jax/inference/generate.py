"""Decoding as pure functions: the images once, then tokens from a key-value cache, and codes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from htfa_jax.data.batch import Batch
from htfa_jax.inference.sampling import Sampling, sample_tokens
from htfa_jax.models.decoding import Decoder
from htfa_jax.models.htfa import HTFA, Fusion
from htfa_jax.models.kv_cache import Cache, with_room


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Prefix:
    """A batch's images, as far as the decoder has read them.

    Attributes:
      fusion: Levels 1 and 2.
      cache: keys and values of the image tokens.
      codes_BMD: tokens of the cells to be completed, None without a generation branch.
      code_logits_BMC: logits of the completed image's codes, None without codes.
      attention: the decoder's weights between image tokens, mean over its heads
        [layers, B, S, S]; None unless asked for.
    """

    fusion: Fusion
    cache: Cache
    codes_BMD: jax.Array | None
    code_logits_BMC: jax.Array | None
    attention: jax.Array | None


def read_images(model: HTFA, batch: Batch, *, with_weights: bool = False) -> Prefix:
    """Encodes the images and runs the decoder over them; the batch's text is not looked at.

    The attention weights of Level 2 and of the decoder come with it if they are wanted.
    """
    config = model.config
    prefix_BTD, fusion = model.encode(batch, with_weights=with_weights)
    B, length, _ = prefix_BTD.shape
    cache, attention = model.decoder.empty_cache(B, length), None
    if with_weights:
        positions_BT = jnp.broadcast_to(jnp.arange(length)[None], (B, length))
        # Of all heads they would be too many: thousands of tokens squared, for every layer.
        output = model.decoder.with_attention(
            prefix_BTD, positions_BT, cache, lambda w: w.mean(axis=1)
        )
        hidden_BTD, cache, attention = output.hidden_BTD, output.cache, output.attention
    else:
        hidden_BTD, cache = model.decode(prefix_BTD, 0, cache)
    # The cells of the image that is completed stand last.
    code_start = length - config.code_grid**2
    return Prefix(
        fusion=fusion,
        cache=cache,
        codes_BMD=prefix_BTD[:, code_start:] if config.level3.generation else None,
        code_logits_BMC=model.level3.code_logits(hidden_BTD[:, code_start:])
        if model.has_codes
        else None,
        attention=attention,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecodeState:
    """Answers in the making.

    Attributes:
      cache: holds everything before each row's newest token.
      length_B: how many slots of it are filled.
      token_B: the newest token, not in the cache yet.
      step: tokens chosen so far.
      tokens_BT: those tokens; behind a row's stop token nothing counts.
      probability_BT: of each token under the model alone: temperature 1, no penalty, all tokens.
      done_B: rows that have a stop token.
      seen_BV: tokens that the conversation holds, for the repetition penalty.
      sampling: options.
    """

    cache: Cache
    length_B: jax.Array
    token_B: jax.Array
    step: jax.Array
    tokens_BT: jax.Array
    probability_BT: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array
    sampling: Sampling


def prefill(
    decoder: Decoder,
    cache: Cache,
    start: jax.Array,
    prompt_BT: jax.Array,
    prompt_length_B: jax.Array,
    seen_BV: jax.Array,
    sampling: Sampling,
    *,
    stop_ids: tuple[int, ...],
    num_slots: int,
    max_new_tokens: int,
) -> DecodeState:
    """Reads a prompt and chooses the first token of the answer.

    Args:
      decoder: with text.
      cache: filled up to `start`.
      start: position of the prompt's first token.
      prompt_BT: tokens, padded behind.
      prompt_length_B: of each prompt, at least 1.
      seen_BV: tokens of the whole conversation.
      sampling: options.
      stop_ids: tokens that end an answer.
      num_slots: of the cache that comes out, enough for prompt and answer.
      max_new_tokens: tokens that the state has room for.
    """
    B, T = prompt_BT.shape
    positions_BT = jnp.broadcast_to(start + jnp.arange(T)[None], (B, T))
    cache = with_room(cache, num_slots)
    hidden_BTD, cache = decoder(decoder.embed(prompt_BT), positions_BT, cache)
    last_BTD = jnp.take_along_axis(hidden_BTD, prompt_length_B[:, None, None] - 1, axis=1)
    state = DecodeState(
        cache=cache,
        length_B=start + prompt_length_B,
        token_B=jnp.zeros(B, jnp.int32),
        step=jnp.int32(0),
        tokens_BT=jnp.zeros((B, max_new_tokens), jnp.int32),
        probability_BT=jnp.zeros((B, max_new_tokens), jnp.float32),
        done_B=jnp.zeros(B, bool),
        seen_BV=seen_BV,
        sampling=sampling,
    )
    return _add_token(state, decoder.logits(last_BTD)[:, 0], stop_ids)


def decode_until(
    decoder: Decoder, state: DecodeState, until: jax.Array, *, stop_ids: tuple[int, ...]
) -> DecodeState:
    """Chooses tokens until every row has stopped or has `until` of them."""

    def running(state: DecodeState) -> jax.Array:
        return (state.step < until) & ~state.done_B.all()

    def step(state: DecodeState) -> DecodeState:
        hidden_B1D, cache = decoder(
            decoder.embed(state.token_B[:, None]), state.length_B[:, None], state.cache
        )
        length_B = jnp.where(state.done_B, state.length_B, state.length_B + 1)
        state = dataclasses.replace(state, cache=cache, length_B=length_B)
        return _add_token(state, decoder.logits(hidden_B1D)[:, 0], stop_ids)

    return jax.lax.while_loop(running, step, state)


def _add_token(state: DecodeState, logits_BV: jax.Array, stop_ids: tuple[int, ...]) -> DecodeState:
    token_B = sample_tokens(logits_BV, state.seen_BV, state.sampling, state.step)
    token_B = jnp.where(state.done_B, state.token_B, token_B)
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    probability_B = jnp.exp(logit_B - jax.nn.logsumexp(logits_BV, axis=-1))
    stops = jnp.array(stop_ids, jnp.int32)
    return dataclasses.replace(
        state,
        token_B=token_B,
        step=state.step + 1,
        tokens_BT=state.tokens_BT.at[:, state.step].set(token_B),
        probability_BT=state.probability_BT.at[:, state.step].set(probability_B),
        done_B=state.done_B | (token_B[:, None] == stops[None]).any(axis=1),
        seen_BV=state.seen_BV.at[jnp.arange(len(token_B)), token_B].set(True),
    )


def complete(
    model: HTFA,
    prefix: Prefix,
    seed_B: jax.Array,
    temperature: jax.Array,
    steps: jax.Array | None = None,
) -> jax.Array:
    """The code vector of every cell of the completed image, [B, M, E], to be decoded to pixels.

    With one step those of all cells are chosen together. With k refinement steps the most confident
    of them stay, more after every step, and take the place of the fused image's codes; the others
    are predicted again with these in view (after Chang et al., "MaskGIT: Masked Generative Image
    Transformer", 2022; its cosine schedule).

    Args:
      model: with codes.
      prefix: of `read_images`.
      seed_B: of each row.
      temperature: of the codes that are drawn; 0 draws none, but takes the mean of all code
        vectors by their probability: where several codes are likely, any one of them is far off.
      steps: k; None for the shorter program of a single one.
    """
    M = prefix.code_logits_BMC.shape[1]
    start = model.config.num_patches + model.config.num_codes - M
    table_CE = model.vq.vectors()
    draw = functools.partial(_choose, table_CE, seed_B=seed_B, temperature=temperature)

    def refine(i: jax.Array, carry: tuple[jax.Array, jax.Array]):
        vectors_BME, confidence_BM = carry
        num_kept = M - jnp.floor(M * jnp.cos(math.pi / 2 * i / steps)).astype(jnp.int32)
        rank_BM = jnp.argsort(jnp.argsort(-confidence_BM, axis=1), axis=1)
        kept_BM = rank_BM < num_kept
        known_BMD = model.level3.generate(vectors_BME)
        tokens_BMD = jnp.where(kept_BM[..., None], known_BMD, prefix.codes_BMD)
        hidden_BMD, _ = model.decode(tokens_BMD, start, prefix.cache)
        new_BME, new_confidence_BM = draw(model.level3.code_logits(hidden_BMD), step=i)
        # What was kept once stays.
        return (
            jnp.where(kept_BM[..., None], vectors_BME, new_BME),
            jnp.where(kept_BM, jnp.inf, new_confidence_BM),
        )

    first = draw(prefix.code_logits_BMC, step=jnp.int32(0))
    if steps is None:
        return first[0]
    return jax.lax.fori_loop(1, steps, refine, first)[0]


def _choose(
    table_CE: jax.Array,
    logits_BMC: jax.Array,
    *,
    seed_B: jax.Array,
    temperature: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Vectors [B, M, E] of drawn codes or the expected ones, and log confidence [B, M]."""

    def draw(seed: jax.Array, logits_MC: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.random.categorical(key, logits_MC / jnp.maximum(temperature, 1e-6))

    codes_BM = jnp.where(
        temperature > 0, jax.vmap(draw)(seed_B, logits_BMC), logits_BMC.argmax(axis=-1)
    )
    vectors_BME = jnp.where(
        temperature > 0, table_CE[codes_BM], _expected_vectors(table_CE, logits_BMC)
    )
    logs_BMC = jax.nn.log_softmax(logits_BMC, axis=-1)
    return vectors_BME, jnp.take_along_axis(logs_BMC, codes_BM[..., None], axis=-1)[..., 0]


def _expected_vectors(table_CE: jax.Array, logits_BMC: jax.Array) -> jax.Array:
    """The mean of all code vectors by their probability, [B, M, E]."""
    return jax.nn.softmax(logits_BMC.astype(jnp.float32), axis=-1) @ table_CE


def expected_image(model: HTFA, code_logits_BMC: jax.Array) -> jax.Array:
    """The completed image [B, H, W, 3], normalised, in one step in which nothing is drawn."""
    return model.vq.decode_vectors(_expected_vectors(model.vq.vectors(), code_logits_BMC))
