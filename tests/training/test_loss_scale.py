"""Dynamic loss scaling against its rules, one by one, and in a whole step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_batch, random_weights, tiny

from htfa_jax.common.param_paths import split
from htfa_jax.data.batch import split_for_accumulation
from htfa_jax.errors import ConfigError
from htfa_jax.models.factory import build_model
from htfa_jax.sharding.layout import Layout
from htfa_jax.training import loss_scale
from htfa_jax.training.optim import frozen_pattern, learning_rate, make_optimizer
from htfa_jax.training.plan import abstract_step
from htfa_jax.training.state import new_state
from htfa_jax.training.step import make_train_step


def after(scale, steps, *, finite, loss=1.0):
    """(scale, steps, finite) after a step."""
    state = {"loss_scale": {"scale": jnp.float32(scale), "steps": jnp.int32(steps)}}
    state["halted"] = jnp.bool_(False)
    metrics = {
        "finite": jnp.bool_(finite), "loss": jnp.float32(loss), "grad_norm": jnp.float32(jnp.inf),
    }  # fmt: skip
    new, told = loss_scale.next_scale(state, metrics)
    kept = new["loss_scale"]
    return float(kept["scale"]), int(kept["steps"]), bool(told["finite"])


def test_the_scale_halves_on_overflow_and_doubles_with_patience():
    assert after(1024, 7, finite=True) == (1024, 8, True)
    assert after(1024, loss_scale.PATIENCE - 1, finite=True) == (2048, 0, True)
    # An overflow costs an update, and no more.
    assert after(1024, 7, finite=False) == (512, 0, True)


def test_an_overflow_that_no_scale_mends_is_told():
    assert after(loss_scale.LEAST, 7, finite=False) == (loss_scale.LEAST, 0, False)
    assert after(1024, 7, finite=False, loss=float("nan"))[2] is False


def test_the_scale_has_bounds():
    assert after(loss_scale.MOST, loss_scale.PATIENCE, finite=True)[0] == loss_scale.MOST


def test_other_types_have_no_scale():
    state, metrics = {"params": 1}, {"finite": True}
    assert loss_scale.next_scale(state, metrics) == ({}, metrics)
    assert loss_scale.scale(state) == 1


@pytest.fixture(scope="module")
def scaled():
    """A step whose state has a loss scale (in float32: CPUs multiply no float16)."""
    config = tiny(level3__generation=False, loss__code_weight=0.0, optim__schedule="linear")
    layout, model = Layout(config), build_model(config)
    frozen, trainable = split(random_weights(model), frozen_pattern(config))
    schedule = learning_rate(config.optim, 10)
    optimizer = make_optimizer(config.optim, schedule)
    state = new_state(config.train, trainable, optimizer, layout)
    step = jax.jit(make_train_step(config, model, optimizer, schedule, layout))
    batch = split_for_accumulation(random_batch(config, size=2), 1)
    return step, state, frozen, batch


def with_scale(state, scale):
    """The state with a loss scale."""
    return state | {"loss_scale": {"scale": jnp.float32(scale), "steps": jnp.int32(5)}}


@pytest.mark.slow
def test_a_scaled_loss_gives_the_step_of_the_loss_itself(scaled):
    step, state, frozen, batch = scaled
    expected, expected_metrics = step(state, frozen, batch)
    got, metrics = step(with_scale(state, 1024), frozen, batch)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
    assert float(metrics["loss_scale"]) == 1024 and int(got["loss_scale"]["steps"]) == 6
    moments = zip(
        jax.tree.leaves(got["opt_state"]), jax.tree.leaves(expected["opt_state"]), strict=True
    )
    for a, b in moments:
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_an_overflow_leaves_the_weights_and_halves_the_scale(scaled):
    step, state, frozen, batch = scaled
    after, metrics = step(with_scale(state, 3e38), frozen, batch)
    assert bool(metrics["finite"]) and float(after["loss_scale"]["scale"]) < 3e38
    assert np.isnan(metrics["grad_norm"])
    for path, value in state["params"].items():
        np.testing.assert_array_equal(after["params"][path], value, err_msg=path)
    # The next update has this one's rate, and the log says so.
    after, again = step(with_scale(after, 1024), frozen, batch)
    _, then = step(after, frozen, batch)
    assert int(after["step"]) == 2
    assert float(again["learning_rate"]) == float(metrics["learning_rate"])
    assert float(then["learning_rate"]) != float(metrics["learning_rate"])


def test_float16_is_refused_on_a_cpu():
    config = tiny(train__dtype="float16", level3__generation=False, loss__code_weight=0.0)
    with pytest.raises(ConfigError, match="train.dtype=float16 .* GPU"):
        abstract_step(config)
