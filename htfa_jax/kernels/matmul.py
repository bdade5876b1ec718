"""Matmuls, written as each device runs them fastest. Every docstring names the plain version."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from htfa_jax.sharding import mesh

# The name by which a rematerialisation policy knows results of `dot`.
DOT = "dot"


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel.astype(x.dtype)` of x [..., in] and kernel [in, out].

    The kernel's gradient has the kernel's own dtype from the matmul on, so that float32 kernels
    have float32 gradients, which devices then add up in float32 (`sharding.reduce_dtype`). On CPUs,
    and where the two dtypes differ, the gradient is a custom one, without forward-mode
    differentiation.
    """
    if x.dtype == kernel.dtype and mesh.backend().platform != "cpu":
        return x @ kernel
    return checkpoint_name(_dot(x, kernel, x.dtype), DOT)


def float32_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)`.

    Its gradients are matmuls in the dtype of `x`. With JAX's own rule the float32 gradient of the
    logits makes both matmuls behind the LM head float32 ones: 5.8 of 252 ms of a `standard` step on
    an H200. There is no forward-mode differentiation.
    """
    return _dot(x, kernel, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x: jax.Array, kernel: jax.Array, out_dtype: Any) -> jax.Array:
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=out_dtype)


def _dot_forward(x: jax.Array, kernel: jax.Array, out_dtype: Any):
    return _dot(x, kernel, out_dtype), (x, kernel)


def _dot_backward(out_dtype: Any, residuals: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = residuals
    g = g.astype(x.dtype)
    transposed = x.reshape(-1, x.shape[-1]).T
    if mesh.backend().platform == "cpu":
        # XLA merges the transposition into the matmul, which then takes up to twice as long: its
        # left side is read by columns. The barrier keeps the transposition a step of its own.
        transposed = jax.lax.optimization_barrier(transposed)
    grad = jnp.matmul(transposed, g.reshape(-1, g.shape[-1]), preferred_element_type=kernel.dtype)
    return g @ kernel.astype(x.dtype).T, grad


_dot.defvjp(_dot_forward, _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_einsum(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)`, gradients as `float32_dot`.

    Args:
      axes: of the arrays and the result, "ij,jk->ik"; every axis is in at least two of the three.
      a, b: arrays of one dtype.
    """
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _float32_einsum_forward(axes: str, a: jax.Array, b: jax.Array):
    return float32_einsum(axes, a, b), (a, b)


def _float32_einsum_backward(axes: str, residuals: tuple[jax.Array, jax.Array], g: jax.Array):
    a, b = residuals
    g = g.astype(a.dtype)
    axes_a, axes_b, axes_g = axes.replace("->", ",").split(",")
    grad_a = jnp.einsum(f"{axes_g},{axes_b}->{axes_a}", g, b)
    return grad_a, jnp.einsum(f"{axes_g},{axes_a}->{axes_b}", g, a)


float32_einsum.defvjp(_float32_einsum_forward, _float32_einsum_backward)


def exact_dot(z_BME: jax.Array, vectors_CE: jax.Array) -> jax.Array:
    """`jnp.einsum("BME,CE->BMC", z, vectors, precision="highest")`: float32, nothing rounded away.

    GPUs since Ampere multiply bfloat16 in tensor cores and float32 outside of them; there it is a
    split matmul (`split_dot`): 0.4 instead of 1.3 ms for the code search of `standard` on an H200.
    """
    backend = mesh.backend()
    if backend.platform == "gpu" and backend.generation >= 8:
        return split_dot(z_BME, vectors_CE)
    return jnp.einsum("BME,CE->BMC", z_BME, vectors_CE, precision="highest")


def split_dot(z_BME: jax.Array, vectors_CE: jax.Array) -> jax.Array:
    """`exact_dot` as a bfloat16 matmul of split float32 (bf16x6), [B, M, C].

    A float32 is the sum of three bfloat16; of their nine products the three smallest are below
    what float32 keeps (Henry et al., "Leveraging the bfloat16 Artificial Intelligence Datatype For
    Higher-Precision Computations", 2019). TPUs do the same where JAX is asked for full precision.
    Values must be finite and not near the smallest that a float32 holds.
    """

    def split(x: jax.Array) -> list[jax.Array]:
        parts = []
        for _ in range(3):
            parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
            x = x - parts[-1]
        return [part.astype(jnp.bfloat16) for part in parts]

    (z1, z2, z3), (v1, v2, v3) = split(z_BME), split(vectors_CE)
    # One matmul over an axis six times as long; JAX's preset BF16_BF16_F32_X6 becomes six of
    # cuBLAS.
    z_BMF = jnp.concatenate([z3, z2, z1, z2, z1, z1], axis=-1)
    vectors_CF = jnp.concatenate([v1, v2, v3, v1, v2, v1], axis=-1)
    return jnp.einsum("BMF,CF->BMC", z_BMF, vectors_CF, preferred_element_type=jnp.float32)


def transposed_dot(
    x_BTD: jax.Array,
    kernel_FD: Any,
    out_dtype: jnp.dtype | None = None,
    *,
    norm: nnx.RMSNorm | None = None,
) -> jax.Array:
    """`norm(x) @ kernel.T`, [B, T, D] -> [B, T, F], for few tokens: it reads the weights once.

    Args:
      x_BTD: activations, in the dtype of the computation.
      kernel_FD: transposed (out, in) weights; an array, or one that Qwix has quantized.
      out_dtype: of the result; that of `x_BTD` by default.
      norm: of the activations before the matmul, if any.
    """
    if is_one_token_on_gpu(x_BTD) and isinstance(kernel_FD, jax.Array):
        return _as_sums(x_BTD, kernel_FD, norm).astype(out_dtype or x_BTD.dtype)
    x_BTD = x_BTD if norm is None else norm(x_BTD)
    if isinstance(kernel_FD, jax.Array):
        dot_general = jax.lax.dot_general
    else:
        from qwix import dot_general  # an optional package
    # The weights stand first. XLA's CPU matmul then streams them at the memory's speed for any
    # small B * T; the other way round it does so for B * T = 1 only.
    out_FBT = dot_general(
        kernel_FD, x_BTD, (((1,), (2,)), ((), ())), preferred_element_type=out_dtype
    )
    return out_FBT.transpose(1, 2, 0)


def is_one_token_on_gpu(x_BT: jax.Array) -> bool:
    """Whether matmuls with these activations [B, T, ...] are faster as elementwise sums.

    Of a single token XLA makes fewer kernels for a GPU of sums than of matmuls, each of which takes
    as long as a kernel needs to start: 608 tokens/s on an H200 instead of 542. Of several tokens
    sums are slower.
    """
    return x_BT.shape[:2] == (1, 1) and mesh.backend().platform == "gpu"


def _as_sums(x_11D: jax.Array, kernel_FD: jax.Array, norm: nnx.RMSNorm | None) -> jax.Array:
    """The result [1, 1, F] of a single token, in float32.

    The norm divides by one number, which is applied behind the sums, so that no sum waits for it.
    """
    x_D, factor = x_11D[0, 0].astype(jnp.float32), 1.0
    if norm is not None:
        factor = jax.lax.rsqrt(jnp.mean(x_D * x_D) + norm.epsilon)
        x_D = x_D * norm.scale[...]
    return (factor * jnp.sum(kernel_FD * x_D[None], axis=1))[None, None]
