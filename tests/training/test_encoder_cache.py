import dataclasses
import json
import pickle
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support import random_batch, random_weights, tiny, write_dataset

from htfa_jax.common.files import made_once
from htfa_jax.config import override
from htfa_jax.data.batch import Batch
from htfa_jax.data.pipeline import SampleLoader, training_batches
from htfa_jax.data.splits import open_split, open_tokenizer
from htfa_jax.errors import ConfigError, DataError
from htfa_jax.models import flops
from htfa_jax.models.factory import build_model
from htfa_jax.models.losses import count, loss_and_metrics
from htfa_jax.sharding.layout import Layout
from htfa_jax.training import encoder_cache
from htfa_jax.training.plan import abstract_batch
from htfa_jax.training.trainer import train

BOTH = {"data.cache_codes": True, "data.cache_features": True}
NAMES = {"vq": "vq-1", "siglip": "siglip-1"}


@pytest.fixture(scope="module")
def config(dataset, tmp_path_factory):
    """A tiny configuration that keeps everything; record 0 has no target, record 1 nothing else."""
    folder = tmp_path_factory.mktemp("cache")
    lines = write_dataset(folder / "data", 5).read_text().splitlines()
    lines[0] = lines[0].replace('"image_target"', '"other"')
    lines[1] = lines[1].replace('"image_target"', '"other"').replace('"image_recon"', '"another"')
    (folder / "data" / "data.jsonl").write_text("\n".join(lines) + "\n")
    config = tiny(
        data__train=str(folder / "data" / "data.jsonl"),
        data__cache_dir=str(folder),
        data__drop_recon=0.5,
        pretrained__random_components="as_configured",
        eval__batch_size=2,
    )
    return override(config, BOTH)


def opened(config):
    """The cache of a configuration with random weights, its records, structure and weights."""
    records, model = open_split(config, "train"), build_model(config)
    params = random_weights(model)
    kept = encoder_cache.open_or_make(config, model, params, NAMES, records, Layout(config))
    return kept, records, model, params


@pytest.mark.slow
def test_losses_are_those_without_a_cache(config, tmp_path):
    """Reconstructions that are dropped or missing included."""
    config = override(config, {"level2.alignment": "features"})
    kept, records, model, params = opened(config)
    tokenizer = open_tokenizer(config, tmp_path, records)

    @jax.jit
    def losses(batch):
        return loss_and_metrics(model.merge(params), batch, count(batch, config), None)[1]

    batches = training_batches(config, records, tokenizer, 0, 5, kept=kept)
    pairs = 0
    for loaded in (next(batches) for _ in range(3)):
        batch = loaded.batch
        pairs += batch.has_recon.sum()
        metrics = losses(batch)
        expected = losses(dataclasses.replace(batch, target_codes=None, features=None))
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    batches.close()
    assert 0 < pairs < 12  # of 15 samples 3 never have one


def test_the_step_runs_fewer_encoders():
    """Two of SigLIP's three passes stay out, and one of the VQ encoder's two."""
    config = tiny(pretrained__random_components="as_configured")
    model = build_model(config)

    def operations(changes):
        changed = override(config, changes)

        def loss(params, batch):
            counts = count(batch, changed)
            return loss_and_metrics(model.merge(params), batch, counts, None)[0]

        text = str(jax.make_jaxpr(loss)(model.shapes, abstract_batch(changed, 2, 64)))
        # SigLIP's tokens of two originals and two reconstructions are [4, 16, 24].
        return text.count("= conv_general_dilated"), text.count("f32[4,16,24]")

    convolutions, pairs = operations({})
    fewer, same_pairs = operations({"data.cache_codes": True})
    assert 0 < fewer < convolutions and same_pairs == pairs > 0
    assert operations({"data.cache_features": True}) == (convolutions, 0)


