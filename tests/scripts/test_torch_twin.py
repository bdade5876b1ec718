"""The PyTorch twin of the training step against the model: loss, gradients, update."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch
from benchmarks.torch_twin import Twin, renamed
from support import KEYS_BIAS, random_batch, random_weights, tiny

from htfa_jax.common import param_paths
from htfa_jax.errors import ConfigError, DataError
from htfa_jax.models.factory import build_model
from htfa_jax.models.losses import count, loss_and_metrics
from htfa_jax.training.optim import frozen_pattern, make_optimizer

FEATURES = {
    "level1__alpha": "map",
    "level2__alignment": "features",
    "level2__values": "fused",
    "vq__normalize_codes": False,
}
# All that learns, a tokenizer of several levels, and what the presets leave at its default.
WHOLE = {
    "level2__alignment": "none",
    "level2__values": "fused",
    "level2__mask_keys": False,
    "vq__stem": 2,
    "vq__channel_multipliers": (1, 2, 2),
    "vq__attention": "lowest",
    "decoder__rope_factor": 2.0,
    "loss__label_smoothing": 0.1,
    "loss__occluded_cell_weight": 3.0,
    "data__use_object_mask": False,
}
FROZEN = {"pretrained__random_components": "as_configured"}


def both(config):
    """Twin, our weights (trainable, frozen), structure and batch."""
    model = build_model(config)
    flat = random_weights(model)
    frozen, trainable = param_paths.split(flat, frozen_pattern(config))
    twin = Twin(config, {path: np.asarray(value) for path, value in flat.items()})
    return twin, trainable, frozen, model, random_batch(config)


def ours(config, model, trainable, frozen, batch):
    """Loss and gradients."""

    @jax.jit
    def compute(params, batch):
        def loss(params):
            merged = model.merge(params, frozen)
            return loss_and_metrics(merged, batch, count(batch, config), None)[0]

        return jax.value_and_grad(loss)(params)

    return compute(trainable, batch)


def arrays(batch):
    """The batch's arrays by name."""
    return {name: value for name, value in vars(batch).items() if value is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [FROZEN, FEATURES | FROZEN, WHOLE], ids=["pixels", "features", "whole"]
)
def test_loss_and_gradients_agree(changes):
    config = tiny(**changes)
    twin, trainable, frozen, model, batch = both(config)
    loss, grads = ours(config, model, trainable, frozen, batch)
    assert twin.gradients(arrays(batch)).item() == pytest.approx(float(loss), abs=1e-4)
    expected = {name: (path, value) for name, path, value in renamed(grads, config)}
    assert set(expected) == set(twin.trained)
    for name, (path, value) in expected.items():
        largest = value.abs().max()
        if path == KEYS_BIAS:
            assert largest == 0 and twin.trained[name].grad.abs().max() < 1e-6
            continue
        assert largest > 0, path
        torch.testing.assert_close(
            twin.trained[name].grad, value, rtol=0, atol=float(2e-4 * largest + 1e-8), msg=path
        )


@pytest.mark.slow
def test_a_step_moves_the_weights_alike():
    config = tiny(
        **FROZEN,
        train__accumulation_steps=3,
        optim__weight_decay=0.3,
        optim__clip_norm=0.01,
        optim__learning_rate_factors=((r"level2\..*", 30.0),),
        # Far above the noise of gradients, whose signs alone would count otherwise.
        optim__eps=1e-2,
    )
    twin, trainable, frozen, model, batch = both(config)
    _, grads = ours(config, model, trainable, frozen, batch)
    optimizer = make_optimizer(config.optim, optax.constant_schedule(config.optim.learning_rate))
    updates = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(grads, trainable)
    before = {name: parameter.detach().clone() for name, parameter in twin.trained.items()}
    twin.step(arrays(batch))
    for name, path, update in renamed(updates, config):
        moved = twin.trained[name].detach() - before[name]
        torch.testing.assert_close(moved, update, rtol=2e-3, atol=3e-7, msg=path)
        assert twin.trained[name].grad is None


@pytest.mark.slow
def test_bfloat16_and_rematerialisation_stay_near():
    loss, raw = {}, {}
    for dtype, remat in (("float32", "none"), ("float32", "full"), ("bfloat16", "full")):
        config = tiny(**FROZEN, train__dtype=dtype, train__frozen_dtype=dtype, train__remat=remat)
        twin, *_, batch = both(config)
        loss[dtype, remat] = twin.gradients(arrays(batch)).item()
        raw[dtype, remat] = twin.trained["level1.raw.0"].grad
    exact, again, half = loss
    assert loss[again] == pytest.approx(loss[exact], abs=1e-6)
    torch.testing.assert_close(raw[again], raw[exact], rtol=1e-4, atol=1e-8)
    assert 1e-5 < abs(loss[half] - loss[exact]) < 0.1 and raw[half].abs().max() > 0


def test_what_the_twin_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"level1\.num_scales=2.*only 1"):
        both(tiny(level1__alpha="map", level1__num_scales=2))
    with pytest.raises(ConfigError, match=r"loss\.code_weight=0"):
        both(tiny(loss__code_weight=0.0))
    twin, *_, batch = both(tiny())
    with pytest.raises(DataError, match="has_recon"):
        twin.step(arrays(dataclasses.replace(batch, has_recon=np.zeros(3, bool))))
