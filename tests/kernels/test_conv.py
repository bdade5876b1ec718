"""Convolutions of feature maps: PyTorch's and the plain ones, in the forms for CPUs and GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from support import compile_as_for, taken_apart
from torch.nn import functional

from htfa_jax.kernels.conv import HALVING, STRIP, conv, halving_conv, image_conv
from htfa_jax.models.feature_maps import ConvIn, Downsample
from htfa_jax.sharding.mesh import Backend


@pytest.fixture(params=[Backend("cpu"), Backend("gpu", 9)], ids=lambda b: b.platform)
def backend(request, monkeypatch):
    compile_as_for(monkeypatch, request.param)
    return request.param


def compare_convolution(layer, size, theirs):
    """Result and gradients of a layer and of a function of PyTorch, of x, kernel and bias."""
    structure, flat = taken_apart(layer)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(2, *size, flat["kernel"].shape[2]))]
    inputs += [rng.normal(size=flat[name].shape) for name in ("kernel", "bias")]

    def ours(x, kernel, bias):
        return structure.merge({"kernel": kernel, "bias": bias})(x)

    floats = [jnp.asarray(a, jnp.float32) for a in inputs]
    out, pull = jax.vjp(ours, *floats)
    cotangent = rng.normal(size=out.shape)
    x, kernel, bias = tensors = [torch.from_numpy(a).requires_grad_() for a in inputs]
    expected = theirs(x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), bias).permute(0, 2, 3, 1)
    expected.backward(torch.from_numpy(cotangent))
    np.testing.assert_allclose(out, expected.detach(), atol=1e-4)
    for grad, tensor in zip(pull(jnp.asarray(cotangent, jnp.float32)), tensors, strict=True):
        np.testing.assert_allclose(grad, tensor.grad, atol=1e-3)
    return str(jax.make_jaxpr(ours)(*floats))


@pytest.mark.parametrize(
    ("size", "channels"), [((6, 16), 3), ((5, 8), 3), ((6, 12), 3), ((5, 8), 12)]
)
def test_the_first_convolution(size, channels, backend):
    layer = ConvIn(channels, 5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    program = compare_convolution(
        layer, size, lambda x, kernel, bias: functional.conv2d(x, kernel, bias, padding=1)
    )
    in_strips = backend.platform == "gpu" and channels == 3 and size[1] % STRIP == 0
    assert ("conv_general_dilated" in program) != in_strips


@pytest.mark.parametrize("size", [(6, 8), (8, 6), (7, 9)])
def test_halved_maps(size, backend):
    layer = Downsample(4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    program = compare_convolution(
        layer,
        size,
        lambda x, kernel, bias: functional.conv2d(
            functional.pad(x, (0, 1, 0, 1)), kernel, bias, stride=2
        ),
    )
    assert ("padding=((2, 2), (2, 2))" in program) == (backend.platform == "gpu")


@pytest.mark.parametrize(
    ("ours", "channels", "options"),
    [(image_conv, 3, {}), (halving_conv, 5, {"stride": 2, "padding": HALVING})],
)
def test_equals_the_plain_one(ours, channels, options, monkeypatch):
    rng = np.random.default_rng(1)
    x, kernel, bias = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 8, 16, channels), (3, 3, channels, 4), (4,))
    )
    expected = conv(x, kernel, bias, **options)
    compile_as_for(monkeypatch, Backend("gpu", 9))
    np.testing.assert_allclose(ours(x, kernel, bias), expected, atol=2e-6)
