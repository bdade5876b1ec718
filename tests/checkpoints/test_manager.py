"""Weight folders and run folders: what is refused, what is kept."""

import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from htfa_jax.checkpoints import integrity, manager, weights
from htfa_jax.checkpoints.manager import Checkpoints, load_frozen, save_frozen
from htfa_jax.checkpoints.runs import find_run
from htfa_jax.config import VQConfig
from htfa_jax.errors import CheckpointError

ARRAYS = {"a.kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(3)}


def state(step):
    return {
        "step": jnp.int32(step),
        "params": {"w": jnp.full(2, float(step))},
        "opt_state": {"m": jnp.zeros(2)},
    }


def test_a_weight_folder_and_back(tmp_path):
    folder = tmp_path / "vq"
    weights.save_component(folder, "vq", VQConfig(), ARRAYS)
    found = weights.load_component(folder, "vq", VQConfig(), ARRAYS)
    for path, value in ARRAYS.items():
        np.testing.assert_array_equal(found[path], value)
    weights.save_component(folder, "vq", VQConfig(stem=2), {"b": np.zeros(2)})  # replaced whole
    assert set(weights.read_weights(folder)) == {"b"}
    assert not list(tmp_path.glob("*.partial"))


def test_a_weight_folder_that_does_not_fit_is_refused_with_both_sides(tmp_path):
    folder = tmp_path / "vq"
    with pytest.raises(CheckpointError, match=r"no config.json in .*expected a weight folder"):
        weights.load_component(folder, "vq", VQConfig(), ARRAYS)
    weights.save_component(folder, "vq", VQConfig(), ARRAYS)
    with pytest.raises(CheckpointError, match=r"stem: 1 in the folder, 2 in the configuration"):
        weights.load_component(folder, "vq", VQConfig(stem=2), ARRAYS)
    with pytest.raises(CheckpointError, match="family: 'vq' in the folder, 'siglip'"):
        weights.load_component(folder, "siglip", VQConfig(), ARRAYS)
    other = {"a.kernel": np.zeros((2, 4)), "a.bia": np.zeros(3)}
    with pytest.raises(CheckpointError) as error:
        weights.load_component(folder, "vq", VQConfig(), other)
    for said in (
        "missing: a.bia (nearest there: a.bias)",
        "not in the model: a.bias",
        "(2, 3)",
        "(2, 4)",
    ):
        assert said in str(error.value), said
    (folder / weights.WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights.load_component(folder, "vq", VQConfig(), ARRAYS)


def test_digests_see_names_values_shapes_and_types():
    base = weights.digest(ARRAYS)
    assert weights.digest(dict(reversed(ARRAYS.items()))) == base
    others = [
        {**ARRAYS, "a.kernel": ARRAYS["a.kernel"] + 1},
        {**ARRAYS, "a.kernel": ARRAYS["a.kernel"].T},
        {**ARRAYS, "a.kernel": ARRAYS["a.kernel"].astype(np.float64)},
        {"b.kernel": ARRAYS["a.kernel"], "a.bias": ARRAYS["a.bias"]},
    ]
    assert len({base, *map(weights.digest, others)}) == 5


def test_frozen_weights_are_kept_once_and_checked(tmp_path):
    frozen = {"vq.codebook": jnp.ones((3, 2)), "siglip.norm.bias": jnp.zeros(4, jnp.bfloat16)}
    names = save_frozen(tmp_path, tiny(), frozen)
    assert set(names) == {"vq", "siglip"}
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert save_frozen(tmp_path, tiny(), frozen) == names
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == written
    found = load_frozen(tmp_path, names)
    for path, value in frozen.items():
        assert found[path].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value))
    other = save_frozen(tmp_path, tiny(), {**frozen, "vq.codebook": jnp.zeros((3, 2))})
    assert other["vq"] != names["vq"] and other["siglip"] == names["siglip"]
    folder = tmp_path / "frozen"
    (folder / names["vq"] / weights.WEIGHTS).write_bytes(
        (folder / other["vq"] / weights.WEIGHTS).read_bytes()
    )
    with pytest.raises(CheckpointError, match="was altered"):
        load_frozen(tmp_path, names)


@pytest.mark.parametrize("mode,best", [("min", 2), ("max", 5)])
def test_the_latest_and_the_best_are_kept(tmp_path, mode, best):
    values = {1: 4.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 5.0, 6: 4.5, 7: None, 8: None}
    with Checkpoints(tmp_path, keep=2, metric="loss", mode=mode) as checkpoints:
        for step, value in values.items():
            metrics = None if value is None else {"loss": value, "other": 0.0}
            checkpoints.save(state(step), {"frozen": {}}, metrics)
    with Checkpoints(tmp_path, keep=2, metric="loss", mode=mode) as checkpoints:
        assert sorted(int(p.name) for p in checkpoints.folder.iterdir()) == [best, 7, 8]
        assert checkpoints.latest_step() == 8 and checkpoints.best_step() == best
        found = checkpoints.restore(best, params=state(0)["params"])
        np.testing.assert_array_equal(found["params"]["w"], [best, best])
        assert found["meta"]["step"] == best


@pytest.mark.parametrize("mode,sign", [("min", 1), ("max", -1)])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_metric_that_is_not_finite_is_the_worst(tmp_path, mode, sign, odd, at):
    values = {step: sign * value for step, value in enumerate((0.5, 0.4, 0.6, 0.7, 0.8), start=1)}
    best = 2 if at != 2 else 1
    values[at] = odd
    with Checkpoints(tmp_path, keep=1, metric="loss", mode=mode) as checkpoints:
        for step, value in values.items():
            checkpoints.save(state(step), {"frozen": {}}, {"loss": value})
            assert checkpoints.best_step() in (1, 2)  # the newest, until there is one to compare
    with Checkpoints(tmp_path, keep=1, metric="loss", mode=mode) as checkpoints:
        assert checkpoints.best_step() == best
    found = integrity.listing(tmp_path)
    assert [s.step for s in found] == [best, 5]
    assert integrity.best(found, "loss", mode).step == best


def test_without_a_finite_metric_the_newest_is_used(tmp_path):
    with Checkpoints(tmp_path, keep=2, metric="loss") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state(step), {"frozen": {}}, {"loss": math.nan})
        assert checkpoints.best_step() == 3
    assert integrity.best(integrity.listing(tmp_path), "loss", "min") is None


def test_a_path_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run: expected config.json"):
        find_run(tmp_path / "nowhere")
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    assert find_run(tmp_path) == (tmp_path, None)
    assert find_run(tmp_path / "checkpoints" / "12") == (tmp_path, 12)


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_damaged_one(tmp_path, monkeypatch):
    """It is moved away whole, and its files are deleted there."""
    left = []
    real = shutil.rmtree

    def killed(folder, **how):
        left.extend(path.name for path in Path(folder).glob("*"))

    with Checkpoints(tmp_path, keep=1) as kept:
        for step in (1, 2):
            kept.save(state(step), {})
        monkeypatch.setattr(manager.shutil, "rmtree", killed)
    assert left == ["1"] and integrity.steps(tmp_path) == [2]
    monkeypatch.setattr(manager.shutil, "rmtree", real)
    with Checkpoints(tmp_path, keep=1) as kept:
        assert kept.latest_step() == 2
    assert not (tmp_path / "damaged").exists()
    assert not (tmp_path / "checkpoints" / manager.DELETED).exists()
