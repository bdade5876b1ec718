"""Devices that are not here: their names, what a program's text tells, and real compilations."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from htfa_jax.errors import ConfigError
from htfa_jax.kernels import compiler
from htfa_jax.training.topologies import collectives, find

ROOT = Path(__file__).parents[2]

TEXT = """
%all-reduce-scatter.7 (input: bf16[64]) -> bf16[8] {
  %all-reduce.3 = bf16[64] all-reduce(%input), to_apply=%add
}

%body (p: f32[8]) -> f32[8] {
  %ag = f32[64] all-gather(%p), dimensions={0}
  %fusion.7 = bf16[8] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.7
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %ar = f32[] all-reduce(%s), to_apply=%add
  %rs = (f32[64], f32[8]) reduce-scatter-start(%g), dimensions={0}
  %rsd = f32[8] reduce-scatter-done(%rs)
  %cp = f32[8] collective-permute-start(%p)
  %name = f32[8] add(%all-gather.1, %p)
}
"""


def test_communication_is_counted_by_kind():
    assert collectives(TEXT) == {
        "all-gather": 1, "reduce-scatter": 2, "all-reduce": 1, "collective-permute": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["v5e", "v5e:two", "v9:2x2", "h100:2x4", "h100:", "b1:8"])
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(ConfigError, match="neither a TPU slice .* nor GPUs"):
        find(name)


PROGRAM = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from support import tiny
from htfa_jax.training.plan import describe_plan
from htfa_jax.training.topologies import find
wide = {{"decoder__embed_dim": 256, "decoder__mlp_dim": 512, "siglip__embed_dim": 96}}
config = tiny(**wide, level3__generation=False, loss__code_weight=0.0, train__dtype="bfloat16")
target = find("v5e:2x2")
print(describe_plan(config, target))
"""


@pytest.mark.parametrize("options", [compiler.TRAINING, compiler.DECODING])
def test_options_for_gpus_are_some_that_xla_has(options):
    """Which it looks at wherever it compiles."""
    assert jax.jit(lambda x: x + 1, compiler_options=options["gpu"])(1) == 2


needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="compiles for TPUs: needs .[tpu]"
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "preset,topology,limit",
    [
        ("memory_efficient", "v5e:1x1", 16e9),
        ("standard", "v5e:2x4", 15.75 * 2**30),
        ("internlm2_1_8b", "v5e:2x4", 15.75 * 2**30),
        ("internvl2_8b", "v5p:2x2x4", 95 * 2**30),
    ],
)
def test_a_preset_fits(preset, topology, limit):
    """Minutes each: the real training step, with the longest text."""
    command = [sys.executable, str(ROOT / "scripts/plan.py"), "--config", preset]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--topology", topology], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = next(x for x in done.stdout.splitlines() if x.startswith("  peak"))
    assert int(peak.split()[1].replace(",", "")) * 2**20 <= limit, done.stdout


@pytest.mark.slow
@needs_libtpu
def test_zero2_on_a_tpu_scatters_gradients_and_gathers_weights():
    code = PROGRAM.format(tests=str(ROOT / "tests"), root=str(ROOT))
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("collectives"))
    assert "all-gather" in line and ("reduce-scatter" in line or "collective-permute" in line)
    assert "fits" in done.stdout
