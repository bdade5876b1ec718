"""Matmuls: each equals the plain one that its docstring names, in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import compile_as_for, product_types

from htfa_jax.kernels.matmul import (
    dot,
    exact_dot,
    float32_dot,
    float32_einsum,
    split_dot,
    transposed_dot,
)
from htfa_jax.sharding.mesh import Backend

BACKENDS = [Backend("cpu"), Backend("gpu", 9)]


def arrays(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.platform)
@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (dot, lambda x, kernel: x @ kernel),
        (float32_dot, lambda x, kernel: jnp.matmul(x, kernel)),
        (
            lambda x, kernel: float32_einsum("BTD,DF->BTF", x, kernel),
            lambda x, kernel: jnp.einsum("BTD,DF->BTF", x, kernel),
        ),
    ],
    ids=["dot", "float32_dot", "float32_einsum"],
)
def test_result_and_gradients_of_the_plain_one(ours, plain, backend, monkeypatch):
    x, kernel, cotangent = arrays((2, 5, 6), (6, 7), (2, 5, 7))
    out, pull = jax.vjp(plain, x, kernel)
    expected = out, *pull(cotangent)
    compile_as_for(monkeypatch, backend)
    out, pull = jax.vjp(ours, x, kernel)
    for a, b in zip((out, *pull(cotangent)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6)


def test_a_float32_kernel_has_a_float32_gradient():
    """Of bfloat16 activations: added up over devices, it is not rounded before."""
    (x,), (kernel,) = arrays((3, 4), dtype=jnp.bfloat16), arrays((4, 5))
    out, pull = jax.vjp(dot, x, kernel)
    grad_x, grad = pull(jnp.ones_like(out))
    assert (out.dtype, grad_x.dtype, grad.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("codebook_dim", [8, 256])
def test_a_split_matmul_is_as_exact_as_float32(codebook_dim, monkeypatch):
    z, vectors = arrays((2, 300, codebook_dim), (512, codebook_dim))
    z, vectors = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (z, vectors))
    exact = np.float64(z) @ np.float64(vectors).T
    error = np.abs(jax.jit(split_dot)(z, vectors) - exact).max()
    assert error < 2e-7  # three units in the last place of a float32 below 1
    plain = jnp.einsum("BME,CE->BMC", z, vectors, precision="highest")
    assert error < 2 * np.abs(plain - exact).max()
    np.testing.assert_array_equal(exact_dot(z, vectors), plain)
    compile_as_for(monkeypatch, Backend("gpu", 9))
    program = jax.jit(exact_dot).lower(z, vectors).as_text()
    assert product_types(program) == [["bf16", "bf16"]]
    compile_as_for(monkeypatch, Backend("gpu", 7))  # older than Ampere
    program = jax.jit(lambda *x: exact_dot(*x)).lower(z, vectors).as_text()
    assert product_types(program) == [["f32", "f32"]]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.platform)
@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_transposed_weights(rows, with_norm, backend, monkeypatch):
    x, kernel, scale = arrays((*rows, 6), (7, 6), (6,))
    norm = nnx.RMSNorm(6, epsilon=1e-5, rngs=nnx.Rngs(0))
    norm.scale.set_value(scale)
    expected = (norm(x) if with_norm else x) @ kernel.T
    compile_as_for(monkeypatch, backend)
    run = jax.jit(lambda x: transposed_dot(x, kernel, norm=norm if with_norm else None))
    np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-5)
    sums = backend.platform == "gpu" and rows == (1, 1)
    assert ("dot_general" in str(jax.make_jaxpr(run)(x))) != sums
