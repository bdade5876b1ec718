"""What the models share: dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from htfa_jax.models.layers import dropout, kept


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_leaves_its_share_of_independent_values(rate):
    shape = (400, 501)  # an odd length: two values come from one random word
    keep = np.asarray(kept(shape, rate, jax.random.key(0)))
    assert keep.shape == shape
    deviation = np.sqrt(rate * (1 - rate))
    assert abs(keep.mean() - (1 - rate)) < 4 * deviation / np.sqrt(keep.size)
    # No value tells of another: in the same word, beside it, in the row below.
    centred = (keep - (1 - rate)) / deviation
    halves = centred[:, :250], centred[:, 251:]
    for a, b in (halves, (centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert abs((a * b).mean()) < 4 / np.sqrt(a.size)
    assert (keep != np.asarray(kept(shape, rate, jax.random.key(1)))).any()


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    x = jnp.ones((300, 300))
    dropped = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    np.testing.assert_allclose(dropped.mean(), 1.0, atol=0.01)
    np.testing.assert_array_equal(dropout(x, 0.25, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)
