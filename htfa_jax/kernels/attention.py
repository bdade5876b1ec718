"""The attention of the whole model: one function, which picks an implementation for every call.

- `splash`: Pallas kernel for TPU, of JAX's own library (a descendant of Dao et al.,
  "FlashAttention", 2022).
- `cudnn`: cuDNN's flash attention, for NVIDIA GPUs.
- `plain`: XLA, for everything else; it holds the weights of a block of queries in memory, the
  kernels do not.

All three compute the softmax in float32; `plain` on a CPU is what the others are tested against.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from htfa_jax.kernels.matmul import float32_einsum
from htfa_jax.sharding import mesh
from htfa_jax.sharding.mesh import BATCH_AXES, Backend

Implementation = Literal["splash", "cudnn", "plain"]


class Kernel(NamedTuple):
    """What a kernel is used for."""

    name: Implementation
    dtypes: tuple[str, ...]
    shortest: int  # of both sequences; below it plain attention is as good
    widest_head: int  # channels, one that hides keys among them


# A backend that is not here has plain attention only. cuDNN's backward pass takes heads of up to
# 128 channels, on Hopper 256; it needs Ampere.
KERNELS = {
    Backend("tpu"): Kernel("splash", ("bfloat16",), 256, 256),
    Backend("gpu", 8): Kernel("cudnn", ("bfloat16", "float16"), 256, 128),
    Backend("gpu", 9): Kernel("cudnn", ("bfloat16", "float16"), 256, 256),
    Backend("gpu", 10): Kernel("cudnn", ("bfloat16", "float16"), 256, 128),
}
# Queries that plain attention takes at a time: few enough for a CPU's caches, elsewhere few enough
# that their weights are a small part of the memory.
QUERIES = {"cpu": 256}
MOST_QUERIES = 1024
# Mesh axes that heads are sharded over.
HEAD_AXES = ("tensor",)
SPLASH_BLOCKS = (512, 384, 256)
# A logit's share of a hidden key: far below any other, and exact in float16 too.
HIDDEN = -(2.0**14)


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = False,
    key_mask_BS: jax.Array | None = None,
    mask_B1TS: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v; N is a multiple of K, consecutive heads share keys.

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      causal: query t attends to keys 0 to t.
      key_mask_BS: keys that may be attended to; None means all. Where none is left the result
        is finite and means nothing.
      mask_B1TS: pairs that may attend, for what the other two cannot say; never a kernel.

    Returns:
      [B, T, N, H]
    """
    if mask_B1TS is None:
        (_, T, _, H), S = q_BTNH.shape, k_BSKH.shape[1]
        # A kernel hides keys by a channel of its own, those of its padding too.
        channels = H + (key_mask_BS is not None or not causal or T > S)
        chosen = implementation_for(mesh.backend(), q_BTNH.dtype, min(T, S), channels)
        if chosen != "plain":
            kernel = functools.partial({"splash": splash, "cudnn": cudnn}[chosen], causal=causal)
            return on_every_device(kernel, q_BTNH, k_BSKH, v_BSKH, key_mask_BS)
    if key_mask_BS is not None:
        key_mask_B11S = key_mask_BS[:, None, None, :]
        mask_B1TS = key_mask_B11S if mask_B1TS is None else mask_B1TS & key_mask_B11S
    return plain(q_BTNH, k_BSKH, v_BSKH, mask_B1TS, causal=causal)


