"""Two processes of 4 virtual devices train as one process of 8 does, and can take turns."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import tiny

from htfa_jax.config import override
from htfa_jax.config.io import save_config

ROOT = Path(__file__).parents[2]
STEPS = 4


def start(workdir, config, devices, *options):
    flags = os.environ.get("XLA_FLAGS", "")
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "htfa_jax.train", "--config", str(config)]
    command += ["--workdir", str(workdir), *options]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes):
    """Output of each; fails with all of them if one failed."""
    outputs = [p.communicate(timeout=600)[0] for p in processes]
    assert not any(p.returncode for p in processes), "\n".join(o[-3000:] for o in outputs)
    return outputs


def pair(workdir, config, *flags):
    """Two processes of 4 devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        start(
            workdir, config, 4, "--distributed.coordinator", address,
            "--distributed.num_processes", "2", "--distributed.process_id", str(i), *flags,
        )
        for i in range(2)
    ]  # fmt: skip
    return finish(*processes)


def logged(workdir):
    """Loss and gradient norm by step, and the validation loss."""
    lines = (workdir / "logs/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    names = ("train/loss", "train/grad_norm", "validation/loss")
    return {(row["step"], name): row[name] for row in rows for name in names if name in row}


@pytest.fixture(scope="module")
def config(dataset, tmp_path_factory):
    """Parts that train, parts that do not, and nothing that only one sample's numbers pass."""
    folder = tmp_path_factory.mktemp("multihost")
    settings = {
        "data.train": str(dataset),
        "data.validation": str(dataset),
        "data.cache_dir": str(folder / "cache"),
        "pretrained.random_components": "as_configured",
        "vq.has_decoder": False,
        "level2.alignment": "none",
        "sharding.mode": "fsdp",
        "train.batch_size": 1,
        "train.max_steps": STEPS,
        "train.log_every": 1,
        "train.save_every": 2,
        "eval.during_training": "no",
        "eval.batch_size": 1,
        "optim.schedule": "constant",
    }
    path = folder / "config.json"
    save_config(override(tiny(), settings), path)
    return path


@pytest.mark.slow
def test_two_processes_train_as_one_and_take_turns_with_it(config, tmp_path):
    finish(start(tmp_path / "one", config, 8))
    first, second = pair(tmp_path / "two", config)
    expected, found = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert {step for step, _ in expected} == {1, 2, 3, 4} and found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=str(key))
    # Only the first process talks and writes.
    assert "finished" in first and "train step 4/4" in first
    assert "train step" not in second
    scores = [
        json.loads((tmp_path / run / "evaluation/validation/metrics.json").read_text())
        for run in ("one", "two")
    ]
    assert scores[0]["samples"] == scores[1]["samples"] == 7
    assert scores[1]["losses"]["loss"] == pytest.approx(scores[0]["losses"]["loss"], rel=1e-5)

    # What two processes saved one goes on with, and the other way round.
    longer = ["--config.train.max_steps=6", "--config.sharding.mode=zero2"]
    longer += ["--config.data.validation=None"]  # which both have shown
    finish(start(tmp_path / "two", config, 8, *longer))
    pair(tmp_path / "one", config, *longer)
    ahead, behind = logged(tmp_path / "two"), logged(tmp_path / "one")
    assert (6, "train/loss") in ahead
    for key, value in ahead.items():
        np.testing.assert_allclose(behind[key], value, rtol=1e-5, err_msg=str(key))
