import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEYS_BIAS, random_batch, random_weights, tiny

from htfa_jax.checkpoints.loading import load_run
from htfa_jax.checkpoints.manager import open_checkpoints
from htfa_jax.common.param_paths import split
from htfa_jax.config import load_config, override
from htfa_jax.data.batch import split_for_accumulation
from htfa_jax.errors import CheckpointError, ConfigError, DataError, TrainingError
from htfa_jax.kernels import update
from htfa_jax.kernels.compiler import jit_light
from htfa_jax.models.factory import build_model
from htfa_jax.sharding.layout import Layout
from htfa_jax.sharding.mesh import Backend
from htfa_jax.training import trainer as train_module
from htfa_jax.training.optim import frozen_pattern, learning_rate, make_optimizer
from htfa_jax.training.state import new_params, new_state
from htfa_jax.training.step import make_train_step
from htfa_jax.training.trainer import due, train


def steps_of(config, optimizer=None):
    """State at the start, frozen weights, compiled step."""
    structure, layout = build_model(config), Layout(config)
    frozen, trainable = split(random_weights(structure), frozen_pattern(config))
    schedule = learning_rate(config.optim, 10)
    optimizer = optimizer or make_optimizer(config.optim, schedule)
    step = jax.jit(make_train_step(config, structure, optimizer, schedule, layout))
    return new_state(config.train, trainable, optimizer, layout), frozen, step


