"""Counted operations against XLA's own count, and what --dry_run prints."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import random_batch, taken_apart, tiny, write_dataset

from htfa_jax import train
from htfa_jax.config import override
from htfa_jax.config.io import save_config
from htfa_jax.errors import DataError
from htfa_jax.models import flops
from htfa_jax.models.factory import build_model
from htfa_jax.models.siglip import SigLIP
from htfa_jax.models.vq import VQ
from htfa_jax.training import dry_run
from htfa_jax.training.plan import sizes


def xla(function, *args):
    """Operations that XLA counts in a function, before it optimises."""
    analysis = jax.jit(function).lower(*args).cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


# Wide, so that matmuls outweigh norms and activations; one layer, because XLA counts
# the body of a loop once.
WIDE = {
    "siglip__embed_dim": 192,
    "siglip__num_layers": 1,
    "siglip__mlp_dim": 500,
    "decoder__embed_dim": 160,
    "decoder__num_layers": 1,
    "decoder__mlp_dim": 420,
    "vq__base_channels": 32,
}


def test_siglip_agrees_with_xla():
    config = tiny(**WIDE)
    model, _ = taken_apart(
        SigLIP(config.siglip, 48, dtype=jnp.float32, remat="none", rngs=nnx.Rngs(0))
    )
    image = jnp.zeros((1, 48, 48, 3))
    counted = xla(lambda p, x: model.merge(p)(x), model.shapes, image)
    assert flops.siglip(config) == pytest.approx(counted, rel=0.05)


def test_the_vq_encoder_agrees_with_xla():
    config = tiny(**WIDE)
    model, _ = taken_apart(VQ(config.vq, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    image = jnp.zeros((1, 96, 96, 3))
    counted = xla(lambda p, x: model.merge(p).encode(x), model.shapes, image)
    # XLA leaves out what convolutions compute with their zero padding, on few cells a lot.
    assert flops.vq_encoder(config.vq, 96) == pytest.approx(counted, rel=0.12)


def test_the_decoder_agrees_with_xla():
    config = tiny(**WIDE)
    model = build_model(config)
    T, D = flops.sequence_length(config, 64), config.decoder.embed_dim

    def text(params, x):
        module = model.merge(params)
        hidden, _ = module.decode(x, 0)
        return module.decoder.logits(hidden[:, -64:])

    counted = xla(text, model.shapes, jnp.zeros((1, T, D)))
    half_of_attention = 2 * T * T * D  # XLA counts what the causal mask hides
    assert flops.decoder(config, 64) + half_of_attention == pytest.approx(counted, rel=0.05)


def test_the_levels_agree_with_xla():
    """All but Level 1's convolutions: what the forward pass costs without encoders and decoder."""
    wider = {"siglip__embed_dim": 384, "decoder__embed_dim": 320, "level3__adapter_mlp_dim": 300}
    config = tiny(**WIDE | wider, level1__alpha="map")
    model = build_model(config)

    def levels(params, spatial, codes, hidden):
        module = model.merge(params)
        fused, _ = module.level2(spatial, spatial, spatial, None, None)
        fused = jnp.concatenate([fused, spatial], axis=-1)
        return (
            module.level3.understand(fused, None),
            module.level3.generate(codes, None),
            module.level3.code_logits(hidden),
        )

    P, M = config.patch_grid**2, config.code_grid**2
    args = [jnp.zeros((1, n, d)) for n, d in ((P, 384), (M, 6), (M, 320))]
    assert flops.levels(config) == pytest.approx(xla(levels, model.shapes, *args), rel=0.05)


