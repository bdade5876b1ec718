"""Dynamic loss scaling against its rules, one by one, and in a whole float16 step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_batch, random_weights, tiny

from htfa_jax import loss_scale
from htfa_jax.batch import in_micro_batches
from htfa_jax.optim import frozen_pattern, learning_rate, make_optimizer
from htfa_jax.paths import split
from htfa_jax.sharding import Layout
from htfa_jax.train_state import build, new_state
from htfa_jax.train_step import make_train_step


def after(scale, steps, *, finite, loss=1.0):
    """(scale, steps, finite) after a step."""
    state = {"loss_scale": {"scale": jnp.float32(scale), "steps": jnp.int32(steps)}}
    metrics = {
        "finite": jnp.bool_(finite), "loss": jnp.float32(loss), "grad_norm": jnp.float32(jnp.inf),
    }  # fmt: skip
    new, told = loss_scale.after_step(state, {}, metrics)
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
    assert loss_scale.after_step(state, state, metrics) == (state, metrics)
    assert loss_scale.scale(state) == 1


@pytest.fixture(scope="module")
def float16():
    """A step in float16, its state and everything else that it takes."""
    config = tiny(
        train__dtype="float16", level3__generation=False, loss__code_weight=0.0,
        optim__schedule="constant",
    )  # fmt: skip
    layout, model = Layout(config), build(config)
    frozen, trainable = split(random_weights(model), frozen_pattern(config))
    schedule = learning_rate(config.optim, 10)
    optimizer = make_optimizer(config.optim, schedule)
    state = new_state(config, trainable, optimizer, layout)
    step = jax.jit(make_train_step(config, model, optimizer, schedule, layout))
    batch = in_micro_batches(random_batch(config, size=2), 1)
    return step, state, frozen, batch


def test_a_float16_step_has_the_gradient_of_float32(float16):
    step, state, frozen, batch = float16
    _, metrics = step(state, frozen, batch)
    config = tiny(level3__generation=False, loss__code_weight=0.0, optim__schedule="constant")
    layout, model = Layout(config), build(config)
    schedule = learning_rate(config.optim, 10)
    optimizer = make_optimizer(config.optim, schedule)
    exact = jax.jit(make_train_step(config, model, optimizer, schedule, layout))
    plain = {name: value for name, value in state.items() if name != "loss_scale"}
    _, expected = exact(plain, frozen, batch)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=2e-3)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=2e-2)
    assert float(metrics["loss_scale"]) == loss_scale.FIRST


def test_an_overflow_leaves_the_weights_and_halves_the_scale(float16):
    step, state, frozen, batch = float16
    huge = {"scale": jnp.float32(2.0**24), "steps": jnp.int32(5)}
    after, metrics = step(state | {"loss_scale": huge}, frozen, batch)
    assert bool(metrics["finite"]) and float(after["loss_scale"]["scale"]) == 2.0**23
    for path, value in state["params"].items():
        np.testing.assert_array_equal(after["params"][path], value, err_msg=path)
