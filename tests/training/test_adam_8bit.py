"""8-bit moments: their code against a list of all its numbers, their Adam against optax's."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from htfa_jax.checkpoints.manager import Checkpoints
from htfa_jax.config import OptimConfig
from htfa_jax.training import adam_8bit
from htfa_jax.training.adam_8bit import (
    FIRST,
    SECOND,
    dequantize,
    quantize,
    scale_by_adam_8bit,
    two_noises,
)
from htfa_jax.training.optim import make_optimizer

SHAPES = {
    "decoder.layers.q_proj.kernel": (3, 48, 96),
    "decoder.layers.norm1.scale": (3, 5000),  # a vector in each layer
    "decoder.embed.embedding": (640, 32),
    "level2.q_proj.kernel": (63, 65),  # one value less than is worth it
    "level2.q_proj.bias": (5000,),
}
LARGE = ("decoder.layers.q_proj.kernel", "decoder.embed.embedding")


def random(seed=0, shapes=SHAPES):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {p: jax.random.normal(k, s) for k, (p, s) in zip(keys, shapes.items(), strict=True)}


def plain(name):
    """The optimizer of a configuration, with nothing but Adam in it."""
    config = OptimConfig(name=name, learning_rate_factors=(), weight_decay=0.0, clip_norm=1e9)
    return make_optimizer(config, lambda step: 1e-2)


def test_moments_of_large_parameters_take_a_byte_a_value():
    def size(name):
        state = jax.eval_shape(plain(name).init, random())
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)

    values = sum(map(math.prod, SHAPES.values()))
    large = sum(math.prod(SHAPES[path]) for path in LARGE)
    rows = sum(math.prod(SHAPES[path][:-1]) for path in LARGE)
    assert size("adamw") == 2 * 4 * values
    assert size("adamw_8bit") == 2 * (large + 4 * rows) + 2 * 4 * (values - large)


@pytest.mark.parametrize("dtype", [FIRST, SECOND], ids=["first", "second"])
def test_a_value_becomes_one_of_its_two_neighbours_and_on_the_average_itself(dtype):
    """The neighbours are looked up in a list of all numbers of the type."""
    scale, times = 0.7, 4000
    every = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype)).astype(np.float64)
    every = np.unique(every[np.isfinite(every)]) / float(ml_dtypes.finfo(dtype).max) * scale
    rng = np.random.default_rng(0)
    x = rng.choice([-1, 1], 300) * scale * 10.0 ** rng.uniform(-10, 0, 300)
    x = np.concatenate([x, [0.0, scale, -scale], every[60:200:20]]).astype(np.float32)

    keys = jax.random.split(jax.random.key(1), times)
    noise = jax.vmap(lambda key: jnp.stack(two_noises(key, x.shape)))(keys)
    for i in range(2):  # both halves of the random bits
        code = quantize(jnp.asarray(x)[None], jnp.full((1, 1), scale), dtype, noise[:, i])
        assert code.dtype == dtype
        got = np.asarray(dequantize(code, jnp.full((1, 1), scale)), np.float64)
        below = every[np.clip(np.searchsorted(every, x * (1 + 1e-6 * np.sign(x))) - 1, 0, None)]
        above = every[np.clip(np.searchsorted(every, x), None, len(every) - 1)]
        near = np.isclose(got, below, rtol=1e-6, atol=0) | np.isclose(got, above, rtol=1e-6, atol=0)
        assert near.all()
        # Of numbers that are `low` or `high` and on the average x, the variance is this.
        deviation = np.sqrt(np.clip((x - below) * (above - x), 0, None) / times)
        assert np.all(np.abs(got.mean(0) - x) < 5 * deviation + 1e-4 * (above - below) + 1e-9)


def test_the_first_update_and_all_of_small_parameters_are_those_of_adam():
    params = random()
    reference, optimizer = plain("adamw"), plain("adamw_8bit")
    expected_state, state = reference.init(params), optimizer.init(params)
    update, update_8bit = jax.jit(reference.update), jax.jit(optimizer.update)
    for i in range(4):
        grads = random(seed=i)
        expected, expected_state = update(grads, expected_state, params)
        got, state = update_8bit(grads, state, params)
        for path in SHAPES:
            if i == 0 or path not in LARGE:
                np.testing.assert_allclose(got[path], expected[path], rtol=1e-5, err_msg=path)
    for path in LARGE:  # the others' gradients of earlier steps are remembered to a few percent
        assert not np.array_equal(got[path], expected[path])
        ratio = np.linalg.norm(got[path] - expected[path]) / np.linalg.norm(expected[path])
        assert ratio < 0.1, path


def test_it_learns_what_adamw_learns():
    """A regression from inputs of different sizes, in random batches: the loss at the end."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 96)) * 10.0 ** rng.uniform(-1, 1, 96)
    y = x @ rng.normal(size=(96, 64)) + rng.normal(size=(2000, 64))
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def loss(params, x, y):
        return jnp.mean((x @ params["kernel"] - y) ** 2)

    def end(direction):
        schedule = optax.cosine_decay_schedule(0.05, 600)
        optimizer = optax.chain(direction, optax.scale_by_learning_rate(schedule))

        def step(carry, key):
            params, state = carry
            rows = jax.random.choice(key, len(x), (64,))
            grads = jax.grad(loss)(params, x[rows], y[rows])
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        params = {"kernel": jnp.zeros((96, 64))}
        keys = jax.random.split(jax.random.key(0), 600)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return float(loss(params, x, y))

    expected = end(optax.scale_by_adam())
    assert expected < 1.1  # the noise has 1
    # With rounding to nearest it is 3e-3 more.
    assert end(scale_by_adam_8bit(0.9, 0.999, 1e-8)) == pytest.approx(expected, rel=2e-3)


