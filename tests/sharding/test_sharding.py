"""One device is the reference: whatever the mesh and the mode, training computes the same.

Steps on 8 virtual devices run in processes of their own (`sharded_steps.py`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support import tiny

from htfa_jax.common.param_paths import split
from htfa_jax.config import Config, override
from htfa_jax.errors import ConfigError
from htfa_jax.models.factory import build_model
from htfa_jax.sharding.layout import MIN_SIZE, Layout, make_mesh, parameter_spec
from htfa_jax.sharding.processes import Distributed
from htfa_jax.training.optim import frozen_pattern

FOLDER = Path(__file__).parents[1]


def run(*cases):
    """What `sharded_steps.py` finds, by case."""
    env = {**os.environ, "PYTHONPATH": f"{FOLDER}:{FOLDER.parent}"}
    command = [sys.executable, str(FOLDER / "sharded_steps.py"), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


# The other cases of `sharded_steps.py` are those that a checkpoint takes a run through.
CASES = ["replicated", "zero2 data", "fsdp"]


@pytest.mark.slow
def test_every_mode_and_mesh_trains_as_one_device_does():
    """Losses and gradient norms of 5 steps, float32; only the order of sums differs."""
    found = run("one", *CASES, "restored")
    expected = np.array(found["one"])
    assert np.ptp(expected[:, 0]) > 0.1  # something is learned
    for case in CASES:
        np.testing.assert_allclose(found[case], expected, rtol=2e-5, err_msg=case)
    for case, after in found["restored"].items():
        assert after["same"] and after["places"], case
        np.testing.assert_allclose(after["steps"], expected, rtol=2e-5, err_msg=case)


@pytest.mark.slow
def test_8_bit_moments_lie_as_their_parameters_and_are_the_same_on_every_mesh():
    """Random bits are; a sum in another order may make a value round otherwise."""
    found = run("codes")["codes"]
    assert found["differ"] < 1e-4
    for path, (param, mu, nu, *scales) in found["parts"].items():
        assert mu == nu == param, path
        assert scales == [[*param[:-1], 1]] * 2, path


@pytest.mark.slow
def test_8_bit_moments_train_as_on_one_device():
    """First on 8 devices, then through a checkpoint on one."""
    found = run("8 bits")["8 bits"]
    expected = np.array(found["one"])
    assert np.ptp(expected[:, 0]) > 0.1
    after = found["restored"]["one"]
    assert after["same"] and after["places"]
    np.testing.assert_allclose(after["steps"], expected, rtol=1e-4)


@pytest.mark.slow
def test_memory_falls_as_the_modes_promise():
    found = run("memory")["memory"]
    whole = found["replicated"]
    for mode in ("zero2", "fsdp"):
        for kind in ("trained weights", "optimizer state"):
            assert found[mode][kind] == pytest.approx(whole[kind] / 8, rel=0.03), (mode, kind)
        # A device has both images of its samples, and SigLIP sees them together.
        assert found[mode]["sent images"] == []
    assert found["zero2"]["copy"] == whole["copy"]
    assert found["fsdp"]["copy"] == pytest.approx(whole["copy"] / 8, rel=0.03)
    # Accumulated gradients are float32, as the weights are; 7 of 8 parts are gone.
    gone = whole["temporary"] - found["zero2"]["temporary"]
    assert gone > 0.9 * 7 / 8 * whole["trained weights"]
    assert found["fsdp"]["temporary"] < found["zero2"]["temporary"] - 0.5 * whole["copy"]


@pytest.mark.parametrize("fsdp,tensor", [(8, 1), (16, 1), (4, 4)])
def test_every_large_parameter_of_the_standard_model_is_cut(fsdp, tensor):
    config = override(Config(), {"pretrained.random_components": "as_configured"})
    mesh = {"data": 2, "fsdp": fsdp, "tensor": tensor}
    _, trainable = split(build_model(config).shapes, frozen_pattern(config))
    for path, shape in trainable.items():
        spec = parameter_spec(path, shape.shape, mesh)
        parts = 1
        for i, (entry, dim) in enumerate(zip(spec, shape.shape, strict=True)):
            axes = [entry] if isinstance(entry, str) else list(entry or ())
            cut = int(np.prod([mesh[axis] for axis in axes]))
            assert dim % cut == 0, path
            assert cut == 1 or i or ".layers." not in path, f"{path} is cut between layers"
            parts *= cut
        in_tensor = path.startswith("decoder.") and path.endswith(("kernel", "embedding"))
        expected = fsdp * (tensor if in_tensor else 1)
        assert parts == (expected if shape.size >= MIN_SIZE else 1), path


def test_heads_and_hidden_units_are_sharded_where_they_meet():
    """What a matrix of columns gives is what a matrix of rows takes."""
    mesh = {"data": 1, "fsdp": 2, "tensor": 4}

    def spec(path, *shape):
        return parameter_spec(f"decoder.layers.{path}", (3, *shape), mesh)

    assert spec("attention.q_proj.kernel", 64, 128) == [None, "fsdp", "tensor"]
    assert spec("attention.o_proj.kernel", 128, 64) == [None, "tensor", "fsdp"]
    assert spec("gate_proj.kernel", 64, 256) == [None, "fsdp", "tensor"]
    assert spec("down_proj.kernel", 256, 64) == [None, "tensor", "fsdp"]
    assert spec("norm1.scale", 1024) == [None, "fsdp"]
    assert parameter_spec("siglip.layers.fc1.bias", (3, 4096), mesh)[1] == ("tensor", "fsdp")
    assert parameter_spec("siglip.layers.fc1.bias", (3, 100), mesh) == [None, "tensor"]
    assert parameter_spec("decoder.embed.embedding", (640, 64), mesh) == [None, ("tensor", "fsdp")]
    # Nothing of level 1 to 3 is cut by the tensor axis.
    assert parameter_spec("level2.q_proj.kernel", (128, 128), mesh) == [None, "fsdp"]


def test_a_dimension_that_does_not_divide_is_left_for_another():
    mesh = {"data": 1, "fsdp": 8, "tensor": 1}
    assert parameter_spec("level3.a.kernel", (100, 64), mesh) == [None, "fsdp"]
    assert parameter_spec("level3.a.kernel", (101, 63), mesh) == [None, None]
    spec = parameter_spec("decoder.layers.down_proj.kernel", (8, 64, 63), mesh)
    assert spec == [None, ("tensor", "fsdp"), None]


class Device:
    """As much of a device as counting needs."""


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"data": 2, "fsdp": 4}, "1 devices do not fill"),
        ({"fsdp": -1, "tensor": 3}, "must be the number of devices"),
        ({"data": -1}, "sharding.data and sharding.fsdp are both -1"),
        ({"fsdp": 0}, "sharding.fsdp=0 must be above 0"),
        ({"fsdp": -2}, "sharding.fsdp=-2 must not be negative"),
    ],
)
def test_a_mesh_that_cannot_be_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(tiny(**{f"sharding__{k}": v for k, v in settings.items()}), jax.devices()[:1])


def test_the_tensor_axis_must_divide_heads(monkeypatch):
    config = tiny(sharding__tensor=2)
    with pytest.raises(ConfigError, match="siglip.num_heads=3 must be a multiple of .*tensor=2"):
        make_mesh(config, [Device(), Device()])


def test_many_devices_are_cut_into_sixteenths(monkeypatch):
    made = {}
    monkeypatch.setattr(jax, "make_mesh", lambda shape, axes, **_: made.update(shape=shape))
    for devices, shape in ((8, (1, 8, 1)), (32, (1, 32, 1)), (256, (16, 16, 1)), (40, (1, 40, 1))):
        make_mesh(tiny(), [Device()] * devices)
        assert made["shape"] == shape
    make_mesh(tiny(sharding__data=4), [Device()] * 256)
    assert made["shape"] == (4, 64, 1)


def test_one_process_loads_everything():
    assert Layout(tiny(), jax.devices()[:1]).process_share == (0, 1)


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    Distributed().connect()
    with pytest.raises(ConfigError, match="give all three"):
        Distributed(coordinator="localhost:1234", num_processes=2).connect()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NUM_TASKS=8 .*--distributed.auto"):
        Distributed().connect()
