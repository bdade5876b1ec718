"""Training as users compile it: with XLA's optimisations, which the other tests do without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import tiny

from htfa_jax.config import override
from htfa_jax.config.io import save_config

ROOT = Path(__file__).parents[2]
# Of conftest.py, for quick compilation. JAX reads the first as a flag that is there or not.
QUICK = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")


def losses(workdir, config, env):
    """Loss and gradient norm of every step of a run."""
    command = [sys.executable, "-m", "htfa_jax.train", "--config", config, "--workdir", workdir]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = map(json.loads, (workdir / "logs/metrics.jsonl").read_text().splitlines())
    return [(r["train/loss"], r["train/grad_norm"]) for r in rows if "train/loss" in r]


@pytest.mark.slow
def test_optimized_programs_train_as_the_tests_programs_do(dataset, tmp_path):
    settings = {
        "data.train": str(dataset),
        "data.cache_dir": str(tmp_path / "cache"),
        "pretrained.random_components": "as_configured",
        "train.max_steps": 4,
        "train.log_every": 1,
    }
    save_config(override(tiny(), settings), tmp_path / "config.json")
    quick = {**os.environ, "PYTHONPATH": str(ROOT)}
    optimized = {name: value for name, value in quick.items() if name not in QUICK}
    assert len(optimized) < len(quick)
    expected, found = (
        losses(tmp_path / name, tmp_path / "config.json", env)
        for name, env in (("quick", quick), ("optimized", optimized))
    )
    assert len(found) == 4 and found[0] != found[3]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
