import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_batch

from htfa_jax.generate import greedy, pad_prompts, paint, read_pictures

NEW = 6


@pytest.fixture(scope="module")
def decoded(model):
    """Prompts of different lengths, and what decoding them together says."""
    config, structure, weights = model
    batch = random_batch(config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 390, n).astype(np.int32) for n in (9, 1, 16)]
    prompt_BT, length_B = pad_prompts(prompts, pad_id=3)

    def run(batch, prompt_BT, length_B, stops):
        module = structure.merge(weights)
        prefix = read_pictures(module, batch, prompt_BT.shape[1] + NEW)
        return greedy(module, prefix.cache, prompt_BT, length_B, stops, NEW), prefix

    run = jax.jit(run, static_argnums=3)
    said, prefix = run(batch, prompt_BT, length_B, (389,))
    return batch, prompts, np.asarray(said), prefix, run


def test_prompts_are_padded_to_a_multiple():
    padded, lengths = pad_prompts([np.array([5, 6]), np.arange(17)], pad_id=9, multiple=16)
    assert padded.shape == (2, 32)
    np.testing.assert_array_equal(lengths, [2, 17])
    np.testing.assert_array_equal(padded[0, :4], [5, 6, 9, 9])


def test_greedy_equals_the_whole_sequence_computed_anew(model, decoded):
    """Every word is the most probable one of an uncached pass over all before it."""
    config, structure, weights = model
    batch, prompts, said, _, _ = decoded

    @jax.jit
    def logits(batch, tokens_BT):
        module = structure.merge(weights)
        prefix, _ = module.encode(batch)
        hidden, _ = module.decode(
            jnp.concatenate([prefix, module.decoder.embed(tokens_BT)], axis=1), 0
        )
        return module.decoder.logits(hidden[:, prefix.shape[1] :])

    for row, prompt in enumerate(prompts):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        tokens = np.zeros(16 + NEW, np.int32)
        tokens[: len(prompt)] = prompt
        tokens[len(prompt) : len(prompt) + NEW] = said[row]
        best = np.asarray(logits(one, tokens[None])[0].argmax(axis=-1))
        np.testing.assert_array_equal(said[row], best[len(prompt) - 1 :][:NEW])


def test_a_row_alone_says_the_same(decoded):
    batch, prompts, said, _, run = decoded
    one = jax.tree.map(lambda x: x[1:2], batch)
    prompt_BT, length_B = pad_prompts(prompts[1:2], pad_id=7)
    np.testing.assert_array_equal(run(one, prompt_BT, length_B, (389,))[0][0], said[1])


def test_a_row_that_stops_repeats_its_stop_and_leaves_the_others_alone(decoded):
    batch, prompts, said, _, run = decoded
    # The last new word of a row that some other row never says.
    row, stop = next(
        (i, int(token))
        for i in range(3)
        for token in said[i, ::-1]
        if token != said[i, 0] and any(token not in said[k] for k in range(3) if k != i)
    )
    prompt_BT, length_B = pad_prompts(prompts, pad_id=3)
    stopped = np.asarray(run(batch, prompt_BT, length_B, (stop,))[0])
    first = int(np.argmax(said[row] == stop))
    np.testing.assert_array_equal(stopped[row, : first + 1], said[row, : first + 1])
    assert first > 0 and np.all(stopped[row, first:] == stop)
    others = [k for k in range(3) if stop not in said[k]]
    np.testing.assert_array_equal(stopped[others], said[others])


def test_all_rows_stopped_ends_the_answer(decoded):
    batch, prompts, said, _, run = decoded
    prompt_BT, length_B = pad_prompts(prompts, pad_id=3)
    stops = tuple(int(t) for t in np.unique(said[:, 0]))
    stopped = np.asarray(run(batch, prompt_BT, length_B, stops)[0])
    np.testing.assert_array_equal(stopped, np.repeat(said[:, :1], NEW, axis=1))


def test_codes_are_those_of_training(model, decoded):
    """The same logits as in the joint pass, and the picture of the most probable codes."""
    config, structure, weights = model
    batch, _, _, prefix, _ = decoded
    output = jax.jit(lambda b: structure.merge(weights)(b))(batch)
    np.testing.assert_allclose(prefix.code_logits_BMC, output.code_logits_BMC, rtol=1e-3, atol=1e-4)
    module = structure.merge(weights)
    codes = np.asarray(prefix.code_logits_BMC).argmax(axis=-1)
    np.testing.assert_allclose(
        paint(module, prefix.code_logits_BMC), module.vq.decode(codes), rtol=1e-5, atol=1e-5
    )
