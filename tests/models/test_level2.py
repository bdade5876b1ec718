import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import golden, nhwc, taken_apart

from htfa_jax.config import Level2Config
from htfa_jax.models import registration
from htfa_jax.models.level2_spatial_attention import SpatialAttention, attention_entropy
from htfa_jax.models.registration import at_cells

G = golden("level2_attention")
PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}


def attention(**changes) -> SpatialAttention:
    config = Level2Config(num_heads=4, dropout=0.0, **changes)
    return SpatialAttention(config, 32, dtype=jnp.float32, rngs=nnx.Rngs(0))


def reference_weights(prefix: str = "w") -> dict[str, jnp.ndarray]:
    """Weights of the reference (or gradients, by prefix) under our paths."""
    flat = {}
    for ours, theirs in PROJECTIONS.items():
        flat[f"{ours}.kernel"] = jnp.asarray(G[f"{prefix}.{theirs}_proj.weight"].T)
        flat[f"{ours}.bias"] = jnp.asarray(G[f"{prefix}.{theirs}_proj.bias"])
    flat["norm.scale"] = jnp.asarray(G[f"{prefix}.layer_norm.weight"])
    flat["norm.bias"] = jnp.asarray(G[f"{prefix}.layer_norm.bias"])
    return flat


def aligned(features, images_orig, images_recon):
    """The reference's alignment: intensity boxes of each sample, sampling at cell corners."""
    size = images_orig.shape[1]
    region = jnp.tile(jnp.array([[0, 0, size, size]], jnp.float32), (len(images_orig), 1))
    boxes = [
        registration.box_of(registration.foreground(nhwc_, region, 0.01))[0]
        for nhwc_ in (images_orig, images_recon)
    ]
    affine = registration.affine_between(*boxes)
    return registration.resample_tokens(features, affine, (size, size), offset=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["affine", "affine_mask", "no_affine"])
def test_agrees_with_reference_vectors(case):
    structure, _ = taken_apart(attention())
    weights = reference_weights()
    recon = jnp.asarray(G["feat_recon"])
    if case != "no_affine":
        recon = aligned(recon, nhwc(G["img_orig"]), nhwc(G["img_recon"]))
    if case == "affine_mask":
        recon = recon * at_cells(jnp.asarray(G["occlusion_mask"][:, 0]), 4)[..., None]

    def run(weights, **options):
        return structure.merge(weights)(G["feat_orig"], recon, G["feat_fused"], **options)

    out, probabilities = run(weights, with_weights=True)
    np.testing.assert_allclose(out, G[f"{case}.out"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(probabilities, G[f"{case}.attention"], rtol=1e-4, atol=1e-5)
    out, nothing = run(weights)
    np.testing.assert_allclose(out, G[f"{case}.out"], rtol=1e-4, atol=1e-4)
    assert nothing is None
    if case != "no_affine":
        for wanted in (False, True):
            grads = jax.grad(
                lambda w, wanted=wanted: jnp.sum(run(w, with_weights=wanted)[0] * G["cotangent"])
            )(weights)
            for path, expected in reference_weights(f"{case}.grad").items():
                np.testing.assert_allclose(
                    grads[path], expected, rtol=1e-3, atol=1e-4, err_msg=path
                )


@pytest.mark.slow
def test_each_sample_of_a_batch_is_aligned_by_its_own_boxes():
    structure, _ = taken_apart(attention())
    recon = aligned(
        jnp.asarray(G["batch2.feat_recon"]),
        nhwc(G["batch2.img_orig"]),
        nhwc(G["batch2.img_recon"]),
    )
    out, _ = structure.merge(reference_weights())(
        G["batch2.feat_orig"], recon, G["batch2.feat_fused"]
    )
    np.testing.assert_allclose(out, G["batch2.out_each_own_box"], rtol=1e-4, atol=1e-4)
    assert not np.allclose(out, G["batch2.out_peer_first_box"], atol=1e-3)


def random_features(samples=3):
    return jax.random.normal(jax.random.key(0), (3, samples, 16, 32))


def test_hidden_keys_get_no_attention_and_do_not_count():
    orig, recon, fused = random_features()
    mask = jnp.arange(16)[None] < jnp.array([[5], [16], [9]])
    module = attention()
    out, weights = module(orig, recon, fused, mask, with_weights=True)
    np.testing.assert_array_equal(weights[0, :, :, 5:], 0)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    moved, _ = module(orig, recon.at[0, 5:].add(9.0), fused.at[0, 5:].add(9.0), mask)
    np.testing.assert_allclose(out, moved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_weights", [False, True])
def test_a_sample_without_keys_keeps_the_original(with_weights):
    orig, recon, fused = random_features()
    mask = jnp.array([[True] * 16, [False] * 16, [True] * 16])
    out, _ = attention()(orig, recon, fused, mask, with_weights=with_weights)
    x = np.asarray(orig[1])
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(out[1], expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(out[0], out[1])


def test_dropout_is_in_training_only_and_weights_are_those_before_it():
    orig, recon, fused = random_features()
    config = Level2Config(num_heads=4, dropout=0.5)
    module = SpatialAttention(config, 32, dtype=jnp.float32, rngs=nnx.Rngs(0))
    plain, weights = module(orig, recon, fused, with_weights=True)
    dropped, same_weights = module(orig, recon, fused, key=jax.random.key(3), with_weights=True)
    assert not np.allclose(plain, dropped)
    np.testing.assert_array_equal(weights, same_weights)
    without, nothing = module(orig, recon, fused, key=jax.random.key(3))
    np.testing.assert_array_equal(without, dropped)
    assert nothing is None


def test_the_backward_pass_of_dropout_keeps_no_weights():
    orig, recon, fused = random_features()
    config = Level2Config(num_heads=4, dropout=0.5)
    module = SpatialAttention(config, 32, dtype=jnp.float32, rngs=nnx.Rngs(0))
    run = functools.partial(module, key_mask_BP=None, key=jax.random.key(3))
    kept = jax.tree.leaves(jax.vjp(lambda *x: run(*x)[0], orig, recon, fused)[1])
    assert {x.shape for x in kept} >= {(3, 16, 4, 8)}
    # But which of them stay.
    assert [x.dtype.name for x in kept if x.shape[-2:] == (16, 16)] == ["bool"]


def test_entropy_agrees_with_reference_vectors():
    weights = jnp.asarray(G["no_affine_mask.attention"])
    expected = G["no_affine_mask.statistics"][0]
    np.testing.assert_allclose(attention_entropy(weights).mean(), expected, rtol=1e-5)
