"""Matmuls that know the device they run on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from htfa_jax.sharding.mesh import target

PRODUCT = "product"  # what `rematerialize` knows the results of `dot` by
# Since Ampere; see `layers.target`.
BFLOAT16_GPUS = r"gpu ([89]|\d\d)"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x: jax.Array, kernel: jax.Array, out_dtype: Any) -> jax.Array:
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=out_dtype)


def _dot_forward(x: jax.Array, kernel: jax.Array, out_dtype: Any):
    return _dot(x, kernel, out_dtype), (x, kernel)


def _dot_backward(out_dtype: Any, residuals: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = residuals
    g = g.astype(x.dtype)
    columns = x.reshape(-1, x.shape[-1]).T
    if target() == "cpu":
        # XLA's product takes up to twice as long if its left side does not lie in rows.
        columns = jax.lax.optimization_barrier(columns)
    grad = jnp.matmul(columns, g.reshape(-1, g.shape[-1]), preferred_element_type=kernel.dtype)
    return g @ kernel.astype(x.dtype).T, grad


def float32_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`dot` with a float32 result and no forward-mode differentiation.

    Its gradients are products in the type of `x`, as everywhere else: with a float32 gradient of
    the logits both products behind the text head would be float32 ones.
    """
    return _dot(x, kernel, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_einsum(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum of two arrays of one type with a float32 result; see `float32_dot`.

    Args:
      axes: of the arrays and the result, "ij,jk->ik"; none is of one array alone.
      a, b: the arrays.
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


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] times kernel [in, out], computed in the type of `x`.

    The kernel's gradient has the kernel's type from the product on, so that devices whose kernels
    are float32 also add up float32 (`sharding.reduce_dtype`). On CPUs, and with two types, the
    gradient is our own and there is no forward-mode differentiation.
    """
    if x.dtype == kernel.dtype and target() != "cpu":
        return x @ kernel
    return checkpoint_name(_dot(x, kernel, x.dtype), PRODUCT)


def sums_are_quick(x_BT: jax.Array) -> bool:
    """Whether products with these words [B, T, ...] are better written as sums.

    Of a single word XLA makes fewer kernels for a GPU of sums than of matrix products, each of
    which takes as long as a kernel needs to start: 608 words/s on an H200 instead of 542. Of
    several rows sums are the slower ones (`RESULTS.md`).
    """
    return x_BT.shape[:2] == (1, 1) and target().startswith("gpu")


def row_product(kernel_FD: Any, x_BTD: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x W^T for rows of weights: [B, T, D] -> [B, T, F].

    The weights stand first in the product. XLA's CPU matrix product then streams them at the
    memory's speed for any small B * T; the other way round it does so for B * T = 1 only.

    Args:
      kernel_FD: an array, or one that Qwix has quantized.
      x_BTD: what to multiply.
      out_dtype: of the product; that of the inputs by default.
    """
    if isinstance(kernel_FD, jax.Array):
        dot_general = jax.lax.dot_general
    else:
        from qwix import dot_general  # an optional package
    product_FBT = dot_general(
        kernel_FD, x_BTD, (((1,), (2,)), ((), ())), preferred_element_type=out_dtype
    )
    return product_FBT.transpose(1, 2, 0)


def _row_sums(kernel_FD: jax.Array, x_11D: jax.Array, norm: nnx.RMSNorm | None) -> jax.Array:
    """The product [1, 1, F] of a single word, in float32.

    The norm divides by one number, which is applied behind the product: nothing waits for it.
    """
    x_D, factor = x_11D[0, 0].astype(jnp.float32), 1.0
    if norm is not None:
        factor = jax.lax.rsqrt(jnp.mean(x_D * x_D) + norm.epsilon)
        x_D = x_D * norm.scale[...]
    return (factor * jnp.sum(kernel_FD * x_D[None], axis=1))[None, None]


def product_in_thirds(z_BME: jax.Array, vectors_CE: jax.Array) -> jax.Array:
    """z vectors^T [B, M, C] as exact as in float32, by units that multiply bfloat16.

    Of finite values that are not near the smallest a float32 holds.
    A float32 is the sum of three bfloat16; of their nine products the three smallest are below
    what float32 keeps (Henry et al., "Leveraging the bfloat16 Artificial Intelligence Datatype For
    Higher-Precision Computations", 2019). TPUs do the same where JAX is asked for full precision.
    """

    def thirds(x: jax.Array) -> list[jax.Array]:
        parts = []
        for _ in range(3):
            parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
            x = x - parts[-1]
        return [part.astype(jnp.bfloat16) for part in parts]

    (z1, z2, z3), (v1, v2, v3) = thirds(z_BME), thirds(vectors_CE)
    # One product of vectors six times as long; JAX's preset BF16_BF16_F32_X6 becomes six of cuBLAS.
    z_BMF = jnp.concatenate([z3, z2, z1, z2, z1, z1], axis=-1)
    vectors_CF = jnp.concatenate([v1, v2, v3, v1, v2, v1], axis=-1)
    return jnp.einsum("BMF,CF->BMC", z_BMF, vectors_CF, preferred_element_type=jnp.float32)
