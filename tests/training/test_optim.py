import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import golden, tiny

from htfa_jax.common.param_paths import split
from htfa_jax.config import Config, OptimConfig
from htfa_jax.models.factory import build_model
from htfa_jax.training.optim import frozen_pattern, learning_rate, make_optimizer


def test_adamw_agrees_with_reference_vectors():
    """Clipping by the global norm and three steps, one parameter without weight decay."""
    g = golden("optimizer")
    _, b1, b2, eps, decay, clip = g["hyper"]
    config = OptimConfig(
        learning_rate=1e-2,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=decay,
        clip_norm=clip,
        no_decay="b",
        learning_rate_factors=(),
    )
    optimizer = make_optimizer(config, lambda step: 1e-2)
    params = {"a": jnp.asarray(g["adamw.a0"]), "b": jnp.asarray(g["adamw.b0"])}
    state = optimizer.init(params)
    for i in range(3):
        grads = {name: jnp.asarray(g[f"adamw.grad_{name}{i}"]) for name in "ab"}
        np.testing.assert_allclose(optax.tree.norm(grads), g[f"adamw.norm{i}"], rtol=1e-5)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in "ab":
            np.testing.assert_allclose(params[name], g[f"adamw.{name}{i + 1}"], rtol=1e-5)


def curve(steps=100, **changes):
    config = OptimConfig(learning_rate=2.0, min_ratio=0.1, **changes)
    schedule = learning_rate(config, steps)
    return np.array([float(schedule(i)) for i in range(steps)])


def test_warm_up_rises_from_the_first_step_to_the_peak():
    rates = curve(warmup_steps=10)
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(curve(warmup_ratio=0.1), rates)
    assert curve(warmup_ratio=0.0)[0] == 2.0


@pytest.mark.parametrize(
    "schedule,at",
    [
        ("cosine", lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2),
        ("linear", lambda t: 1 - 0.9 * t),
        ("constant", lambda t: 1.0),
        ("cosine_restarts", lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * ((2 * t) % 1))) / 2),
    ],
)
def test_schedules_are_their_formulas(schedule, at):
    rates = curve(warmup_steps=20, schedule=schedule)
    expected = [2.0 * at(i / 80) for i in range(80)]
    np.testing.assert_allclose(rates[20:], expected, rtol=1e-5)


def test_factors_scale_updates_by_path():
    config = OptimConfig(
        learning_rate_factors=((r"level1\..*", 200.0), (r"level.*", 3.0)),
        weight_decay=0.0,
        name="lion",
        clip_norm=1e9,
    )
    optimizer = make_optimizer(config, lambda step: 0.1)
    params = {name: jnp.ones(2) for name in ("level1.raw", "level2.q", "decoder.q")}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    for name, size in (("level1.raw", 20.0), ("level2.q", 0.3), ("decoder.q", 0.1)):
        np.testing.assert_allclose(updates[name], -size, rtol=1e-6)


def test_adafactor_moves_and_keeps_small_moments():
    config = OptimConfig(name="adafactor", learning_rate_factors=())
    optimizer = make_optimizer(config, lambda step: 0.1)
    params = {"kernel": jnp.ones((256, 512))}
    state = optimizer.init(params)
    held = sum(x.size for x in optax.tree.get_all_with_path(state, "v_row")[0][1].values())
    assert held < 1000
    updates, _ = optimizer.update(params, state, params)
    assert np.all(np.asarray(updates["kernel"]) < 0)


@pytest.mark.slow
def test_weight_decay_leaves_out_what_it_should():
    """Alpha, embeddings, norms and biases keep their size; every matrix decays."""
    config = tiny(optim__weight_decay=0.5, optim__clip_norm=1.0)
    shapes = build_model(config).shapes
    params = {path: jnp.ones(s.shape) for path, s in shapes.items()}
    optimizer = make_optimizer(config.optim, lambda step: 1.0)
    zeros = {path: jnp.zeros(s.shape) for path, s in shapes.items()}
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    kept = {path for path, u in updates.items() if not np.any(u)}
    for path in shapes:
        last = path.split(".")[-1]
        exempt = last in ("bias", "scale", "embedding", "position_embed") or "raw" in path
        assert (path in kept) == exempt, path


@pytest.mark.parametrize(
    "changes,parts",
    [
        ({}, {"vq"}),
        ({"pretrained__random_components": "as_configured"}, {"vq", "siglip"}),
        ({"pretrained__siglip": "somewhere"}, {"vq", "siglip"}),
        ({"pretrained__decoder": "somewhere", "freeze__decoder": True}, {"vq", "decoder"}),
        ({"freeze__decoder": True}, {"vq"}),
        (
            {"freeze__level1": True, "freeze__level2": True, "freeze__adapters": True},
            {"vq", "level1", "level2", "level3"},
        ),
        ({"level1__learnable": False}, {"vq"}),
        ({"freeze__vq": False}, {"vq"}),
    ],
)
def test_which_parts_are_frozen(changes, parts):
    config = tiny(**changes)
    frozen, trainable = split(build_model(config).shapes, frozen_pattern(config))
    assert {path.split(".")[0] for path in frozen} == parts
    assert not {path.split(".")[0] for path in trainable} & parts


def test_fresh_parts_learn_faster_in_the_default():
    config = Config().optim
    factors = config.learning_rate_factors
    from htfa_jax.common.param_paths import first_match

    for path in ("level1.raw.0", "level2.q_proj.kernel", "level3.head_generate.kernel"):
        assert config.learning_rate * first_match(factors, path, 1.0) == pytest.approx(1e-4)
    assert first_match(factors, "decoder.layers.norm1.scale", 1.0) == 1.0
