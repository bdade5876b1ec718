"""The wiring: what reaches what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEYS_BIAS, random_batch, random_weights, tiny

from htfa_jax.common.param_paths import split
from htfa_jax.config import override
from htfa_jax.models import registration
from htfa_jax.models.factory import build_model
from htfa_jax.models.losses import count, loss_and_metrics
from htfa_jax.models.registration import object_at_cells, register
from htfa_jax.training.optim import frozen_pattern

PATCHES, CODES, LENGTH = 16, 36, 64


def loss_of(config, structure):
    def loss(weights, batch, key=None):
        total, metrics = loss_and_metrics(
            structure.merge(weights), batch, count(batch, config), key
        )
        return total, metrics

    return jax.jit(loss)


def test_joint_sequence_is_causal_by_gradient(model):
    """No position of [understanding | generation | text] sees a later one."""
    config, structure, weights = model
    length = PATCHES + CODES + LENGTH
    x = jax.random.normal(jax.random.key(0), (1, length, config.decoder.embed_dim))

    @jax.jit
    def reach(x, position):
        grad = jax.grad(lambda x: jnp.sum(structure.merge(weights).decode(x, 0)[0][0, position]))
        return jnp.abs(grad(x)[0]).max(axis=-1)

    for position in (PATCHES - 1, PATCHES + 20, PATCHES + CODES + 30):
        seen = reach(x, position)
        assert np.all(seen[: position + 1] > 0)
        np.testing.assert_array_equal(seen[position + 1 :], 0)


def test_no_target_reaches_any_input(model):
    """Target image, labels and masks of the loss leave every prediction as it is."""
    config, structure, weights = model
    batch, other = random_batch(config), random_batch(config, seed=1)
    changed = dataclasses.replace(
        batch,
        image_target=other.image_target,
        labels=other.labels,
        loss_mask=other.loss_mask,
        occluder_mask=other.occluder_mask,
    )

    @jax.jit
    def predictions(batch):
        output = structure.merge(weights)(batch)
        codes = structure.merge(weights).target_codes(batch, output.fusion.pair)
        return (output.text_BLD, output.code_logits_BMC), codes

    first, codes = predictions(batch)
    second, other_codes = predictions(changed)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(codes, other_codes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pretrained__random_components": "as_configured", "level2__alignment": "features"},
        {"freeze__vq": False, "level1__alpha": "map", "level1__num_scales": 2},
        {
            "freeze__adapters": True,
            "freeze__decoder": True,
            "freeze__level2": True,
            "pretrained__random_components": "as_configured",
        },
    ],
    ids=["debug", "siglip frozen", "vq trained", "decoder frozen"],
)
def test_gradient_reaches_every_trainable_leaf_and_no_other(changes):
    config = tiny(**changes)
    structure = build_model(config)
    weights = random_weights(structure)
    frozen, trainable = split(weights, frozen_pattern(config))
    loss = loss_of(config, structure)
    batch = random_batch(config)
    grads = jax.jit(jax.grad(lambda t: loss({**t, **frozen}, batch)[0]))(trainable)
    silent = [path for path, grad in grads.items() if not np.any(grad)]
    assert silent == ([KEYS_BIAS] if config.pretrained.random_components == "train" else [])
    parts = {path.split(".")[0] for path in trainable}
    assert ("siglip" in parts) == (config.pretrained.random_components == "train")
    assert ("vq_encoder" in parts) == (not config.freeze.vq)
    assert "vq" not in parts


@pytest.mark.slow
def test_alpha_learns_through_the_vq_and_through_siglip():
    """Each encoder alone, though frozen, carries gradients to alpha."""
    config = tiny(level2__values="fused")
    structure = build_model(config)
    weights, batch = random_weights(structure), random_batch(config)

    @jax.jit
    def gradients(weights):
        def from_siglip(raw):
            fusion = structure.merge({**weights, "level1.raw.0": raw}).fuse(batch)
            return jnp.sum(jnp.sin(fusion.spatial_BPD))

        def from_vq(raw):
            module = structure.merge({**weights, "level1.raw.0": raw})
            z = module.vq.encoder(module.fuse(batch).fused_BHWC)
            return jnp.sum(jnp.sin(3 * module.vq.straight_through(z)[0]))

        raw = weights["level1.raw.0"]
        return jax.grad(from_siglip)(raw), jax.grad(from_vq)(raw)

    for grad in gradients(weights):
        assert np.mean(np.asarray(grad) != 0) > 0.9


@pytest.mark.slow
def test_a_frozen_siglip_stores_nothing_for_the_unfused_images():
    """The passes without gradients leave no residuals."""
    batch = random_batch(tiny())

    def temporary_bytes(frozen):
        config = tiny(
            pretrained__random_components="as_configured",
            freeze__siglip=frozen,
            siglip__num_layers=8,
            siglip__mlp_dim=300,
            loss__code_weight=0.0,
            level3__generation=False,
        )
        structure = build_model(config)
        held, trainable = split(random_weights(structure), frozen_pattern(config))
        loss = loss_of(config, structure)
        grad = jax.jit(jax.grad(lambda t, f: loss({**t, **f}, batch)[0]))
        return grad.lower(trainable, held).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(True) < 0.6 * temporary_bytes(False)


@pytest.mark.slow
def test_a_batch_gives_what_its_samples_give(model):
    config, structure, weights = model
    batch = random_batch(config, size=2)
    run = jax.jit(lambda batch: structure.merge(weights)(batch))
    whole = run(batch)
    for i in range(2):
        one = run(jax.tree.map(lambda x, i=i: x[i : i + 1], batch))
        for a, b in ((one.text_BLD, whole.text_BLD), (one.code_logits_BMC, whole.code_logits_BMC)):
            np.testing.assert_allclose(a[0], b[i], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_padding_behind_the_text_changes_nothing(model):
    config, structure, weights = model
    batch = random_batch(config, size=1)
    longer = dataclasses.replace(
        batch, tokens=np.concatenate([batch.tokens, np.full((1, 9), 5, np.int32)], axis=1)
    )
    run = jax.jit(lambda batch: structure.merge(weights)(batch).text_BLD)
    np.testing.assert_allclose(run(longer)[:, :LENGTH], run(batch), rtol=1e-4, atol=1e-5)


def test_without_a_reconstruction_the_original_stands_for_it(model):
    config, structure, weights = model
    batch = random_batch(config)
    without = dataclasses.replace(batch, has_recon=np.array([False, True, True]))
    fuse = jax.jit(lambda batch: structure.merge(weights).fuse(batch))
    fusion, changed = (
        fuse(without),
        fuse(dataclasses.replace(without, image_recon=batch.image_recon + np.uint8(7))),
    )
    np.testing.assert_allclose(fusion.fused_BHWC[0], fusion.pair.orig_BHWC[0], atol=1e-5)
    assert fusion.pair.source_B[0] == registration.NO_RECON
    np.testing.assert_array_equal(fusion.spatial_BPD[0], changed.spatial_BPD[0])
    assert not np.array_equal(fusion.spatial_BPD[1], changed.spatial_BPD[1])


def test_the_reconstructions_features_stand_behind_those_of_level_2(model):
    config, structure, weights = model
    batch = random_batch(config)
    both = jax.jit(lambda batch: structure.merge(weights).fuse(batch))(batch).spatial_BPD
    alone_config = override(config, {"level2.append_reconstruction": False})
    alone_structure = build_model(alone_config)
    alone = jax.jit(lambda batch: alone_structure.merge(weights).fuse(batch).spatial_BPD)(batch)
    D = config.siglip.embed_dim
    assert alone.shape[-1] == D and both.shape[-1] == 2 * D
    np.testing.assert_allclose(both[..., :D], alone, rtol=1e-5, atol=1e-6)

    def features(batch):
        module = structure.merge(weights)
        pair = register(batch, config)
        shown = object_at_cells(pair, config.patch_grid)[..., None]
        return module.siglip(pair.aligned_recon_BHWC) * shown

    np.testing.assert_allclose(both[..., D:], jax.jit(features)(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_object_masks_are_seen_only_if_asked_for():
    batch = random_batch(tiny())
    other = dataclasses.replace(batch, object_mask=~batch.object_mask)
    no_boxes = dataclasses.replace(batch, has_bbox_orig=np.zeros(3, bool))
    for sees in (True, False):
        config = tiny(data__use_object_mask=sees)
        structure = build_model(config)
        weights = random_weights(structure)
        run = jax.jit(lambda b, s=structure, w=weights: s.merge(w)(b).text_BLD)
        assert np.array_equal(run(batch), run(other)) != sees
        source = register(no_boxes, config).source_B
        assert np.all((source == registration.MASK) == sees)


def test_targets_of_records_without_one_are_the_aligned_reconstruction(model):
    config, structure, weights = model
    batch = random_batch(config)
    without = dataclasses.replace(batch, has_target=np.array([False, True, True]))

    @jax.jit
    def look(batch):
        module = structure.merge(weights)
        pair = module.fuse(batch).pair
        return module.target_codes(batch, pair), module.vq.encode(pair.aligned_recon_BHWC)

    codes, of_aligned = look(without)
    np.testing.assert_array_equal(codes[0], of_aligned[0])
    np.testing.assert_array_equal(codes[1:], look(batch)[0][1:])


@pytest.mark.parametrize(
    "changes,absent,tokens",
    [
        ({"loss__code_weight": 0.0}, ("level3.head_generate",), PATCHES + CODES + LENGTH),
        ({"loss__text_weight": 0.0}, ("decoder.embed", "decoder.head"), PATCHES + CODES),
        (
            {"loss__code_weight": 0.0, "level3__generation": False},
            ("vq", "level1", "level3.adapter_generate", "level3.head_generate"),
            PATCHES + LENGTH,
        ),
    ],
    ids=["understanding only", "generation only", "single encoder"],
)
def test_what_is_off_does_not_exist(changes, absent, tokens):
    config = tiny(**changes)
    structure = build_model(config)
    assert not [path for path in structure.shapes if path.startswith(absent)]
    lengths = []

    def trace(batch, weights):
        module = structure.merge(weights)
        decoder = module.decoder
        original = type(decoder).__call__

        def spy(self, x_BTD, *args, **kwargs):
            lengths.append(x_BTD.shape[1])
            return original(self, x_BTD, *args, **kwargs)

        type(decoder).__call__ = spy
        try:
            return loss_and_metrics(module, batch, count(batch, config), None)
        finally:
            type(decoder).__call__ = original

    loss, metrics = jax.eval_shape(trace, random_batch(config), structure.shapes)
    assert lengths == [tokens]
    assert ("text_loss" in metrics) == (config.loss.text_weight > 0)
    assert ("code_loss" in metrics) == (config.loss.code_weight > 0)


@pytest.mark.slow
def test_a_record_that_was_skipped_changes_nothing(model):
    config, structure, weights = model
    loss = jax.jit(jax.value_and_grad(loss_of(config, structure), has_aux=True))
    batch = random_batch(config, size=3)
    other = random_batch(config, size=3, seed=5)
    weight = np.array([1, 0, 1], np.float32)

    def mixed(source):
        rows = np.array([False, True, False])
        chosen = jax.tree.map(
            lambda a, b: np.where(rows.reshape(-1, *[1] * (a.ndim - 1)), b, a), batch, source
        )
        return dataclasses.replace(chosen, weight=weight)

    empty = jax.tree.map(np.zeros_like, batch)
    (expected, _), _ = loss(weights, mixed(other))
    (got, _), grad = loss(weights, mixed(empty))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert all(np.all(np.isfinite(g)) for g in grad.values())
