"""Building blocks that the models share.

Array names end in letters for their axes, the same letters as in the einsum beside them:

    B batch          H, W height, width (images only, image_BHWC, values in [-1, 1])
    P patches (SigLIP tokens, understanding)     M codes (VQ tokens, generation)
    T query length   S key length   L text length
    D embed_dim      F mlp_dim      V text vocabulary
    N heads          K kv heads     G = N / K      H head size (where N or K stands before it)
    C codebook size  E codebook dim
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from htfa_jax.kernels.matmul import (
    PRODUCT,
    _dot,
    _dot_backward,
    _dot_forward,
    _float32_einsum_backward,
    _float32_einsum_forward,
    dot,
    float32_einsum,
)
from htfa_jax.sharding.mesh import keep_batch_cut

Remat = Literal["none", "dots", "full"]
# Most layers that are compiled one by one.
WRITTEN_OUT = 8


def apply_rope(
    x_BTNH: jax.Array, positions_BT: jax.Array, theta: float, factor: float = 1.0
) -> jax.Array:
    """Rotary position embedding, halves rotated against each other (as Llama and InternLM2 do).

    Positions are divided by `factor` (Chen et al., "Extending Context Window of Large Language
    Models via Positional Interpolation", 2023).
    Angles are float32: bfloat16 cannot tell position 256 from 257.
    """
    half = x_BTNH.shape[-1] // 2
    frequency_H = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions_BT11 = positions_BT[:, :, None, None].astype(jnp.float32) / factor
    angle_BT1H = positions_BT11 * frequency_H[None, None, None]
    sin, cos = jnp.sin(angle_BT1H), jnp.cos(angle_BT1H)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; no key means evaluation."""
    return drop(x, rate, kept(x.shape, rate, key))


def kept(shape: tuple[int, ...], rate: float, key: jax.Array | None) -> jax.Array | None:
    """Which values of an array dropout leaves, the rate rounded to 16 bits; None means all."""
    if key is None or rate == 0.0:
        return None
    # Drawing is what dropout costs, so a word serves two values. Without the barrier XLA would
    # draw it once for each.
    *rest, length = shape
    words = jax.random.bits(key, (*rest, 1, -(-length // 2)), jnp.uint32)
    words = jax.lax.optimization_barrier(words)
    shift = jnp.array([0, 16], jnp.uint32).reshape(*[1] * len(rest), 2, 1)
    halves = (words >> shift) & 0xFFFF
    halves = halves.reshape(*rest, 2 * words.shape[-1])[..., :length]
    return halves >= round(rate * 2**16)


def drop(x: jax.Array, rate: float, keep: jax.Array | None) -> jax.Array:
    """`dropout` where it is known which values are `kept`."""
    if keep is None:
        return x
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split_key(key: jax.Array | None, num: int) -> Any:
    """`num` keys, or `num` times None in evaluation."""
    return [None] * num if key is None else jax.random.split(key, num)


class _Stream(nnx.RngStream):
    """NNX's stream of keys, the same ones."""

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key[...], self.count[...])
        # As a whole: assigned by index, as in NNX, a tracer is asked for its sharding, and for the
        # refusal, which nobody reads, JAX looks through everything that was traced before.
        self.count.set_value(self.count[...] + 1)
        return key


def streams(key: jax.Array | int) -> nnx.Rngs:
    """What `nnx.Rngs(key)` is to a module that is made, in a third of the time when traced."""
    rngs = nnx.Rngs(0)
    rngs.default = _Stream(key, tag="default")
    return rngs


def stack_layers(
    make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs
) -> nnx.Module:
    """One module whose parameters have a leading axis of `num_layers`, each layer its own."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make_all(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return make_all(rngs)


def run_layers(
    layers: nnx.Module,
    x: jax.Array,
    apply: Callable[[nnx.Module, jax.Array, Any], tuple[jax.Array, Any]],
    per_layer: Any = None,
    remat: Remat = "none",
) -> tuple[jax.Array, Any]:
    """Runs stacked layers one after the other.

    A `lax.scan`, compiled once whatever the depth. A few layers from which nothing is recomputed
    are written out instead: a loop fills what it collects with zeros, and copies into it and out.

    Args:
      layers: what `stack_layers` made.
      x: input of the first layer.
      apply: (layer, x, this layer's slice of `per_layer`) -> (x, what to collect).
      per_layer: arrays with a leading layer axis, or None.
      remat: what the backward pass computes again: nothing, all but matrix products, all.

    Returns:
      Output of the last layer, and what was collected, with a leading layer axis.
    """
    graphdef, state = nnx.split(layers)

    def body(x: jax.Array, inputs: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        layer_state, extra = inputs
        x, collected = apply(nnx.merge(graphdef, layer_state), keep_batch_cut(x), extra)
        return keep_batch_cut(x), collected

    depth = len(jax.tree.leaves(state)[0])
    written_out = remat == "none" and depth <= WRITTEN_OUT
    inputs, unroll = (state, per_layer), depth if written_out else 1
    return jax.lax.scan(rematerialize(body, remat), x, inputs, unroll=unroll)


def rematerialize(function: Callable, remat: Remat) -> Callable:
    """`function`, recomputed in the backward pass as `remat` says."""
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    policy = None
    if remat == "dots":
        # A policy does not look into `_dot`, so what that gives has a name.
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PRODUCT)
        )
    # Inside a scan nothing can be merged with the forward pass, so the barriers that
    # prevent it are not needed.
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


_dot.defvjp(_dot_forward, _dot_backward)

float32_einsum.defvjp(_float32_einsum_forward, _float32_einsum_backward)

XAVIER = nnx.initializers.xavier_uniform()


def linear(
    in_features: int,
    out_features: int,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    bias: bool = True,
    kernel_init: nnx.Initializer = XAVIER,
) -> nnx.Linear:
    """A linear layer with float32 weights that computes in `dtype`; see `dot`."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=bias,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=kernel_init,
        promote_dtype=_promote,
        dot_general=_nnx_dot,
        rngs=rngs,
    )


def _promote(arrays: tuple[Any, ...], *, dtype: jnp.dtype) -> tuple[Any, ...]:
    """Casts input and bias; the kernel is for `dot` to cast."""
    x, kernel, bias = arrays
    return x.astype(dtype), kernel, None if bias is None else bias.astype(dtype)


def _nnx_dot(x: jax.Array, kernel: jax.Array, dims: Any, **options: Any) -> jax.Array:
    return dot(x, kernel)


def layer_norm(size: int, epsilon: float, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm with float32 statistics."""
    return nnx.LayerNorm(
        size,
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=jnp.float32,
        use_fast_variance=False,
        rngs=rngs,
    )
