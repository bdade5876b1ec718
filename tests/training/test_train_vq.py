"""The VQ stage: its losses, what keeps codes alive, which images it sees, resuming."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_batch, random_weights, tiny

from htfa_jax.checkpoints.weights import read_weights, save_component
from htfa_jax.common import param_paths
from htfa_jax.config import override
from htfa_jax.errors import ConfigError
from htfa_jax.models.factory import build_model
from htfa_jax.models.registration import register
from htfa_jax.sharding.layout import Layout
from htfa_jax.training import vq_stage
from htfa_jax.training.vq_losses import losses, perceptual_encoder, revive, training_images
from htfa_jax.training.vq_stage import build_vq, cache_key, make_step


@pytest.fixture(scope="module")
def tokenizer():
    config = tiny()
    model = build_vq(config)
    return config, model, random_weights(model)


@pytest.mark.slow
def test_losses_and_where_their_gradients_go(tokenizer):
    """Reconstruction passes straight through to the encoder and leaves the codebook alone."""
    config, model, params = tokenizer
    image = jax.random.uniform(jax.random.key(0), (2, 48, 48, 3), minval=-1)
    ones = jnp.ones(2)
    nothing = {"vq_train.l1_weight": 0.0, "vq_train.l2_weight": 0.0}
    no_image = override(config, nothing | {"vq_train.commitment_weight": 0.0})

    @jax.jit
    def look(params):
        vq = model.merge(params)
        z = vq.encoder(image)
        book = vq.vectors()
        codes = ((z[:, :, None] - book[None, None]) ** 2).sum(axis=-1).argmin(axis=-1)
        expected = {
            "codes": codes,
            "z": z,
            "vectors": book[codes],
            "painted": vq.decoder(book[codes]),
        }
        of = {
            "painting": lambda p: sum(
                losses(model.merge(p), image, ones, config)[1][k] for k in ("l1", "l2")
            ),
            "commitment": lambda p: losses(model.merge(p), image, ones, config)[1]["commitment"],
            "codebook": lambda p: losses(model.merge(p), image, ones, no_image)[0],
        }
        gradients = {name: jax.grad(function)(params) for name, function in of.items()}
        both = jnp.concatenate([image, jnp.zeros_like(image)])
        half = jnp.array([1.0, 1, 0, 0])
        weighted = losses(model.merge(params), both, half, config)[0]
        return expected, losses(model.merge(params), image, ones, config), gradients, weighted

    expected, (total, found), gradients, weighted = look(params)
    assert float(weighted) == pytest.approx(float(total), rel=1e-5)
    difference = np.asarray(expected["painted"] - image)
    distance = float(np.mean((expected["z"] - expected["vectors"]) ** 2))
    np.testing.assert_array_equal(found["codes"], expected["codes"])
    assert float(found["commitment"]) == pytest.approx(distance, rel=1e-4)
    assert float(total) == pytest.approx(
        np.abs(difference).mean() + (difference**2).mean() + 1.25 * distance, rel=1e-4
    )
    reached = {
        name: {path.split(".")[0] for path, v in grad.items() if np.any(v)}
        for name, grad in gradients.items()
    }
    assert reached == {
        "painting": {"encoder", "decoder"},
        "commitment": {"encoder"},
        "codebook": {"codebook"},
    }


def test_unused_codes_move_onto_codes_of_the_batch():
    book = jnp.arange(12.0).reshape(6, 2)
    z = 100 + jax.random.normal(jax.random.key(0), (1, 3, 2))
    codes = jnp.array([[0, 2, 2]])
    unused = jnp.array([5, 8, 9, 9, 3, 0])
    new, count = revive(book, unused, codes, z, 10, jax.random.key(1))
    np.testing.assert_array_equal(count, [0, 9, 0, 0, 4, 1])
    still = [0, 1, 2, 4, 5]
    np.testing.assert_array_equal(np.asarray(new)[still], np.asarray(book)[still])
    assert any(np.array_equal(new[3], seed) for seed in z[0])


@pytest.mark.slow
def test_a_step_revives_and_counts():
    config = tiny(vq_train__revive_after=2, vq__codebook_size=300)
    model = build_vq(config)
    params = random_weights(model)
    optimizer = vq_stage.optax.sgd(0.0)
    state = {
        "step": jnp.int32(0),
        "params": {path: jnp.array(v) for path, v in params.items()},
        "opt_state": {"tx": optimizer.init(params), "unused": jnp.zeros(300, jnp.int32)},
        "halted": jnp.bool_(False),
    }
    step, batch = make_step(config, model, optimizer, Layout(config)), random_batch(config, size=2)
    before = np.asarray(params["codebook"])
    state, _ = step(state, batch)
    np.testing.assert_array_equal(state["params"]["codebook"], before)
    assert int(state["opt_state"]["unused"].max()) == 1
    state, metrics = step(state, batch)
    moved = np.any(np.asarray(state["params"]["codebook"]) != before, axis=1)
    assert moved.any() and not moved.all()
    assert bool(metrics["finite"]) and int(state["step"]) == 2
    assert not np.any(np.asarray(state["opt_state"]["unused"])[moved])


def test_images_are_those_of_the_record_and_blends_between_them():
    config = tiny()
    batch = random_batch(config, size=3)
    batch.has_target[0] = False
    pair = register(batch, config)
    draw = jax.jit(lambda key: training_images(batch, key, config))
    kinds = set()
    for i in range(20):
        images = np.asarray(draw(jax.random.key(i)))
        for row in range(3):
            sources = {
                "orig": pair.orig_BHWC[row],
                "recon": pair.own_recon_BHWC[row],
                "target": batch.image_target[row] / 127.5 - 1,
            }
            matches = [
                name for name, x in sources.items() if np.allclose(images[row], x, atol=1e-5)
            ]
            if not matches:
                low = np.minimum(pair.orig_BHWC[row], pair.aligned_recon_BHWC[row]) - 1e-5
                high = np.maximum(pair.orig_BHWC[row], pair.aligned_recon_BHWC[row]) + 1e-5
                assert np.all((low <= images[row]) & (images[row] <= high))
            kinds.add((row, *(matches or ["blend"])))
    three = {"orig", "recon", "blend"}
    assert kinds == {(row, k) for row in range(3) for k in three} | {(1, "target"), (2, "target")}


@pytest.mark.slow
def test_the_stage_goes_on_where_it_was_and_gives_the_same_weights(dataset, tmp_path, monkeypatch):
    config = tiny(
        data__train=str(dataset), data__validation=str(dataset), vq_train__num_steps=4,
        vq_train__save_every=2, data__cache_dir=str(tmp_path), train__log_every=1,
    )  # fmt: skip
    whole = vq_stage.train_vq(config, tmp_path / "whole")
    original = vq_stage.training_batches

    def cut(*args):
        for i, loaded in enumerate(original(*args)):
            if i == 3:
                raise OSError("the disk is gone")
            yield loaded

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(vq_stage, "training_batches", cut)
        vq_stage.train_vq(config, tmp_path / "parts")
    assert not (tmp_path / "parts" / "weights").exists()
    with pytest.raises(ConfigError, match="VQ stage of other settings"):
        vq_stage.train_vq(override(config, {"vq_train.l1_weight": 2.0}), tmp_path / "parts")
    again = vq_stage.train_vq(config, tmp_path / "parts")
    expected, got = read_weights(whole), read_weights(again)
    for path, value in expected.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)
    lines = (tmp_path / "parts/logs/metrics.jsonl").read_text()
    assert '"vq_validation/psnr"' in lines and '"vq/codes_used"' in lines


def test_a_tokenizer_is_kept_for_what_it_was_made_from(dataset, tmp_path, monkeypatch):
    config = tiny(data__train=str(dataset), data__validation=None, data__cache_dir=str(tmp_path))
    made = []

    def train(config, workdir, stop, check_held):
        made.append(workdir)
        save_component(workdir / "weights", "vq", config.vq, {"x": np.zeros(2)})
        return workdir / "weights"

    monkeypatch.setattr(vq_stage, "train_vq", train)
    first = vq_stage.cached_vq(config, tmp_path / "a")
    assert vq_stage.cached_vq(override(config, {"train.max_steps": 9}), tmp_path / "b") == first
    assert vq_stage.cached_vq(override(config, {"vq.z_channels": 24}), tmp_path / "c") != first
    assert [folder.parent for folder in made] == [tmp_path / "a", tmp_path / "c"]
    keys = {cache_key(config), cache_key(override(config, {"vq_train.l1_weight": 2.0}))}
    dataset_copy = tmp_path / "data.jsonl"
    dataset_copy.write_text(dataset.read_text())
    keys.add(cache_key(override(config, {"data.train": str(dataset_copy)})))
    assert len(keys) == 3


def test_of_two_runs_that_need_the_same_tokenizer_one_trains_it(dataset, tmp_path, monkeypatch):
    config = tiny(data__train=str(dataset), data__cache_dir=str(tmp_path / "cache"))
    trained = []

    def slowly(config, workdir, stop, check_held):
        trained.append(workdir)
        time.sleep(0.5)
        save_component(workdir / "weights", "vq", config.vq, {"codebook": np.zeros((3, 2))})
        return workdir / "weights"

    monkeypatch.setattr(vq_stage, "train_vq", slowly)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(vq_stage.cached_vq, config, tmp_path / name) for name in "abc"]
    assert [run.result() for run in runs] == [vq_stage.cached_folder(config)] * 3
    assert len(trained) == 1


def test_a_stage_that_was_stopped_leaves_the_tokenizer_to_the_next_run(
    dataset, tmp_path, monkeypatch
):
    config = tiny(data__train=str(dataset), data__cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(vq_stage, "train_vq", lambda *_: None)
    assert vq_stage.cached_vq(config, tmp_path / "a") is None
    (tmp_path / "weights").mkdir()
    save_component(tmp_path / "weights", "vq", config.vq, {"codebook": np.zeros((3, 2))})
    monkeypatch.setattr(vq_stage, "train_vq", lambda *_: tmp_path / "weights")
    vq_stage.cached_folder(config).mkdir()  # emptied by hand
    assert vq_stage.cached_vq(config, tmp_path / "b") == vq_stage.cached_folder(config)


@pytest.mark.slow
def test_the_perceptual_loss_is_the_error_of_features(tokenizer, tmp_path):
    config, model, params = tokenizer
    siglip = build_model(config)
    inside, _ = param_paths.split(random_weights(siglip), r"siglip\..*")
    weights = {path.removeprefix("siglip."): x for path, x in inside.items()}
    save_component(tmp_path / "siglip", "siglip", config.siglip, weights)
    config = override(
        config,
        {"pretrained.siglip": str(tmp_path / "siglip"), "vq_train.perceptual_weight": 0.5},
    )
    eye, eye_params = perceptual_encoder(config)
    image = jax.random.uniform(jax.random.key(0), (2, 48, 48, 3), minval=-1)
    ones = jnp.ones(2)

    @jax.jit
    def look(params):
        vq, see = model.merge(params), eye.merge(eye_params)
        painted = vq.decode(vq.encode(image))
        expected = jnp.mean((see(painted) - see(image)) ** 2)
        plain = losses(vq, image, ones, config)[0]
        return expected, plain, losses(vq, image, ones, config, see)

    expected, plain, (total, found) = look(params)
    assert float(found["perceptual"]) == pytest.approx(float(expected), rel=1e-4) and expected > 0
    assert float(total - plain) == pytest.approx(0.5 * float(expected), rel=1e-4)
    assert cache_key(config) != cache_key(tiny())
    with pytest.raises(ConfigError, match="perceptual_weight=0.5 compares .* not given"):
        tiny(vq_train__perceptual_weight=0.5)
