import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import count_matmuls, golden, product_types, random_batch, tiny

from htfa_jax.kernels.matmul import float32_dot
from htfa_jax.models import losses
from htfa_jax.models.losses import (
    chunked_cross_entropy,
    code_weights,
    count,
    cross_entropy,
    text_weights,
)

G = golden("loss")


def mean_loss(logits, targets):
    """Mean over the targets that are not -100, as the step computes it."""
    valid = targets != -100
    loss = cross_entropy(logits, jnp.where(valid, targets, 0), logits.shape[-1], 0.0)
    return jnp.sum(loss * valid) / jnp.maximum(valid.sum(), 1)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["default", "half", "text_only"])
def test_agrees_with_reference_vectors(case):
    text_weight, code_weight = G[f"{case}.weights"]

    def total(text, codes):
        understand = mean_loss(text, G["target_text"])
        generate = mean_loss(codes, G["target_vq"])
        return text_weight * understand + code_weight * generate, (understand, generate)

    logits = (jnp.asarray(G["logits_understand"]), jnp.asarray(G["logits_generate"]))
    (loss, parts), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(*logits)
    np.testing.assert_allclose([loss, *parts], G[f"{case}.losses"], rtol=1e-5)
    for grad, name in zip(grads, ("understand", "generate"), strict=True):
        np.testing.assert_allclose(grad, G[f"{case}.grad_{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_lm_heads_gradients_are_matmuls_in_the_dtype_of_the_computation(dtype, kernel_dtype):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 3, 8)), dtype)
    kernel = jnp.asarray(rng.standard_normal((8, 5)), kernel_dtype)
    cotangent = jnp.asarray(rng.standard_normal((2, 3, 5)), jnp.float32)

    def both(x, kernel, cotangent):
        out, pull = jax.vjp(float32_dot, x, kernel)
        return out, *pull(cotangent)

    out, grad_x, grad_kernel = both(x, kernel, cotangent)
    assert (out.dtype, grad_x.dtype, grad_kernel.dtype) == (jnp.float32, dtype, kernel_dtype)
    X, K, C = (np.asarray(a.astype(dtype), np.float64) for a in (x, kernel, cotangent))
    close = {"rtol": 1e-5 if dtype == kernel_dtype == "float32" else 1e-2, "atol": 1e-2}
    np.testing.assert_allclose(out, X @ K, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.float64(grad_x), C @ K.T, **close)
    np.testing.assert_allclose(np.float64(grad_kernel), np.einsum("btd,btv->dv", X, C), **close)
    program = jax.jit(both).lower(x, kernel, cotangent).as_text()
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    assert product_types(program) == [[short, short]] * 3


def test_nothing_to_learn_is_zero_not_nan():
    """The reference gives NaN here."""
    assert np.isnan(G["all_ignored.losses"]).any()
    targets = jnp.full((3, 7), -100)
    grad = jax.grad(lambda x: mean_loss(x, targets))(jnp.asarray(G["logits_understand"]))
    np.testing.assert_array_equal(grad, 0)


def test_label_smoothing_is_a_mixture_with_the_uniform_distribution():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((4, 9)).astype(np.float32), np.array([0, 3, 8, 5])
    padded = np.concatenate([logits, np.full((4, 2), -np.inf, np.float32)], axis=1)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = 0.1 / 9 + 0.9 * np.eye(9)[labels]
    np.testing.assert_allclose(
        cross_entropy(jnp.asarray(padded), labels, 9, 0.1), -(target * log_p).sum(-1), rtol=1e-5
    )


@pytest.mark.slow
def test_label_smoothing_reaches_both_losses():
    """Each is linear in it, and goes up by as much for the second step as for the first."""
    rng, (B, L, M) = np.random.default_rng(0), (2, 5, 3)

    def found(smoothing):
        config = tiny(loss__label_smoothing=smoothing)
        batch = random_batch(config, size=B, length=L)
        codes = config.vq.codebook_size
        output = SimpleNamespace(
            text_BLD=jnp.asarray(text), code_logits_BMC=jnp.asarray(logits[..., :codes]),
            fusion=SimpleNamespace(
                alpha_BHW=None, pair=SimpleNamespace(source_B=jnp.zeros(B, jnp.int32))
            ),
        )  # fmt: skip

        class Model:
            def __call__(self, batch, key):
                return output

        model = Model()
        model.config = config
        model.decoder = SimpleNamespace(
            logits_by=lambda kernel, h: h @ kernel, head_kernel=lambda: jnp.asarray(kernel)
        )
        model.target_codes = lambda batch, pair: jnp.arange(B * M).reshape(B, M) % codes
        weights = losses.code_weights
        try:
            losses.code_weights = lambda batch, config: jnp.ones((B, M))
            return losses.loss_and_metrics(model, batch, losses.Counts(*[jnp.float32(1)] * 3), None)
        finally:
            losses.code_weights = weights

    text = rng.standard_normal((B, L, 6)).astype(np.float32)
    kernel = rng.standard_normal((6, tiny().decoder.vocab_size)).astype(np.float32)
    logits = rng.standard_normal((B, M, 99)).astype(np.float32)
    none, half, more = (found(smoothing)[1] for smoothing in (0.0, 0.1, 0.2))
    for name in ("text_loss", "code_loss"):
        step = float(half[name] - none[name])
        assert step > 1e-3 and float(more[name] - none[name]) == pytest.approx(2 * step, rel=1e-3)


@pytest.mark.parametrize("chunk,products", [(5, 4), (4, 4), (12, 3), (40, 3)])
def test_chunks_give_the_loss_of_the_whole(chunk, products):
    """And logits are computed again for the backward pass, except those of a single chunk."""
    length = 12
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.standard_normal((2, length, 6)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((6, 11)), jnp.float32)
    labels = rng.integers(0, 11, (2, length))
    weights = jnp.asarray(rng.random((2, length)), jnp.float32)

    def chunked(hidden, kernel):
        return chunked_cross_entropy(
            lambda kernel, h: h @ kernel,
            kernel,
            hidden,
            labels,
            weights,
            num_classes=11,
            smoothing=0.1,
            chunk=chunk,
        )

    def whole(hidden, kernel):
        return jnp.sum(cross_entropy(hidden @ kernel, labels, 11, 0.1) * weights)

    both = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))
    assert count_matmuls(both, hidden, kernel) == products
    got = both(hidden, kernel)
    expected = jax.value_and_grad(whole, argnums=(0, 1))(hidden, kernel)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_cell_weights():
    """Covered cells weigh more, cells in the padding and of skipped records nothing."""
    config = tiny(loss__occluded_cell_weight=5.0)  # 48 pixels, 6 x 6 cells of 8 pixels
    batch = random_batch(config, size=2)
    occluder = np.zeros((2, 48, 48), bool)
    occluder[0, 8:16, 16:24] = True  # cell (1, 2) wholly
    occluder[0, 24:28, 0:8] = True  # cell (3, 0) by half
    region = np.array([[0, 0, 48, 40], [0, 0, 48, 48]], np.float32)
    weight = np.array([1, 0], np.float32)
    batch = dataclasses.replace(batch, occluder_mask=occluder, region_orig=region, weight=weight)
    expected = np.ones((6, 6))
    expected[1, 2], expected[3, 0], expected[5] = 5.0, 3.0, 0.0
    weights = code_weights(batch, config).reshape(2, 6, 6)
    np.testing.assert_allclose(weights[0], expected)
    np.testing.assert_array_equal(weights[1], 0)
    np.testing.assert_allclose(count(batch, config).codes, expected.sum())


def test_text_weights_leave_out_skipped_records():
    config = tiny()
    batch = random_batch(config, size=2)
    batch = dataclasses.replace(batch, weight=np.array([0, 1], np.float32))
    np.testing.assert_array_equal(text_weights(batch)[0], 0)
    np.testing.assert_array_equal(text_weights(batch)[1], batch.loss_mask[1])
    assert count(batch, config).samples == 1


def test_nothing_to_complete_has_no_code_loss():
    """Without target and reconstruction only the occluded original is left to copy."""
    config = tiny()
    batch = random_batch(config)
    whole = code_weights(batch, config)
    batch.has_target[0] = batch.has_recon[0] = batch.has_recon[1] = batch.has_target[2] = False
    weights = code_weights(batch, config)
    assert not np.any(weights[0])
    np.testing.assert_array_equal(weights[1:], whole[1:])


def test_models_without_codes_take_images_that_no_cells_fill():
    config = tiny(image_size=60, level3__generation=False, loss__code_weight=0.0)
    assert float(count(random_batch(config), config).codes) == 0
