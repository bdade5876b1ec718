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

from htfa_jax.kernels.dropout import dropout_mask
from htfa_jax.kernels.matmul import DOT, dot
from htfa_jax.sharding.mesh import keep_batch_sharded

Remat = Literal["none", "dots", "full"]
# Most layers that are unrolled.
MOST_UNROLLED = 8


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
    return drop(x, rate, keep_mask(x.shape, rate, key))


def keep_mask(shape: tuple[int, ...], rate: float, key: jax.Array | None) -> jax.Array | None:
    """Which values of an array dropout keeps; None means all."""
    return None if key is None or rate == 0.0 else dropout_mask(shape, rate, key)


def drop(x: jax.Array, rate: float, keep: jax.Array | None) -> jax.Array:
    """`dropout` with a given mask."""
    if keep is None:
        return x
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split_key(key: jax.Array | None, num: int) -> Any:
    """`num` keys, or `num` times None in evaluation."""
    return [None] * num if key is None else jax.random.split(key, num)


class _FastStream(nnx.RngStream):
    """NNX's stream of keys, the same ones, without the slow part of tracing it.

    NNX assigns the counter by index. A tracer is then asked for its sharding, and for the refusal,
    which nobody reads, JAX looks through everything that was traced before. With flax 0.12.8 and
    JAX 0.10.2 the structure of `debug` takes 0.2 s like this and 0.7 s with `nnx.Rngs`, that of
    `standard` 0.4 and 1.3 s. To be dropped when `nnx.Rngs` is as fast.
    """

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key[...], self.count[...])
        self.count.set_value(self.count[...] + 1)
        return key


def make_rngs(key: jax.Array | int) -> nnx.Rngs:
    """`nnx.Rngs(key)` for making a module; see `_FastStream`."""
    rngs = nnx.Rngs(0)
    rngs.default = _FastStream(key, tag="default")
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
    are unrolled instead: a loop fills what it collects with zeros, and copies into it and out.

    Args:
      layers: what `stack_layers` made.
      x: input of the first layer.
      apply: (layer, x, this layer's slice of `per_layer`) -> (x, what to collect).
      per_layer: arrays with a leading layer axis, or None.
      remat: what the backward pass computes again: nothing, all but matmuls, all.

    Returns:
      Output of the last layer, and what was collected, with a leading layer axis.
    """
    graphdef, state = nnx.split(layers)

    def body(x: jax.Array, inputs: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        layer_state, extra = inputs
        x, collected = apply(nnx.merge(graphdef, layer_state), keep_batch_sharded(x), extra)
        return keep_batch_sharded(x), collected

    depth = len(jax.tree.leaves(state)[0])
    unrolled = remat == "none" and depth <= MOST_UNROLLED
    inputs, unroll = (state, per_layer), depth if unrolled else 1
    return jax.lax.scan(rematerialize(body, remat), x, inputs, unroll=unroll)


def rematerialize(function: Callable, remat: Remat) -> Callable:
    """`function`, recomputed in the backward pass as `remat` says."""
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    policy = None
    if remat == "dots":
        # A policy does not look into functions with a custom gradient: results of `dot` have a
        # name.
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(DOT)
        )
    # Inside a scan nothing can be merged with the forward pass, so the barriers that
    # prevent it are not needed.
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


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