def test_operations_of_what_is_not_run_are_not_counted():
    config = tiny(pretrained__random_components="as_configured")
    without, codes, features = (
        flops.training_step(override(config, changes), 64)
        for changes in ({}, {"data.cache_codes": True}, {"data.cache_features": True})
    )
    once, code_pass = flops.siglip(config), flops.vq_encoder(config.vq, config.image_size)
    assert [x["siglip"] / once for x in (without, codes, features)] == [2, 2, 0]
    assert [x["vq"] / code_pass for x in (without, codes, features)] == [3, 2, 3]


def test_it_is_made_once_and_read_by_number(config, monkeypatch):
    kept, records, model, params = opened(config)
    monkeypatch.setattr(encoder_cache, "_make", lambda *_: pytest.fail("made again"))
    again = opened(config)[0]
    assert again == kept and set(kept.files) == {"target_codes", "features"}
    fields = [pickle.loads(pickle.dumps(kept))(i) for i in range(len(records))]
    wanted = abstract_batch(config, len(records), 64)
    for name in kept.files:
        stacked = np.stack([row[name] for row in fields])
        assert (stacked.shape, stacked.dtype) == (
            getattr(wanted, name).shape,
            getattr(wanted, name).dtype,
        )
        assert len(np.unique(stacked, axis=0)) == len(records)
    empty = SampleLoader(records, None, config, kept).empty()
    assert empty["features"].shape == (2, 16, 24) and not empty["features"].any()
    assert empty["target_codes"].shape == (36,) and not empty["target_codes"].any()


def test_bfloat16_comes_back_as_it_was(config, tmp_path):
    config = override(
        config,
        {"train.dtype": "bfloat16", "data.cache_codes": False, "data.cache_dir": str(tmp_path)},
    )
    kept, records, model, params = opened(config)
    features = kept(2)["features"]
    assert features.dtype == jax.numpy.bfloat16
    narrow = features.astype(np.float32)
    wide = opened(override(config, {"train.dtype": "float32"}))[0](2)["features"]
    np.testing.assert_allclose(narrow, wide, atol=0.1)


CHANGES = [
    {"image_size": 96},
    {"train.dtype": "bfloat16"},
    {"level2.alignment": "none"},
    {"level2.intensity_threshold": 0.2},
    {"data.use_object_mask": False},
    {"data.resize": "squash"},
    {"data.image_mean": (0.4, 0.5, 0.5)},
    {"data.image_std": (0.4, 0.5, 0.5)},
    {"data.image_root": "elsewhere"},
]


@pytest.mark.parametrize(
    "name,more",
    [("target_codes", {"vq.normalize_codes": False}), ("features", {"siglip.layer_norm_eps": 0.1})],
)
def test_what_it_depends_on_changes_the_key(config, name, more, tmp_path):
    def key(changes, names=NAMES):
        return encoder_cache.cache_key(override(config, changes), name, names)

    copy = tmp_path / "data.jsonl"
    copy.write_bytes(Path(config.data.train).read_bytes())
    other = {part: f"{part}-2" for part in NAMES}
    keys = [key(c) for c in [{}, *CHANGES, more, {"data.train": str(copy)}]]
    keys += [key({}, other), key({"data.train": "held_objects"})]
    assert len(set(keys)) == len(keys)
    same = {"seed": 3, "train.max_steps": 9, "data.drop_recon": 0.1, "optim.learning_rate": 1.0}
    assert key(same) == keys[0]