def second_moments(before, after, steps=150, b2=0.99):
    """Of values whose gradient was `before` for a long time and `after` for so many steps."""
    shape = (8, 4096)
    optimizer = scale_by_adam_8bit(0.9, b2, 1e-8)
    # The first of each row is larger, so that the scales stay where they are.
    sizes = jnp.repeat(jnp.array([before, after]), jnp.array([10 * steps // 2, steps]))

    def step(state, size):
        grad = jnp.full(shape, size).at[:, 0].set(1.0)
        return optimizer.update({"kernel": grad}, state)[1], None

    run = jax.jit(
        lambda: jax.lax.scan(step, optimizer.init({"kernel": jnp.zeros(shape)}), sizes)[0]
    )
    state = run()
    return np.asarray(dequantize(state.nu["kernel"], state.nu_scale["kernel"]))[:, 1:]


@pytest.mark.slow
def test_the_second_moment_follows_the_gradient(monkeypatch):
    """A hundredth of the difference each step, in steps of an eighth: to nearest, it stays."""
    old, new, steps = 0.3, 0.5, 150
    expected = new**2 + (old**2 - new**2) * 0.99**steps
    got = second_moments(old, new, steps)
    assert got.mean() == pytest.approx(expected, rel=0.01)
    assert got.std() < 0.3 * expected

    half = lambda key, shape: (jnp.full(shape, 0.5),) * 2  # noqa: E731
    monkeypatch.setattr(adam_8bit, "two_noises", half)
    frozen = second_moments(old, new, steps)
    assert frozen.mean() < 0.5 * expected


def test_gradients_too_small_for_the_code_do_not_leap():
    """Beside one of 1 they are lost; their second moment must not be 0 where their first is not."""
    sizes = jnp.tile(10.0 ** -jnp.linspace(0, 9, 4096), (2, 1))
    optimizer = scale_by_adam_8bit(0.9, 0.999, 1e-30)
    state, update = optimizer.init({"kernel": jnp.zeros((2, 4096))}), jax.jit(optimizer.update)
    largest = 0.0
    for i in range(40):
        signs = jax.random.rademacher(jax.random.key(i), (2, 4096))
        updates, state = update({"kernel": signs * sizes}, state)
        largest = max(largest, float(jnp.max(jnp.abs(updates["kernel"]))))
    assert largest < 3.0  # Adam's own are below 1 here


def test_rows_without_a_gradient_stay():
    """Words that a batch does not hold, also before their first."""
    optimizer = scale_by_adam_8bit(0.9, 0.999, 1e-8)
    state = optimizer.init({"embedding": jnp.zeros((640, 32))})
    grads = {"embedding": jnp.zeros((640, 32)).at[7].set(1e-20)}
    for _ in range(3):
        updates, state = optimizer.update(grads, state)
    moved = np.flatnonzero(np.any(np.asarray(updates["embedding"]), axis=1))
    assert moved.tolist() == [7]
    assert np.all(np.isfinite(updates["embedding"]))


def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path):
    params, optimizer = random(), plain("adamw_8bit")

    def steps(params, state, numbers):
        update = jax.jit(plain("adamw_8bit").update)  # as a new process has it
        for i in numbers:
            updates, state = update(random(seed=i), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    half = steps(params, optimizer.init(params), range(3))
    expected = steps(*half, range(3, 6))
    state = {"step": jnp.int32(3), "params": half[0], "opt_state": half[1]}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, {})
    like = {"params": params, "opt_state": optimizer.init(params)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        found = checkpoints.restore(3, **like)
    got = steps(found["params"], found["opt_state"], range(3, 6))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_random_numbers_differ_by_step_and_path():
    optimizer = scale_by_adam_8bit(0.9, 0.999, 1e-8)
    grad = jax.random.normal(jax.random.key(0), (64, 64))
    state = optimizer.init({"a": grad, "b": grad})
    codes = []
    for _ in range(2):
        _, state = optimizer.update({"a": grad, "b": grad}, state)
        codes += [np.asarray(state.nu[path]) for path in "ab"]
    first, other, later, _ = codes
    assert np.mean(first != other) > 0.1 and np.mean(first != later) > 0.1
