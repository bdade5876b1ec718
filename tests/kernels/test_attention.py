"""Attention: every implementation against the formula in PyTorch, and which one is chosen."""

import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import compile_as_for, product_types

from htfa_jax.kernels import attention as module
from htfa_jax.kernels.attention import attention, implementation_for
from htfa_jax.sharding.mesh import Backend, backend

TPU, HOPPER = Backend("tpu"), Backend("gpu", 9)


def random(B=2, T=9, S=9, N=6, K=2, H=5, dtype=jnp.float32):
    """Queries, keys, values and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def formula(q, k, v, cotangent, allowed_BTS):
    """Result and gradients of q, k and v by the definition, in float64."""
    q, k, v, cotangent = (torch.tensor(np.asarray(x, np.float64)) for x in (q, k, v, cotangent))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    logits = torch.einsum("btnh,bsnh->bnts", q, k) / q.shape[3] ** 0.5
    hidden = ~torch.tensor(np.asarray(allowed_BTS))[:, None]
    weights = torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1)
    out = torch.einsum("bnts,bsnh->btnh", weights, v)
    return out.detach(), *torch.autograd.grad((out * cotangent).sum(), inputs)


def agrees(function, inputs, allowed_BTS, tolerance):
    """Whether a function of q, k and v and its gradients are the formula's."""
    q, k, v, cotangent = inputs

    @jax.jit
    def both(q, k, v):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(cotangent)

    for ours, expected in zip(both(q, k, v), formula(*inputs, allowed_BTS), strict=True):
        scale = float(abs(expected).max())
        np.testing.assert_allclose(
            np.asarray(ours, np.float64) / scale, expected / scale, atol=tolerance
        )


def mask_keys(B, S):
    """A random mask that leaves every row a key."""
    return jax.random.bernoulli(jax.random.key(7), 0.6, (B, S)).at[:, 3].set(True)


def allowed(B, T, S, causal, key_mask_BS):
    pairs_BTS = (
        np.ones((B, T, S), bool) if key_mask_BS is None else np.asarray(key_mask_BS)[:, None]
    )
    return np.broadcast_to(pairs_BTS & (np.tri(T, S, dtype=bool) if causal else True), (B, T, S))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("K", [1, 2, 6])
def test_plain_attention_is_the_formula(causal, masked, K):
    T, S = 9, 11
    inputs = random(T=T, S=S, K=K)
    key_mask_BS = mask_keys(2, S).at[:, 0].set(True) if masked else None
    run = functools.partial(attention, causal=causal, key_mask_BS=key_mask_BS)
    agrees(run, inputs, allowed(2, T, S, causal, key_mask_BS), 1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(9, 11), (11, 9)])
def test_blocks_of_queries_are_the_formula(T, S, causal, masked, monkeypatch):
    monkeypatch.setitem(module.QUERIES, "cpu", 4)
    key_mask_BS = mask_keys(2, S).at[:, 0].set(True) if masked else None
    run = functools.partial(attention, causal=causal, key_mask_BS=key_mask_BS)
    agrees(run, random(T=T, S=S), allowed(2, T, S, causal, key_mask_BS), 1e-5)


def test_a_block_does_without_the_keys_behind_it_and_keeps_no_weights(monkeypatch):
    monkeypatch.setitem(module.QUERIES, "cpu", 64)
    q, k, v, _ = random(T=256, S=256, N=1, K=1, H=8)
    run = functools.partial(attention, causal=True)
    kept = jax.tree.leaves(jax.vjp(run, q, k, v)[1])
    assert max(x.size for x in kept if x.dtype == jnp.float32) == q.size
    flops = jax.jit(run).lower(q, k, v).compile().cost_analysis()["flops"]
    full = jax.jit(attention).lower(q, k, v).compile().cost_analysis()["flops"]
    assert flops < 0.7 * full  # 10 of 16 blocks


def test_all_products_of_plain_attention_are_in_the_type_of_the_computation(monkeypatch):
    compile_as_for(monkeypatch, HOPPER)
    q, k, v, cotangent = random(H=264, dtype=jnp.bfloat16)
    # What all keys share falls out of the gradients, and errors that they share would stay.
    inputs = [q, k + 1, v + 5]
    agrees(attention, [*inputs, cotangent], np.ones((2, 9, 9), bool), 2e-2)

    def both(*inputs):
        out, pull = jax.vjp(attention, *inputs)
        return out, *pull(cotangent)

    program = jax.jit(both).lower(*inputs).as_text()
    assert product_types(program) == [["bf16", "bf16"]] * 6