def plain(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_B1TS: jax.Array | None,
    *,
    causal: bool,
) -> jax.Array:
    """Attention by XLA, of a block of queries at a time.

    Of several blocks the backward pass computes the weights again (Rabe and Staats, "Self-attention
    Does Not Need O(n^2) Memory", 2021); causal ones do not look at keys that none of them sees.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    if causal:
        past_11TS = jnp.tril(jnp.ones((1, 1, T, S), bool))
        mask_B1TS = past_11TS if mask_B1TS is None else mask_B1TS & past_11TS
    if mask_B1TS is not None:
        mask_B1TS = jnp.broadcast_to(mask_B1TS, (len(mask_B1TS), 1, T, S))
    block = QUERIES.get(mesh.backend().platform, MOST_QUERIES)
    attend = attend_block if block >= T else jax.checkpoint(attend_block)
    blocks = []
    for start in range(0, T, block):
        end = min(start + block, T)
        seen = min(end, S) if causal else S
        mask = None if mask_B1TS is None else mask_B1TS[:, :, None, start:end, :seen]
        inputs = q_BKGTH[:, :, :, start:end], k_BKSH[:, :, :seen], v_BKSH[:, :, :seen], mask
        blocks.append(attend(*inputs))
    out_BKGTH = jnp.concatenate(blocks, axis=3)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_block(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_B11TS: jax.Array | None
) -> jax.Array:
    """Attention [B, K, G, T, H] of queries in groups that share keys."""
    dtype, on_cpu = v_BKSH.dtype, mesh.backend().platform == "cpu"
    if on_cpu:
        # XLA's CPU matmuls of 16-bit inputs would round the weights to 16 bits, then convert them
        # and the values back to float32: two passes more, and less exact.
        q_BKGTH, k_BKSH, v_BKSH = (x.astype(jnp.float32) for x in (q_BKGTH, k_BKSH, v_BKSH))
    logits_BKGTS = float32_einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
    logits_BKGTS *= q_BKGTH.shape[-1] ** -0.5
    if mask_B11TS is not None:
        logits_BKGTS = jnp.where(mask_B11TS, logits_BKGTS, jnp.finfo(jnp.float32).min)
    highest_BKGT1 = jax.lax.stop_gradient(logits_BKGTS.max(axis=-1, keepdims=True))
    weights_BKGTS = jnp.exp(logits_BKGTS - highest_BKGT1)
    sum_BKGT1 = weights_BKGTS.sum(axis=-1, keepdims=True)
    if on_cpu:
        # Nothing is rounded on the way, so the smaller array is divided: the output, not the
        # weights.
        out_BKGTH = float32_einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH) / sum_BKGT1
    else:
        # The weights are divided before they are rounded. Divided behind the matmul, errors that
        # all keys share would not cancel in the gradients of matmul and sum (0.06 instead of 0.01),
        # and float16 would overflow.
        weights_BKGTS = (weights_BKGTS / sum_BKGT1).astype(dtype)
        out_BKGTH = float32_einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH)
    return out_BKGTH.astype(dtype)


def implementation_for(
    backend: Backend, dtype: jnp.dtype, length: int, head_dim: int
) -> Implementation:
    """The implementation for sequences of at least `length`."""
    kernel = KERNELS.get(backend)
    if kernel is None or jnp.dtype(dtype).name not in kernel.dtypes:
        return "plain"
    return kernel.name if length >= kernel.shortest and head_dim <= kernel.widest_head else "plain"


def on_every_device(
    kernel: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    key_mask_BS: jax.Array | None,
) -> jax.Array:
    """Runs a kernel over the ambient mesh, each device on its own samples and heads.

    The compiler does not divide kernels. What an axis does not divide is computed on all of it.
    """
    around = jax.sharding.get_abstract_mesh()
    axes = [name for name in around.axis_names if name not in around.manual_axes]
    if not axes:
        return kernel(q_BTNH, k_BSKH, v_BSKH, key_mask_BS)

    def dividing(names: tuple[str, ...], size: int) -> tuple[str, ...]:
        found = ()
        for name in names:
            if name in axes and size % around.shape[name] == 0:
                found, size = (*found, name), size // around.shape[name]
        return found

    batch = dividing(BATCH_AXES, q_BTNH.shape[0])
    spec = PartitionSpec(batch, None, dividing(HEAD_AXES, k_BSKH.shape[2]), None)
    run = jax.shard_map(
        kernel,
        in_specs=(spec, spec, spec, PartitionSpec(batch)),
        out_specs=spec,
        axis_names=set(axes),
        check_vma=False,  # Pallas calls do not say over which axes their results vary
    )
    return run(q_BTNH, k_BSKH, v_BSKH, key_mask_BS)


def splash(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    key_mask_BS: jax.Array | None,
    *,
    causal: bool,
) -> jax.Array:
    """Attention by the Pallas kernel, sequences padded to whole blocks."""
    (_, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    block_T, block_S = (min(SPLASH_BLOCKS, key=lambda block: -size % block) for size in (T, S))
    q, k, v = padded(q_BTNH, k_BSKH, v_BSKH, key_mask_BS, causal, (block_T, block_S, 1))
    mask = splash_attention.CausalMask if causal else splash_attention.FullMask
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask((q.shape[1], k.shape[1]))] * N),
        block_sizes=splash_attention.BlockSizes(
            block_q=block_T,
            block_kv=block_S,
            block_q_dkv=block_T,
            block_kv_dkv=block_S,
            block_q_dq=block_T,
            block_kv_dq=block_S,
        ),
    )
    q *= jnp.asarray(H**-0.5, q.dtype)  # the kernel does not scale
    out_BNTH = jax.vmap(kernel)(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))
    return out_BNTH.swapaxes(1, 2)[:, :T]


def cudnn(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    key_mask_BS: jax.Array | None,
    *,
    causal: bool,
) -> jax.Array:
    """Attention by cuDNN, lengths made even and the head size a multiple of 8."""
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    q, k, v = padded(q_BTNH, k_BSKH, v_BSKH, key_mask_BS, causal, (2, 2, 8))
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, q.shape[3] - H)])
    out = jax.nn.dot_product_attention(
        q, k, v, scale=H**-0.5, is_causal=causal, implementation="cudnn"
    )
    return out[:, :T, :, :H]


def padded(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    key_mask_BS: jax.Array | None,
    causal: bool,
    multiples: tuple[int, int, int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v padded to multiples of T, S and (q and k only) H.

    Keys that may not be attended to, those of the padding among them, get one more channel that
    pushes their logits down. It costs next to nothing and needs no mask from the kernels, of
    which each has another kind; behind a causal mask no query that counts sees the padding.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    pad_T, pad_S = -T % multiples[0], -S % multiples[1]
    if key_mask_BS is None and pad_S and not (causal and T <= S):
        key_mask_BS = jnp.ones(k_BSKH.shape[:2], bool)
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
        for x, pad in ((q_BTNH, pad_T), (k_BSKH, pad_S), (v_BSKH, pad_S))
    )
    if key_mask_BS is not None:
        shown_BS = jnp.pad(key_mask_BS, ((0, 0), (0, pad_S)))
        channel_BS11 = jnp.where(shown_BS, 0, HIDDEN).astype(k.dtype)[:, :, None, None]
        q = jnp.concatenate([q, jnp.ones_like(q[..., :1])], axis=3)
        k = jnp.concatenate([k, jnp.broadcast_to(channel_BS11, k[..., :1].shape)], axis=3)
    pad_H = [(0, 0)] * 3 + [(0, -q.shape[3] % multiples[2])]
    return jnp.pad(q, pad_H), jnp.pad(k, pad_H), v