def assert_equal(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def steady():
    """(configuration, state at the start, frozen weights, compiled step)."""
    config = tiny(optim__learning_rate=3e-3, optim__schedule="constant")
    return config, *steps_of(config)


@pytest.mark.slow
def test_a_step_moves_every_trainable_leaf_and_keeps_nothing_for_frozen_ones(steady):
    config, before, frozen, step = steady
    after, metrics = step(before, frozen, split_for_accumulation(random_batch(config, size=2), 1))
    assert int(after["step"]) == 1 and bool(metrics["finite"])
    still = [p for p, v in after["params"].items() if np.array_equal(v, before["params"][p])]
    assert still == [KEYS_BIAS]
    assert not set(frozen) & set(after["params"])
    moments = [x for x in jax.tree.leaves(after["opt_state"]) if x.ndim]
    assert len(moments) == 2 * len(after["params"])


@pytest.mark.slow
def test_accumulated_steps_are_the_step_of_the_whole_batch():
    """Although the accumulation steps hold different numbers of words and of cells."""
    whole = tiny(
        train__batch_size=4,
        loss__occluded_cell_weight=3.0,
        decoder__dropout=0.0,
        level2__alignment="none",
        pretrained__random_components="as_configured",
    )
    parts = override(whole, {"train.batch_size": 2, "train.accumulation_steps": 2})
    batch = random_batch(whole, size=4)
    batch.loss_mask[:2] *= np.arange(64) < 5
    batch = dataclasses.replace(batch, weight=np.array([1, 0, 1, 1], np.float32))
    results = []
    for config in (whole, parts):
        state, frozen, step = steps_of(config, optax.sgd(lambda step: 1.0))
        parts = split_for_accumulation(batch, config.train.accumulation_steps)
        results.append(step(state, frozen, parts))
    (expected, expected_metrics), (got, metrics) = results
    for name in ("loss", "text_loss", "code_loss", "code_accuracy", "grad_norm", "alpha_mean"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-4, err_msg=name)
    for path, value in expected["params"].items():
        np.testing.assert_allclose(got["params"][path], value, rtol=1e-3, atol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_step_that_is_not_finite_changes_nothing(steady, platform, monkeypatch):
    """And one that is gives the same update in the form for GPUs."""
    config, before, frozen, step = steady
    if platform == "gpu":
        good = split_for_accumulation(random_batch(config, size=2), 1)
        expected, _ = step(before, frozen, good)
        gpu = SimpleNamespace(backend=lambda: Backend("gpu", 9))
        monkeypatch.setattr(update, "mesh", gpu)
        for_gpus = steps_of(config)
        assert "cond[" in str(step.trace(before, frozen, good).jaxpr)
        before, frozen, step = for_gpus
        assert "cond[" not in str(step.trace(before, frozen, good).jaxpr)
        for a, b in zip(
            *map(jax.tree.leaves, (step(before, frozen, good)[0], expected)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    batch = random_batch(config, size=2)
    batch.loss_mask[0, 3] = np.nan
    after, metrics = step(before, frozen, split_for_accumulation(batch, 1))
    assert not bool(metrics["finite"])
    for name in ("params", "opt_state"):
        assert_equal(after[name], before[name])


@pytest.mark.slow
def test_the_loss_falls_on_one_batch(steady):
    config, state, frozen, step = steady
    batch, losses = split_for_accumulation(random_batch(config, size=2), 1), []
    for _ in range(25):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]


TEXT_ONLY = {"level3.generation": False, "loss.code_weight": 0.0}


@pytest.fixture(scope="module")
def config(dataset, vq_folder, tmp_path_factory):
    """The tiny configuration on the tiny dataset, nothing to evaluate."""
    return tiny(
        data__train=str(dataset),
        data__validation=None,
        data__test=None,
        data__cache_dir=str(tmp_path_factory.mktemp("cache")),
        pretrained__vq=str(vq_folder),
        pretrained__random_components="as_configured",
        level2__alignment="none",
        train__save_every=2,
        train__log_every=1,
        train__max_steps=6,
        optim__schedule="constant",
        decoder__dropout=0.1,
        data__drop_recon=0.3,
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """Configuration and workdir of a run of one step, on words only."""
    words = override(config, TEXT_ONLY | {"train.max_steps": 1})
    workdir = tmp_path_factory.mktemp("trained") / "a"
    train(words, workdir)
    return words, workdir


@pytest.fixture
def begun(trained, tmp_path):
    """The configuration of `trained` and a copy of its workdir to go on in."""
    config, workdir = trained
    return config, Path(shutil.copytree(workdir, tmp_path / "a"))


def final(config, workdir):
    """All weights of a run, and its last metrics of each step without times."""
    _, params, step, _ = load_run(workdir, lambda c: build_model(c).shapes)
    lines = [json.loads(x) for x in (workdir / "logs/metrics.jsonl").read_text().splitlines()]
    logged = {
        line["step"]: {k: v for k, v in line.items() if k.split("/")[-1] in ("loss", "grad_norm")}
        for line in lines
    }
    return params, step, logged


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """The workdir of a run of all steps and parts."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "a"
    assert train(config, workdir) == {}
    return workdir


def interrupt(monkeypatch, at, how):
    """Makes the data pipeline call `how` before it hands out its `at`-th batch."""
    original = train_module.training_batches

    def interrupted(*args):
        for i, loaded in enumerate(original(*args), start=1):
            if i == at:
                how()
            yield loaded

    monkeypatch.setattr(train_module, "training_batches", interrupted)


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_nothing_had_been(config, undisturbed, tmp_path, monkeypatch):
    """SIGTERM in the middle saves and ends without an error; a crash loses what was not saved."""
    stopped = tmp_path / "a"
    expected, step, logged = final(config, undisturbed)
    assert step == 6 and sorted(logged) == [1, 2, 3, 4, 5, 6]

    with monkeypatch.context() as patch:
        interrupt(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(config, stopped) is None
    with open_checkpoints(stopped, config.train) as checkpoints:
        assert checkpoints.latest_step() == 3

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        interrupt(patch, 3, crash)
        train(config, stopped)
    with open_checkpoints(stopped, config.train) as checkpoints:
        assert checkpoints.latest_step() == 4

    assert train(config, stopped) == {}
    params, step, relogged = final(config, stopped)
    assert step == 6 and relogged == logged
    for path, value in expected.items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)
    assert train(config, stopped) == {}  # a finished run has nothing left to do
    assert "failed" in (stopped / "logs/train.log").read_text()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_records(
    config, tmp_path, monkeypatch
):
    config = override(config, TEXT_ONLY)
    original = train_module.training_batches

    def poisoned(*args):
        for i, loaded in enumerate(original(*args), start=1):
            if i == 3:
                loaded.batch.loss_mask[:] = np.nan
            yield loaded

    monkeypatch.setattr(train_module, "training_batches", poisoned)
    with pytest.raises(TrainingError, match=r"not finite at step 3 .*batch: r\d, r\d"):
        train(config, tmp_path / "a")
    _, params, step, _ = load_run(tmp_path / "a", lambda c: build_model(c).shapes)
    assert step == 2 and all(np.all(np.isfinite(v)) for v in params.values())


@pytest.mark.slow
def test_fine_tuning_starts_at_step_0_with_the_weights_of_a_run(config, undisturbed, tmp_path):
    expected, _, _ = final(config, undisturbed)
    # A learning rate of nothing shows what the second run started from.
    still = override(
        config,
        {
            "pretrained.run": str(undisturbed),
            "pretrained.vq": None,
            "optim.learning_rate": 0.0,
            "train.max_steps": 2,
        },
    )
    train(still, tmp_path / "second")
    params, step, logged = final(still, tmp_path / "second")
    assert step == 2 and sorted(logged) == [1, 2]
    for path, value in expected.items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)


@pytest.mark.slow
def test_weights_of_another_model_are_refused_with_both_sides(begun, tmp_path):
    config, workdir = begun
    wider = override(
        config,
        {"pretrained.run": str(workdir), "level3.adapter_mlp_dim": 30, "pretrained.vq": None},
    )
    with pytest.raises(CheckpointError, match=r"adapter_understand.fc1.bias: \(28,\).*\(30,\)"):
        train(wider, tmp_path / "second")
    with pytest.raises(CheckpointError, match=r"fc1.bias: \(28,\) in checkpoint 1 .*\(30,\)"):
        train(override(config, {"level3.adapter_mlp_dim": 30}), workdir)
    assert load_config(workdir).level3.adapter_mlp_dim == 28
    load_run(workdir, lambda c: build_model(c).shapes)  # the refusal has left it whole


@pytest.mark.slow
def test_a_changed_configuration_is_said_and_written(begun):
    config, workdir = begun
    train(override(config, {"train.max_steps": 2}), workdir)
    assert (
        "train.max_steps was 1 in this workdir and is now 2"
        in (workdir / "logs/train.log").read_text()
    )
    assert load_config(workdir).train.max_steps == 2


@pytest.mark.slow
def test_a_workdir_of_another_version_is_resumed_or_refused_with_the_field(begun):
    config, workdir = begun
    path = workdir / "config.json"
    older = json.loads(path.read_text())
    del older["train"]["watchdog_seconds"]
    path.write_text(json.dumps(older))
    train(config, workdir)
    log = (workdir / "logs/train.log").read_text()
    assert "train.watchdog_seconds is new since this workdir was made; it is 1800.0" in log
    path.write_text(json.dumps(older | {"train": older["train"] | {"fp16": True}}))
    with pytest.raises(
        ConfigError, match=r"(?s)config.json: unknown .* train.fp16.*another version"
    ):
        train(config, workdir)


@pytest.mark.slow
def test_a_run_without_checkpoints_says_that_it_starts_at_step_0(begun, tmp_path):
    config, workdir = begun
    (workdir / "checkpoints/1").rename(tmp_path / "gone")
    train(override(config, {"train.save": "no"}), workdir)
    log = (workdir / "logs/train.log").read_text()
    assert "holds no complete checkpoint yet: starting at step 0" in log


@pytest.mark.slow
def test_random_components_are_announced(begun, tmp_path):
    config, workdir = begun
    log = (workdir / "logs/train.log").read_text()
    assert "siglip: starts random and stays so; results will mean nothing" in log
    train(override(config, {"pretrained.random_components": "train"}), tmp_path / "b")
    log = (tmp_path / "b/logs/train.log").read_text()
    assert "siglip: no pretrained weights; it starts random and is trained" in log
    assert "whatever freeze.siglip=True says" in log


def test_when_things_are_due():
    assert [s for s in range(1, 10) if due("steps", 3, s, 0.2)] == [3, 6, 9]
    assert [s for s in range(1, 21) if due("epoch", 2, s, 0.2)] == [10, 20]
    assert [s for s in range(1, 11) if due("epoch", None, s, 0.2)] == [5, 10]
    assert [s for s in range(1, 600) if due("steps", None, s, 0.2)] == [250, 500]
    assert not any(due("no", 1, s, 0.2) for s in range(1, 10))
    # 100 records, 64 a step: four epochs are over after 6.25 steps.
    assert [s for s in range(1, 8) if due("epoch", None, s, 0.64)] == [2, 4, 5, 7]
    for records in (3, 7, 49, 1000):  # of a batch of one, whose share is not exact
        epochs = [s for s in range(1, 5 * records + 1) if due("epoch", None, s, 1 / records)]
        assert epochs == [records * i for i in range(1, 6)]


def test_frozen_weights_are_stored_as_configured():
    config = tiny(train__frozen_dtype="bfloat16", pretrained__random_components="as_configured")
    structure = build_model(config)
    trainable, frozen = jax.eval_shape(lambda: new_params(config, structure, {}, Layout(config)))
    assert {v.dtype for v in trainable.values()} == {jnp.dtype("float32")}
    kept = {path for path, v in frozen.items() if v.dtype == jnp.float32}
    assert kept == {"vq.codebook"}


def test_light_compilation_changes_no_bit_of_what_is_drawn():
    def draw(key):
        return jax.random.normal(key, (300, 40)), jax.random.uniform(key, (300, 40), minval=-1)

    jax.config.update("jax_disable_most_optimizations", False)
    try:
        expected, found = (jit(draw)(jax.random.key(1)) for jit in (jax.jit, jit_light))
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_trained_vq_encoder_starts_as_the_tokenizers_own():
    config = tiny(freeze__vq=False)
    structure = build_model(config)
    weights = random_weights(structure)
    loaded = {p: v for p, v in weights.items() if not p.startswith("vq_encoder.")}
    trainable, frozen = new_params(config, structure, loaded, Layout(config))
    copies = [p for p in trainable if p.startswith("vq_encoder.")]
    assert copies
    for path in copies:
        np.testing.assert_array_equal(
            trainable[path], frozen[path.replace("vq_encoder", "vq.encoder")]
        )


def test_a_trained_vq_encoder_is_kept_when_all_weights_are_given():
    config = tiny(freeze__vq=False)
    structure = build_model(config)
    weights = random_weights(structure)
    trainable, _ = new_params(config, structure, weights, Layout(config))
    for path in trainable:
        np.testing.assert_array_equal(trainable[path], weights[path], err_msg=path)


@pytest.mark.slow
def test_a_code_head_that_is_not_loaded_starts_from_the_codes():
    config = tiny()
    structure = build_model(config)
    weights = random_weights(structure)
    head = "level3.head_generate.kernel"
    kept, _ = new_params(config, structure, weights, Layout(config))
    np.testing.assert_array_equal(kept[head], weights[head])
    loaded = {p: v for p, v in weights.items() if p != head}
    fresh, _ = new_params(config, structure, loaded, Layout(config))
    module = structure.merge(weights)
    expected = module.level3.tied_head_kernel(module.vq.vectors())
    np.testing.assert_allclose(fresh[head], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_is_read_on_another_device_than_it_was_saved_on(begun):
    config, workdir = begun
    files = [p for p in (workdir / "checkpoints").rglob("_sharding")]
    for file in files:
        file.write_text(file.read_text().replace("cpu:0", "cuda:0").replace("TFRT_CPU_0", "cuda:0"))
    _, params, step, _ = load_run(workdir, lambda c: build_model(c).shapes)
    assert files and step == 1 and all(np.all(np.isfinite(v)) for v in params.values())
    with pytest.raises(CheckpointError, match="no checkpoint 7 in .*; there are: 1"):
        load_run(workdir / "checkpoints/7", lambda c: build_model(c).shapes)


def test_what_a_runs_weights_decide_cannot_change_under_way(begun):
    config, workdir = begun
    with pytest.raises(ConfigError, match="freeze.level2 was False and is now True"):
        train(override(config, {"freeze.level2": True}), workdir)
    assert load_config(workdir).freeze.level2 is False


@pytest.mark.slow
def test_mistakes_are_missed_before_training_and_what_was_learned_is_kept(config, tmp_path):
    config = override(config, TEXT_ONLY | {"train.max_steps": 1})
    for name in ("validation", "test"):
        with pytest.raises(DataError, match="no dataset at"):
            train(override(config, {f"data.{name}": "nowhere.jsonl"}), tmp_path / name)
        assert not (tmp_path / name / "checkpoints").exists()
    wrong = {"data.validation": config.data.train, "train.best_metric": "accuracy/colour"}
    with pytest.raises(ConfigError, match="accuracy/colour is not a validation metric .*color"):
        train(override(config, wrong), tmp_path / "a")
    assert not (tmp_path / "a/checkpoints").exists()


@pytest.mark.slow
def test_fine_tuning_on_other_words_keeps_the_tokenizer(begun, tmp_path, dataset):
    config, workdir = begun
    other = tmp_path / "other.jsonl"
    other.write_text(dataset.read_text().replace("What color", "Which tint"))
    train(
        override(
            config,
            {
                "pretrained.run": str(workdir),
                "pretrained.vq": None,
                "data.train": str(other),
                "data.image_root": str(dataset.parent),
            },
        ),
        tmp_path / "second",
    )
    files = [run / "tokenizer/tokenizer.json" for run in (workdir, tmp_path / "second")]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.slow
def test_broken_records_are_skipped_by_the_tokenizer_too(config, tmp_path, dataset):
    lines = dataset.read_text().splitlines()
    lines[3] = "{broken"
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    config = override(
        config,
        TEXT_ONLY
        | {
            "data.train": str(tmp_path / "data.jsonl"),
            "data.image_root": str(dataset.parent),
            "data.on_error": "skip",
            "train.max_steps": 9,
            "data.max_bad_records": 1,
        },
    )
    train(config, tmp_path / "a")  # it comes twice in nine steps, and is one record
    assert "skipped: " in (tmp_path / "a/logs/train.log").read_text()
    with pytest.raises(DataError, match="record 3: not valid JSON"):
        train(override(config, {"data.on_error": "raise"}), tmp_path / "b")