def test_a_training_step_counts_what_learns_three_times():
    frozen = tiny(pretrained__random_components="as_configured", freeze__decoder=True)
    learning = tiny()
    one, other = flops.training_step(frozen, 64), flops.training_step(learning, 64)
    assert one["siglip"] / flops.siglip(frozen) == 2 and other["siglip"] == 6 * flops.siglip(frozen)
    assert other["decoder"] == 1.5 * one["decoder"] and other["levels"] == one["levels"]
    single = tiny(level3__generation=False, loss__code_weight=0.0)
    assert "vq" not in flops.training_step(single, 64)


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_does_nothing(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny(
        train__accumulation_steps=2,
        train__frozen_dtype="bfloat16",
        train__max_steps=None,
        train__epochs=3,
        data__sources=((str(dataset), 1.0), ("held_objects", 2.0)),
        data__test=str(dataset),
        data__cache_dir=str(tmp_path / "cache"),
    )
    save_config(config, tmp_path / "config.json")
    train.main(["--config", "config.json", "--dry_run"])
    shown = capsys.readouterr().out
    rows = {line[:12].strip(): line[12:].split() for line in shown.splitlines()}
    total = sum(int(np.prod(s.shape)) for s in build_model(config).shapes.values())
    trainable, frozen = (int(n.replace(",", "")) for n in rows["all"])
    assert trainable + frozen == total
    vq = sum(int(np.prod(s.shape)) for p, s in build_model(config).shapes.items() if p[:3] == "vq.")
    assert rows["vq"] == ["0", f"{vq:,}"] and frozen == vq
    tokens = 16 + 36 + random_batch(config, length=70).tokens.shape[1]
    assert rows["tokens"][0] == str(tokens)
    assert "1 x cpu" in shown or "8 x cpu" in shown
    for said in (
        "GFLOP per sample",
        "2 accumulation steps per update",
        "optimizer state",
        "activations",
    ):
        assert said in shown
    # Two samples in each of two accumulation steps and part of the batch.
    update = 4 * int(re.search(r"x (\d+) data shards", shown)[1])
    drawn = config.held_objects.num_train
    records = 7 + drawn
    assert f"{records * 3 // update:,} of {update} samples, {records // update:,} an ep" in shown
    assert f"train        {dataset}: 7 records, the first 7 read and decoded: sound" in shown
    assert f"train        held_objects: {drawn} records, drawn on first use" in shown
    assert f"test         {dataset}: 7 records" in shown and "VQ stage     3 steps" in shown
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def test_dry_run_reads_the_first_records(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "describe_plan", lambda config: "")
    path = write_dataset(tmp_path / "data", 9)
    (tmp_path / "data/orig3.png").unlink()
    (tmp_path / "data/orig8.png").unlink()  # beyond those that are read
    config = tiny(data__train=str(path), train__batch_size=1)
    with pytest.raises(DataError, match="orig3.png"):
        dry_run.dry_run(config, None)
    shown = dry_run.dry_run(override(config, {"data.on_error": "skip"}), None)
    assert "9 records, the first 8 read and decoded: 1 bad" in shown and "a new run" in shown
    (tmp_path / "run/checkpoints/12").mkdir(parents=True)
    lenient = {"data.on_error": "skip", "pretrained.random_components": "as_configured"}
    shown = dry_run.dry_run(override(config, lenient), tmp_path / "run")
    assert "run goes on after step 12" in shown and "VQ stage" not in shown
    with pytest.raises(DataError, match="nowhere.jsonl"):
        dry_run.dry_run(override(config, lenient | {"data.test": "nowhere.jsonl"}), None)


@pytest.mark.slow
def test_figures_of_documents_are_those_of_the_command():
    """And `standard` leaves room for activations on one A100 of 40 GB."""
    said = {
        "generation_only": "329 million", "large_scale": "16.7 GiB",
    }  # fmt: skip
    found = {name: sizes(name) for name in ("standard", *said)}
    assert round(found["standard"].trainable / 1e6) == 708
    assert round(found["standard"].frozen / 1e6) == 482
    assert found["standard"].memory < 0.75 * 40e9
    for name, text in said.items():
        assert text in (Path(__file__).parents[2] / f"configs/{name}.py").read_text()
    assert round(found["generation_only"].trainable / 1e6) == 329
    assert f"{found['large_scale'].memory / 2**30:.1f}" == "16.7"