def test_too_little_space_is_said_before_anything_is_made(config, tmp_path):
    # Float32 features of 2 images of 4 x 4 patches, 24 wide, and int32 codes of 6 x 6 cells.
    size = 5 * 4 * (2 * 16 * 24 + 36) / 1e9
    encoder_cache.check(override(config, {"data.cache_gb": size * 1.01}), 5)
    small = override(config, {"data.cache_gb": size * 0.99, "data.cache_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"cache_features needs 1.54e-05 GB for 5 records"):
        train(small, tmp_path / "run")
    assert not (tmp_path / "encoded").exists()
    encoder_cache.check(override(small, dict.fromkeys(BOTH, False)), 5)


def test_several_processes_are_refused(config, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="one process; this one has 2"):
        encoder_cache.check(config, 5)
    encoder_cache.check(override(config, dict.fromkeys(BOTH, False)), 5)


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ConfigError, match=r"freeze\.siglip=True and pretrained\.siglip"):
        tiny(data__cache_features=True)
    with pytest.raises(ConfigError, match=r"data\.cache_codes=True: without code loss"):
        tiny(data__cache_codes=True, loss__code_weight=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x[:-3],
        lambda x: x[:40] + b"!" + x[41:],
        lambda x: x[:-9] + bytes([x[-9] ^ 1]) + x[-8:],  # one bit of a code
    ],
)
def test_a_damaged_file_is_made_again_with_a_word(config, damage, tmp_path, caplog):
    config = override(config, {"data.cache_features": False, "data.cache_dir": str(tmp_path)})
    path = opened(config)[0].files["target_codes"]
    whole = path.read_bytes()
    assert opened(config)[0].files["target_codes"].stat().st_ino == path.stat().st_ino
    assert "made again" not in caplog.text
    path.write_bytes(damage(whole))
    assert opened(config)[0].files["target_codes"].read_bytes() == whole
    assert "target_codes.npy is damaged: " in caplog.text and ": it is made again" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["target_codes.npy", "hashes.json"])
def test_a_cache_that_lacks_a_file_or_holds_nonsense(config, name, tmp_path, caplog):
    config = override(config, {"data.cache_features": False, "data.cache_dir": str(tmp_path)})
    path = opened(config)[0].files["target_codes"]
    whole = path.read_bytes()
    for content in (None, b"[[[", b"\xff{}"):
        (path.parent / name).unlink(missing_ok=True)
        if content is not None:
            (path.parent / name).write_bytes(content)
        assert opened(config)[0].files["target_codes"].read_bytes() == whole
    # Without hashes it is one of an older version, and taken as it is.
    assert caplog.text.count("made again") == (3 if name.endswith("npy") else 2)


def test_a_record_that_cannot_be_read_leaves_nothing_behind(config, tmp_path):
    config = override(
        config,
        {"data.cache_dir": str(tmp_path), "data.image_root": "nowhere", "data.on_error": "skip"},
    )
    with pytest.raises(DataError, match=r"image_orig: no file .* mend this one"):
        opened(config)
    assert not [x for x in (tmp_path / "encoded").iterdir() if x.suffix != ".lock"]


def test_of_several_processes_one_makes_it(tmp_path):
    """Each has a lock of its own, as processes do."""
    path, made = tmp_path / "cache" / "x", []

    def make():
        made.append(path.exists())
        time.sleep(0.2)
        path.write_text("whole")

    threads = [threading.Thread(target=made_once, args=(path, "x", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [False] and path.read_text() == "whole"


@pytest.mark.slow
def test_a_run_with_it_is_the_run_without(config, vq_folder, tmp_path, monkeypatch):
    """Here SigLIP sees the reconstruction in the original's frame."""
    config = override(
        config,
        {"pretrained.vq": str(vq_folder), "data.cache_dir": str(tmp_path / "cache")}
        | {"train.max_steps": 3, "train.log_every": 1, "train.save": "no"}
        | {"eval.during_training": "no"},
    )
    seen, real = [], encoder_cache.EncoderCache.__call__

    def read(self, index):
        seen.append(index)
        return real(self, index)

    def losses(name, changes):
        train(override(config, changes), tmp_path / name)
        lines = (tmp_path / name / "logs" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["train/loss"] for line in lines]

    monkeypatch.setattr(encoder_cache.EncoderCache, "__call__", read)
    expected = losses("without", dict.fromkeys(BOTH, False))
    assert not seen and len(set(expected)) == 3
    np.testing.assert_allclose(losses("with", {}), expected, rtol=1e-4)
    assert set(seen) == set(range(5))
    assert len(list((tmp_path / "cache" / "encoded").glob("*/*.npy"))) == 2


def test_a_batch_without_them_has_no_such_arrays():
    batch = random_batch(tiny())
    assert len(jax.tree.leaves(batch)) == len(dataclasses.fields(Batch)) - 2
