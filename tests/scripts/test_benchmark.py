"""The benchmark: its batch, its figures, and what it must not import."""

import json
import subprocess
import sys

import benchmark
import numpy as np
import pytest
from benchmarks import sides
from support import tiny

from htfa_jax.config import load_config
from htfa_jax.config.io import save_config
from htfa_jax.errors import TrainingError
from htfa_jax.models import flops
from htfa_jax.training.plan import abstract_batch


def test_the_random_batch_is_a_batch_with_boxes_inside():
    config = tiny(train__batch_size=3, train__accumulation_steps=2)
    arrays = sides.random_arrays(config, 64)
    expected = abstract_batch(config, 6, 64)
    kinds = {name: (x.shape, x.dtype) for name, x in vars(expected).items() if x is not None}
    assert {name: (x.shape, x.dtype) for name, x in arrays.items()} == kinds
    for frame in ("orig", "recon"):
        x, y, w, h = arrays[f"bbox_{frame}"].T
        assert (w > 0).all() and (h > 0).all() and len(set(w)) > 1
        assert (x + w <= config.image_size).all() and (y + h <= config.image_size).all()
    inside = arrays["object_mask"][0]
    x, y, w, h = arrays["bbox_orig"][0].astype(int)
    assert inside[y : y + h, x : x + w].all() and inside.sum() == w * h


@pytest.mark.slow
def test_figures_of_both_sides_fit_together(tmp_path, capsys, monkeypatch):
    """Both start from the same weights, so that their first losses agree."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # the sides compile by themselves
    save_config(tiny(), tmp_path / "config.json")
    output = tmp_path / "figures.json"
    benchmark.main(
        ["--config", str(tmp_path / "config.json"), "--against", "torch", "--repeats", "2"]
        + ["--steps", "2", "--text_length", "40", "--threads", "1", "--output", str(output)]
    )
    figures = json.loads(output.read_text())
    ours, theirs = figures["jax"], figures["torch"]
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], abs=1e-4)
    assert len(ours["step_seconds"]) == len(theirs["step_seconds"]) == 2
    assert ours["samples_per_second"] == pytest.approx(2 / ours["median_step_seconds"])
    as_configured = tiny(pretrained__random_components="as_configured")
    per_sample = sum(flops.training_step(as_configured, 40).values())
    achieved = per_sample * ours["samples_per_second"]
    assert ours["utilisation"] == pytest.approx(achieved / ours["matmul_flops_per_second"])
    ratios = figures["ours_over_torch"]
    assert ratios["samples_per_second_of_each_pair"] == pytest.approx(
        [b / a for a, b in zip(ours["step_seconds"], theirs["step_seconds"], strict=True)]
    )
    assert ratios["peak_bytes"] == ours["peak_bytes"] / theirs["peak_bytes"]
    for side in (ours, theirs):
        assert 5e7 < side["peak_bytes"] < 5e9
    shown = capsys.readouterr().out
    assert "jax / torch" in shown and "utilisation" in shown and "1 cores" in shown


def dies(pipe):
    """A side that ends before it says anything."""
    sys.exit(7)


@pytest.mark.slow
def test_a_side_that_dies_is_an_error_with_its_exit_code():
    with pytest.raises(TrainingError, match="the torch side ended with exit code 7"):
        benchmark.Side("torch", dies)


@pytest.mark.slow
def test_ours_needs_neither_pytorch_nor_the_data_pipeline():
    program = (
        "import sys, benchmark; assert not {'jax', 'torch'} & set(sys.modules);"
        "import htfa_jax.training.plan, htfa_jax.training.step, htfa_jax.models.flops;"
        "print({'torch', 'transformers', 'grain', 'orbax'} & set(sys.modules))"
    )
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "set()\n", done.stdout + done.stderr


@pytest.mark.slow
def test_the_peak_can_be_started_again():
    before = sides.peak_resident()
    block = np.ones(2**25)
    high = sides.peak_resident()
    del block
    sides.forget_peak()
    assert high > before + 2**27
    if sys.platform == "linux":
        assert sides.peak_resident() < high - 2**27


@pytest.mark.parametrize("name", ["small", "quarter"])
def test_configurations_to_compare_with_load(name):
    folder = benchmark.Path(benchmark.__file__).parent / "benchmarks" / "configs"
    config = load_config(folder / f"{name}.py")
    head_dim = config.decoder.embed_dim // config.decoder.num_heads
    assert config.train.dtype == "float32" and head_dim in (64, 128)
