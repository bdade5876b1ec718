import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import golden, nhwc, taken_apart

from htfa_jax.config import Level1Config
from htfa_jax.models.level1_adaptive_fusion import AdaptiveFusion

NUMBERS = {"rtol": 1e-5, "atol": 1e-5}


def fusion(image_size=16, **changes) -> AdaptiveFusion:
    config = Level1Config(**({"alpha": "map"} | changes))
    return AdaptiveFusion(config, image_size, dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("case", ["native", "up", "down"])
def test_agrees_with_reference_vectors(case):
    g = golden("level1")
    structure, _ = taken_apart(fusion())
    orig, recon = (nhwc(g[f"{case}.img_{name}"]) for name in ("orig", "recon"))

    def run(raw):
        return structure.merge({"raw.0": raw})(orig, recon)

    raw = jnp.asarray(g["w.fusion_weight_raw"][0, 0])
    fused, alpha = run(raw)
    np.testing.assert_allclose(fused, nhwc(g[f"{case}.fused"]), **NUMBERS)
    np.testing.assert_allclose(alpha, g[f"{case}.alpha"][:, 0], **NUMBERS)
    grad = jax.grad(lambda r: jnp.sum(run(r)[0] * nhwc(g[f"{case}.cotangent"])))(raw)
    np.testing.assert_allclose(grad, g[f"{case}.grad_raw"][0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["native", "up"])
def test_multi_scale_agrees_with_reference_vectors(case):
    g, module = golden("level1"), fusion(num_scales=3)
    for scale in range(3):
        module.raw[scale][...] = jnp.asarray(g[f"ms.w.scale{scale}.fusion_weight_raw"][0, 0])
    module.scale_weights[...] = jnp.asarray(g["ms.w.scale_weights"])
    fused, alpha = module(*(nhwc(g[f"ms.{case}.img_{n}"]) for n in ("orig", "recon")))
    np.testing.assert_allclose(fused, nhwc(g[f"ms.{case}.fused"]), **NUMBERS)
    np.testing.assert_allclose(alpha, g[f"ms.{case}.alpha0"][:, 0], **NUMBERS)


@pytest.mark.parametrize("scales", [1, 2])
def test_starts_at_init_alpha(scales):
    module = fusion(init_alpha=0.8, num_scales=scales)
    _, alpha = module(jnp.ones((1, 16, 16, 3)), jnp.zeros((1, 16, 16, 3)))
    np.testing.assert_allclose(alpha, 0.8, rtol=1e-6)


def test_prediction_starts_at_zero_and_then_follows_the_images():
    rng = np.random.default_rng(0)
    orig, recon = rng.standard_normal((2, 3, 16, 16, 3)).astype(np.float32)
    mask = rng.integers(0, 2, (3, 16, 16)).astype(np.float32)
    module = fusion(alpha="predicted")
    np.testing.assert_array_equal(module(orig, recon, mask)[1], 0.5)
    module.head.conv3.kernel[...] = jnp.asarray(rng.standard_normal((3, 3, 16, 1)), jnp.float32)
    alpha = module(orig, recon, mask)[1]
    assert np.ptp(alpha, axis=0).max() > 0.01  # differs between samples
    for changed in ((orig + 1, recon, mask), (orig, recon + 1, mask), (orig, recon, 1 - mask)):
        assert not np.allclose(module(*changed)[1], alpha)


def test_equal_images_give_themselves_whatever_alpha_is():
    image = np.random.default_rng(1).standard_normal((2, 16, 16, 3)).astype(np.float32)
    module = fusion()
    module.raw[0][...] = jnp.linspace(-3, 3, 256).reshape(16, 16)
    np.testing.assert_allclose(module(image, image)[0], image, rtol=1e-5, atol=1e-6)
