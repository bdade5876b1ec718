"""An update that is applied or not: the same in the form for GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import compile_as_for

from htfa_jax.kernels.update import update_if
from htfa_jax.sharding.mesh import Backend


@pytest.mark.parametrize("backend", [Backend("cpu"), Backend("gpu", 9)], ids=lambda b: b.platform)
@pytest.mark.parametrize("applies", [False, True])
def test_equals_the_plain_one(backend, applies, monkeypatch):
    compile_as_for(monkeypatch, backend)
    old = {"a": jnp.arange(3.0), "b": (jnp.int32(7),)}

    def update(old):
        return jax.tree.map(lambda x: x + 1, old)

    run = jax.jit(lambda applies: update_if(applies, update, old))
    assert ("cond[" in str(jax.make_jaxpr(run)(True))) == (backend.platform == "cpu")
    plain = jax.lax.cond(applies, update, lambda old: old, old)
    jax.tree.map(np.testing.assert_array_equal, run(applies), plain)


def test_what_is_not_finite_stays_out(monkeypatch):
    """Selected and not multiplied: NaN times 0 would be NaN."""
    compile_as_for(monkeypatch, Backend("gpu", 9))
    assert update_if(jnp.bool_(False), lambda x: x * jnp.nan, jnp.float32(2)) == 2
