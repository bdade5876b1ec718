"""Layers of feature maps: PyTorch's, in the forms for CPUs and for GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from support import taken_apart
from torch.nn import functional

from htfa_jax.kernels import conv
from htfa_jax.kernels.conv import ConvIn, Downsample, GroupNorm


@pytest.fixture(params=["cpu", "gpu 9"])
def target(request, monkeypatch):
    monkeypatch.setattr(conv, "target", lambda: request.param)
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
def test_the_first_convolution(size, channels, target):
    layer = ConvIn(channels, 5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    program = compare_convolution(
        layer, size, lambda x, kernel, bias: functional.conv2d(x, kernel, bias, padding=1)
    )
    in_strips = target != "cpu" and channels == 3 and size[1] % conv.STRIP == 0
    assert ("conv_general_dilated" in program) != in_strips


@pytest.mark.parametrize("size", [(6, 8), (8, 6), (7, 9)])
def test_halved_maps(size, target):
    layer = Downsample(4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    program = compare_convolution(
        layer,
        size,
        lambda x, kernel, bias: functional.conv2d(
            functional.pad(x, (0, 1, 0, 1)), kernel, bias, stride=2
        ),
    )
    assert ("padding=((2, 2), (2, 2))" in program) == (target != "cpu")


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (24, 8)])
def test_group_norm_far_from_zero(channels, groups, activated, target):
    """Result and gradients of PyTorch in float64, of groups with means of hundreds."""
    rng = np.random.default_rng(0)
    means = rng.uniform(-500, 500, groups).repeat(channels // groups)
    x = rng.normal(size=(2, 6, 5, channels)) + means
    scale, bias = rng.normal(size=(2, channels))
    cotangent = rng.normal(size=x.shape)
    structure, _ = taken_apart(GroupNorm(channels, dtype=jnp.float32, rngs=nnx.Rngs(0)))

    def ours(x, scale, bias):
        norm = structure.merge({"scale": scale, "bias": bias})
        return norm(x, jax.nn.silu) if activated else norm(x)

    out, pull = jax.vjp(ours, *(jnp.asarray(a, jnp.float32) for a in (x, scale, bias)))
    cotangent_ = jnp.asarray(cotangent, jnp.float32)
    assert ("complex" in str(jax.make_jaxpr(pull)(cotangent_))) == (target == "gpu 9")
    grads = pull(cotangent_)
    inputs = [torch.from_numpy(a).requires_grad_() for a in (x, scale, bias)]
    maps, *affine = inputs
    theirs = functional.group_norm(maps.permute(0, 3, 1, 2), groups, *affine, eps=1e-6)
    theirs = (functional.silu(theirs) if activated else theirs).permute(0, 2, 3, 1)
    theirs.backward(torch.from_numpy(cotangent))
    np.testing.assert_allclose(out, theirs.detach(), atol=1e-3)
    for grad, their in zip(grads, inputs, strict=True):
        np.testing.assert_allclose(grad, their.grad, rtol=1e-3, atol=1e-3)


def test_group_norm_of_a_flat_map_with_an_outlier_at_the_edge():
    """Padding makes such values."""
    x = 0.1 * np.random.default_rng(0).normal(size=(1, 224, 224, 8)).astype("f")
    x[:, 0, 0] = 50
    out = GroupNorm(8, dtype=jnp.float32, rngs=nnx.Rngs(0))(jnp.asarray(x))
    inputs = torch.from_numpy(np.float64(x)).permute(0, 3, 1, 2)
    theirs = functional.group_norm(inputs, 8, eps=1e-6).permute(0, 2, 3, 1)
    np.testing.assert_allclose(out, theirs, rtol=1e-3, atol=1e-3)


def test_an_activation_is_rounded_once():
    """In bfloat16 a logistic function in steps, each of them rounded, is further off."""
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 32)).astype("f")
    norm = GroupNorm(32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    out = np.asarray(norm(jnp.asarray(x), jax.nn.silu), np.float64)
    maps = torch.from_numpy(np.float64(x)).permute(0, 3, 1, 2)
    exact = functional.silu(functional.group_norm(maps, 32, eps=1e-6)).permute(0, 2, 3, 1)
    rounded = np.asarray(jax.nn.silu(norm(jnp.asarray(x))), np.float64)
    error, in_steps = (np.abs(y / exact.numpy() - 1).max() for y in (out, rounded))
    assert error < 2**-8 < in_steps
