"""Dropout masks: each value is kept as often as it should be, by itself."""

import jax
import numpy as np
import pytest

from htfa_jax.kernels.dropout import dropout_mask


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_it_keeps_its_share_of_independent_values(rate):
    shape = (400, 501)  # an odd length: two values come from one random integer
    keep = np.asarray(dropout_mask(shape, rate, jax.random.key(0)))
    assert keep.shape == shape
    deviation = np.sqrt(rate * (1 - rate))
    assert abs(keep.mean() - (1 - rate)) < 4 * deviation / np.sqrt(keep.size)
    plain = np.asarray(jax.random.bernoulli(jax.random.key(0), 1 - rate, shape))
    assert abs(keep.mean() - plain.mean()) < 6 * deviation / np.sqrt(keep.size)
    # No value tells of another: in the same integer, beside it, in the row below.
    centred = (keep - (1 - rate)) / deviation
    halves = centred[:, :250], centred[:, 251:]
    for a, b in (halves, (centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert abs((a * b).mean()) < 4 / np.sqrt(a.size)
    assert (keep != np.asarray(dropout_mask(shape, rate, jax.random.key(1)))).any()