def test_a_mask_of_pairs_goes_with_a_mask_of_keys():
    pairs_BTS = jax.random.bernoulli(jax.random.key(3), 0.5, (2, 9, 9)).at[:, :, 3].set(True)
    key_mask_BS = mask_keys(2, 9)
    run = functools.partial(attention, mask_B1TS=pairs_BTS[:, None], key_mask_BS=key_mask_BS)
    agrees(run, random(), pairs_BTS & key_mask_BS[:, None], 1e-5)


@pytest.fixture
def interpreted(monkeypatch):
    """Splash, interpreted: it has no other form on a CPU."""
    make = module.splash_attention.make_splash_mha_single_device
    monkeypatch.setattr(
        module.splash_attention,
        "make_splash_mha_single_device",
        functools.partial(make, interpret=True),
    )
    return module.splash


@pytest.fixture
def imitated(monkeypatch):
    """cuDNN's call, done by XLA after a check that cuDNN would take it."""
    plain = jax.nn.dot_product_attention

    def call(q, k, v, *, scale, is_causal, implementation):
        assert implementation == "cudnn"
        assert q.shape[1] % 2 == k.shape[1] % 2 == q.shape[3] % 8 == 0
        assert k.shape == v.shape
        return plain(q, k, v, scale=scale, is_causal=is_causal)

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    return module.cudnn


@pytest.mark.parametrize("kernel", ["interpreted", "imitated"])
@pytest.mark.parametrize(
    ("T", "S", "causal", "masked"),
    [
        (273, 273, True, False),
        (259, 301, False, False),
        (259, 301, False, True),
        (301, 259, True, False),
        (301, 259, True, True),
    ],
)
def test_kernels_are_the_formula(kernel, T, S, causal, masked, request):
    """Head size 72, shared keys, lengths that no block divides."""
    inputs = random(T=T, S=S, N=2, K=1, H=72)
    key_mask_BS = mask_keys(2, S).at[:, 0].set(True) if masked else None
    run = functools.partial(request.getfixturevalue(kernel), key_mask_BS=key_mask_BS, causal=causal)
    agrees(run, inputs, allowed(2, T, S, causal, key_mask_BS), 1e-5)


@pytest.mark.parametrize(("kernel", "device"), [("interpreted", TPU), ("imitated", HOPPER)])
def test_kernels_in_bfloat16_through_the_table(kernel, device, request, monkeypatch):
    run = request.getfixturevalue(kernel)
    used = []
    compile_as_for(monkeypatch, device)
    monkeypatch.setattr(module, run.__name__, lambda *x, **y: (used.append(1), run(*x, **y))[1])
    inputs = random(T=257, S=257, N=2, K=1, H=72, dtype=jnp.bfloat16)
    key_mask_BS = mask_keys(2, 257)
    run_all = functools.partial(attention, key_mask_BS=key_mask_BS)
    agrees(run_all, inputs, allowed(2, 257, 257, False, key_mask_BS), 0.02)
    assert used


def test_a_mask_of_pairs_never_meets_a_kernel(monkeypatch):
    q, k, v, _ = random(T=256, S=256, dtype=jnp.bfloat16)
    compile_as_for(monkeypatch, HOPPER)
    attention(q, k, v, mask_B1TS=jnp.ones((2, 1, 256, 256), bool))
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        attention(q, k, v)


def test_in_float16_neither_sums_nor_their_gradients_leave_its_range(monkeypatch):
    """Of 1024 equal weights; heads that are too wide for a kernel."""
    compile_as_for(monkeypatch, HOPPER)
    q, k, v, cotangent = random(T=8, S=1024, N=1, K=1, H=264, dtype=jnp.float16)
    v = jnp.full_like(v, 100.0)
    out, pull = jax.vjp(attention, 0 * q, k, v)
    np.testing.assert_allclose(out, v[:, :8], rtol=1e-3)
    small = jnp.full_like(cotangent, 1e-4)
    np.testing.assert_allclose(pull(small)[2], 8e-4 / 1024, rtol=0.1)


@pytest.mark.parametrize("kernel", ["interpreted", "imitated", None])
def test_a_row_without_keys_is_finite(kernel, request):
    run = request.getfixturevalue(kernel) if kernel else attention
    q, k, v, cotangent = random(T=256, S=256, N=1, K=1, H=8)
    key_mask_BS = jnp.array([[True], [False]]) & jnp.ones((2, 256), bool)
    run = functools.partial(run, key_mask_BS=key_mask_BS, causal=False)
    out, pull = jax.vjp(run, q, k, v)
    assert all(np.isfinite(x).all() for x in (out, *pull(cotangent)))


