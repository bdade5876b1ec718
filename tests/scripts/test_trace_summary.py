"""Sums over a recorded program: a real one, and closed forms."""

import jax
import jax.numpy as jnp
import pytest
from benchmarks import trace_summary
from benchmarks.trace_summary import Operation, busy, kind, operations, summary

from htfa_jax.errors import DataError


def test_a_real_trace(tmp_path, capsys):
    """Of three large products and little else the products take most of the time."""
    step = jax.jit(lambda x: jnp.tanh(x @ x @ x) @ x)
    x = jnp.ones((512, 512))
    step(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(4):
            step(x).block_until_ready()
    (ran,) = operations(tmp_path).values()
    total = sum(op.duration for op in ran)
    assert sum(op.duration for op in ran if kind(op.name) == "matmul") > 0.5 * total
    trace_summary.main([str(tmp_path)])
    assert "| matmul |" in capsys.readouterr().out


def test_no_trace_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        trace_summary.main([str(tmp_path)])
    assert stopped.value.code == 2 and "holds no trace" in capsys.readouterr().err
    with jax.profiler.trace(str(tmp_path)):
        pass
    with pytest.raises(DataError, match="no compiled operation ran"):
        operations(tmp_path)


def test_time_that_overlaps_counts_once():
    ran = [
        Operation("a", 10, 10),
        Operation("b", 15, 10),
        Operation("c", 16, 2),
        Operation("d", 40, 5),
    ]
    assert busy(ran) == 20
    assert "busy 0.0 of 0.0 ms" in summary("gpu", ran, 3)


def test_shares_and_names():
    ran = [
        Operation("gemm_fusion.12", 0, 3e6),
        Operation("gemm_fusion.7", 3e6, 3e6),
        Operation("loop_add_fusion", 6e6, 2e6),
    ]
    table = summary("gpu", ran, 2)
    assert "busy 8.0 of 8.0 ms" in table
    assert "| matmul | 6.00 | 0.750 |" in table
    assert "| gemm_fusion | 2 | 6.00 | 0.750 |" in table


@pytest.mark.parametrize(
    "name,expected",
    [
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "communication"),
        ("reduce-scatter-start.3", "communication"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "convolution"),
        ("input_reduce_fusion.4", "sums and norms"),
        ("loop_multiply_fusion", "elementwise and other"),
        ("loop_convert_fusion", "elementwise and other"),
        ("MemcpyD2D", "copy"),
    ],
)
def test_kinds_of_kernels(name, expected):
    assert kind(name) == expected
