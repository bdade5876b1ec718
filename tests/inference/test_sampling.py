import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from htfa_jax.errors import ConfigError
from htfa_jax.inference.options import Completion, Decoding
from htfa_jax.inference.sampling import make_sampling, penalize, sample_tokens, truncate

B, V = 3, 57


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0, 3, (B, V)).astype(np.float32)


@pytest.mark.parametrize(
    "top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.8), (9, 0.6), (1, 1.0), (0, 1e-4), (200, 0.999)]
)
def test_cut_off_tokens_are_those_of_transformers(logits, top_k, top_p):
    expected = torch.from_numpy(logits / np.float32(1.7))
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    got = truncate(jnp.asarray(logits / np.float32(1.7)), jnp.int32(top_k), jnp.float32(top_p))
    np.testing.assert_array_equal(got, expected.numpy())


def test_penalty_is_that_of_transformers(logits):
    ids = np.random.default_rng(1).integers(0, V, (B, 11))
    seen = np.zeros((B, V), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    expected = RepetitionPenaltyLogitsProcessor(1.4)(
        torch.from_numpy(ids), torch.from_numpy(logits.copy())
    )
    np.testing.assert_allclose(penalize(logits, seen, 1.4), expected.numpy(), rtol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_probable(logits):
    """Penalty, temperature, top-k, top-p, in this order, as transformers applies them."""
    options = Decoding(temperature=2.0, top_k=8, top_p=0.9, repetition_penalty=1.5)
    ids = np.arange(0, V, 2)[None].repeat(B, axis=0)
    seen = np.zeros((B, V), bool)
    seen[:, ids[0]] = True
    x = torch.from_numpy(logits.copy())
    for warp in (
        RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(2.0), TopKLogitsWarper(8),
        TopPLogitsWarper(0.9),
    ):  # fmt: skip
        x = warp(torch.from_numpy(ids), x)
    expected = torch.softmax(x, dim=-1).numpy()
    sampling = make_sampling(options, B)
    draw = jax.jit(jax.vmap(lambda step: sample_tokens(logits, seen, sampling, step)))
    words = np.asarray(draw(jnp.arange(4000)))
    share = np.stack([np.bincount(words[:, i], minlength=V) / 4000 for i in range(B)])
    np.testing.assert_allclose(share, expected, atol=0.03)
    assert not share[expected == 0].any()


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.5), ("repetition_penalty", 0.0), ("stop", "text"),
        ("stop", ("",)), ("seed", -1),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_named(field, value):
    with pytest.raises(ConfigError, match=field):
        Decoding(**{field: value})


@pytest.mark.parametrize("value", [1e-40, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_logits_cannot_be_divided_by_is_refused(value):
    for kind in (Decoding, Completion):
        with pytest.raises(ConfigError, match="temperature"):
            kind(temperature=value)