@pytest.mark.parametrize(
    ("device", "dtype", "length", "channels", "expected"),
    [
        (Backend("tpu"), "bfloat16", 1024, 73, "splash"),  # SigLIP
        (Backend("tpu"), "bfloat16", 1904, 128, "splash"),  # decoder
        (Backend("tpu"), "bfloat16", 1024, 145, "splash"),  # Level 2
        (Backend("tpu"), "bfloat16", 784, 513, "plain"),  # tokenizer
        (Backend("tpu"), "bfloat16", 1, 128, "plain"),  # decoding
        (Backend("tpu"), "float32", 1024, 73, "plain"),
        (Backend("tpu"), "float16", 1024, 73, "plain"),
        (Backend("gpu", 9), "bfloat16", 1024, 145, "cudnn"),
        (Backend("gpu", 9), "float16", 1904, 128, "cudnn"),
        (Backend("gpu", 9), "float32", 1904, 128, "plain"),
        (Backend("gpu", 9), "bfloat16", 255, 128, "plain"),
        (Backend("gpu", 9), "bfloat16", 784, 513, "plain"),
        (Backend("gpu", 8), "bfloat16", 1024, 73, "cudnn"),
        (Backend("gpu", 8), "bfloat16", 1024, 145, "plain"),
        (Backend("gpu", 10), "bfloat16", 1024, 145, "plain"),
        (Backend("gpu", 7), "float16", 1024, 73, "plain"),  # T4: older than cuDNN's kernels
        (Backend("gpu", 0), "bfloat16", 1024, 73, "plain"),  # AMD
        (Backend("cpu"), "bfloat16", 1024, 73, "plain"),
    ],
)
def test_choice(device, dtype, length, channels, expected):
    assert implementation_for(device, jnp.dtype(dtype), length, channels) == expected


def test_the_mesh_says_what_the_code_will_run_on(monkeypatch):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    seen = []

    @jax.jit
    def traced(x):
        seen.append(backend())
        return x

    traced(1.0)
    with jax.set_mesh(mesh):
        traced(1.0)
    assert seen == [TPU, Backend("cpu")]


@pytest.mark.parametrize(("here", "expected"), [("9.0", 9), ("7.5", 7), ("gfx90a", 0), (None, 8)])
def test_a_gpu_is_told_by_its_generation(here, expected, monkeypatch):
    gpu = SimpleNamespace(platform="gpu", compute_capability=here)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu] if here else [])
    assert backend() == Backend("gpu", expected)


ON_A_MESH = """
import functools, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import test_attention as t
from htfa_jax.kernels import attention as module

jax.config.update("jax_disable_most_optimizations", True)
kernel, seen = module.splash, set()
def splash(q, k, v, mask, *, causal):
    seen.add((q.shape, k.shape))
    return kernel(q, k, v, mask, causal=causal)
module.splash, module.mesh.backend = splash, lambda: module.Backend("tpu")
make = module.splash_attention.make_splash_mha_single_device
module.splash_attention.make_splash_mha_single_device = functools.partial(make, interpret=True)

def layers(q, k, v, mask):
    def body(x, _):
        return jax.checkpoint(lambda x: module.attention(x, k, v, key_mask_BS=mask))(x), None
    return jax.lax.scan(body, q, length=1)[0]

mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
for B, local in ((4, (1, 256, 2, 24)), (6, (3, 256, 2, 24))):
    inputs = t.random(B=B, T=256, S=256, N=4, K=2, H=24, dtype=jnp.bfloat16)
    mask = t.mask_keys(B, 256)
    seen.clear()
    with jax.set_mesh(mesh):
        placed = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
        run = functools.partial(layers, mask=mask)
        t.agrees(run, placed, t.allowed(B, 256, 256, False, mask), 0.02)
    assert {q for q, _ in seen} == {local}, seen
    assert {k for _, k in seen} == {(*local[:2], 1, 24)}, seen
"""


@pytest.mark.slow
def test_every_device_of_a_mesh_has_its_own_samples_and_heads():
    """In a scan with rematerialisation; 6 samples divide by one axis of two only."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = os.pathsep.join(["tests", *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim", "causal"),
    [(1024, 16, 16, 72, False), (1904, 16, 8, 128, True), (1024, 8, 8, 144, False)],
)
def test_compiles_for_a_tpu(length, heads, kv_heads, head_dim, causal, monkeypatch):
    """The three attentions of `standard`, forward and backward, for eight v5e chips."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = jax.make_mesh(
        (2, 4), ("data", "fsdp"), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    split = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    q, k = (
        jax.ShapeDtypeStruct((16, length, n, head_dim), jnp.bfloat16, sharding=split)
        for n in (heads, kv_heads)
    )
    with jax.set_mesh(mesh):
        loss = jax.grad(
            lambda q, k, v: attention(q, k, v, causal=causal).astype(jnp.float32).sum(), (0, 1, 2)
        )
        compiled = jax.jit(loss).lower(q, k, k).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
