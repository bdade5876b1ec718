"""What the models share: dropout."""

import jax
import jax.numpy as jnp
import numpy as np

from htfa_jax.models.layers import dropout


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    x = jnp.ones((300, 300))
    dropped = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    np.testing.assert_allclose(dropped.mean(), 1.0, atol=0.01)
    np.testing.assert_array_equal(dropout(x, 0.25, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)
