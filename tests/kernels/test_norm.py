"""Group norm: PyTorch's and the plain one, in the forms for CPUs and for GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from support import compile_as_for, taken_apart
from torch.nn import functional

from htfa_jax.kernels.norm import group_norm, plain_group_norm
from htfa_jax.models.feature_maps import GroupNorm
from htfa_jax.sharding.mesh import Backend


@pytest.fixture(params=[Backend("cpu"), Backend("gpu", 9)], ids=lambda b: b.platform)
def backend(request, monkeypatch):
    compile_as_for(monkeypatch, request.param)
    return request.param


@pytest.mark.slow
def test_equals_the_plain_one(backend):
    rng = np.random.default_rng(0)
    x, scale, bias, cotangent = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 6, 5, 12), (12,), (12,), (2, 6, 5, 12))
    )

    def both(function):
        out, pull = jax.vjp(lambda *inputs: function(*inputs, 4, 1e-6), x, scale, bias)
        return out, *pull(cotangent)

    for ours, plain in zip(both(group_norm), both(plain_group_norm), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (24, 8)])
def test_group_norm_far_from_zero(channels, groups, activated, backend):
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
    in_program = "complex" in str(jax.make_jaxpr(pull)(cotangent_))
    assert in_program == (backend.platform == "gpu")
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
