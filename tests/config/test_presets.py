"""Every preset: what it changes, that it can be built, that it steps; what is off is not there."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from support import random_batch, random_weights

from htfa_jax import configs
from htfa_jax.config import Config, leaves, load_config, override
from htfa_jax.config.io import SIZES, preset_names, tiny
from htfa_jax.data.batch import split_for_accumulation
from htfa_jax.models import flops
from htfa_jax.models.factory import Model, build_model
from htfa_jax.training.plan import abstract_step
from htfa_jax.training.pretrained import load_pretrained
from htfa_jax.training.state import new_state

TEXT_ONLY = {"loss.text_weight": 1.0, "loss.code_weight": 0.0}
LARGE = {"sharding.mode": "fsdp", "train.batch_size": 1, "train.accumulation_steps": 8}
# All that each changes of `standard`.
DIFFERENCES = {
    "standard": {},
    "large_scale": {
        "decoder.num_layers": 8,
        "decoder.num_heads": 32,
        "train.batch_size": 4,
        "train.accumulation_steps": 8,
        "train.epochs": 10,
        "train.save_every": 500,
    },
    "memory_efficient": {
        "freeze.decoder": True,
        "train.batch_size": 1,
        "train.accumulation_steps": 8,
    },
    "understanding_only": TEXT_ONLY,
    "generation_only": {"loss.text_weight": 0.0, "loss.code_weight": 1.0},
    "ablation_no_level1": {"level1.learnable": False},
    "ablation_no_level2_affine": {"level2.alignment": "none"},
    "ablation_single_encoder": {"level3.generation": False} | TEXT_ONLY,
    "pytorch_original": {
        "level1.alpha": "map",
        "level2.alignment": "features",
        "level2.values": "fused",
        "level2.append_reconstruction": False,
    },
    "internlm2_1_8b": {"decoder.num_layers": 24} | LARGE,
    "internvl2_8b": {
        "decoder.vocab_size": 92553,
        "decoder.embed_dim": 4096,
        "decoder.num_layers": 32,
        "decoder.num_heads": 32,
        "decoder.mlp_dim": 14336,
    }
    | LARGE,
}
# Paths of `standard` that are left out.
ABSENT = {
    "understanding_only": r"level3\.head_generate\..*|vq\.decoder\..*",
    "generation_only": r"decoder\.(embed|head)\..*",
    "ablation_no_level1": r"level1\..*",
    "ablation_no_level2_affine": r"nothing",
    "ablation_single_encoder": r"vq\..*|level3\.(adapter|head)_generate\..*|level1\..*",
}


def test_the_presets_are_these():
    assert set(preset_names()) == {"debug", *DIFFERENCES}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_it_differs_from_standard_as_it_says(name):
    standard = dict(leaves(Config()))
    found = {k: v for k, v in leaves(load_config(name)) if v != standard[k]}
    assert found == DIFFERENCES[name]


def test_debug_is_small_and_starts_from_small_parts():
    config = load_config("debug")
    size = sum(math.prod(s.shape) for s in build_model(config).shapes.values())
    assert size < 10e6 and config.image_size == 112 and config.train.epochs == 3
    assert {config.pretrained.siglip, config.pretrained.vq, config.pretrained.decoder} == {"tiny"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["debug", *DIFFERENCES])
def test_its_model_and_step_are_sound_at_full_size(name):
    """The step takes a state to one of the same shapes; nothing is allocated."""
    config = override(load_config(name), {"pretrained.random_components": "as_configured"})
    abstract = abstract_step(config, jax.devices()[:1])
    after, metrics = jax.eval_shape(abstract.step, abstract.state, abstract.frozen, abstract.batch)
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (abstract.state, after)]
    assert kinds[0] == kinds[1]
    assert ("text_loss" in metrics, "code_loss" in metrics) == (
        config.loss.text_weight > 0,
        config.loss.code_weight > 0,
    )


@pytest.fixture(scope="module")
def tiny_steps():
    """{preset: (configuration, abstract step, lowered step) at test size}, made when asked for."""
    made = {}

    def step(name):
        if name not in made:
            config = load_config(f"{name}:tiny")
            abstract = abstract_step(config, jax.devices()[:1])
            made[name] = config, abstract, abstract.lower()
        return made[name]

    return step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["debug", *DIFFERENCES])
def test_two_steps_at_test_size(name, tiny_steps):
    config, abstract, lowered = tiny_steps(name)
    weights = random_weights(Model(None, abstract.shapes))
    params = {path: weights[path] for path in abstract.state["params"]}
    frozen = {path: weights[path].astype(s.dtype) for path, s in abstract.frozen.items()}
    before = {path: np.asarray(x) for path, x in params.items()}
    state = new_state(config.train, params, abstract.optimizer, abstract.layout)
    compiled, steps = lowered.compile(), config.train.accumulation_steps
    samples = config.train.batch_size * steps
    for seed in range(2):
        batch = split_for_accumulation(random_batch(config, samples, length=70, seed=seed), steps)
        state, metrics = compiled(state, frozen, jax.tree.map(jnp.asarray, batch))
        assert bool(metrics["finite"]) and float(metrics["loss"]) > 0
    assert int(state["step"]) == 2
    moved = {
        p.split(".")[0] for p, x in state["params"].items() if np.any(np.asarray(x) != before[p])
    }
    assert moved == {path.split(".")[0] for path in before}


@pytest.mark.slow
@pytest.mark.parametrize("name", ABSENT)
def test_what_is_off_has_no_parameters_and_costs_nothing(name, tiny_steps):
    standard, preset = (tiny_steps(n) for n in ("standard", name))
    gone = {path for path in standard[1].shapes if re.fullmatch(ABSENT[name], path)}
    assert bool(gone) == (name != "ablation_no_level2_affine")
    assert set(preset[1].shapes) == set(standard[1].shapes) - gone
    operations = [step[2].cost_analysis()["flops"] for step in (standard, preset)]
    assert operations[1] < operations[0]


@pytest.mark.parametrize(
    "changes,passes",
    [
        ({}, 2),
        ({"level2.values": "fused"}, 4),
        ({"level2.values": "fused", "level1.learnable": False}, 3),
        ({"level2.values": "fused", "freeze.level1": True}, 3),
        ({"fusion": "original"}, 1),
        ({"fusion": "tokens"}, 2),
    ],
)
def test_passes_of_a_frozen_siglip(changes, passes):
    """Forward for each image that is read, and back through the fused one if alpha learns."""
    config = override(Config(), {"pretrained.random_components": "as_configured"} | changes)
    assert flops.training_step(config, 128)["siglip"] == passes * flops.siglip(config)


def test_a_tokenizer_that_completes_nothing_is_read_without_its_decoder(vq_folder):
    config = support.tiny(loss__code_weight=0.0, pretrained__vq=str(vq_folder))
    model = build_model(config)
    loaded = load_pretrained(config, model)
    assert set(loaded) == {path for path in model.shapes if path.startswith("vq.")}
    assert "vq.codebook" in loaded and not [p for p in loaded if p.startswith("vq.decoder")]


def test_tiny_changes_sizes_only():
    config = load_config("memory_efficient")
    small = tiny(config)
    changed = {k for k, v in leaves(small) if v != dict(leaves(config))[k]}
    assert changed <= {*SIZES, "train.accumulation_steps", "pretrained.random_components"}
    assert small.freeze.decoder and small.train.remat == "full"
    assert load_config("configs/memory_efficient.py:tiny") == small
    debug = load_config("debug:tiny")
    assert debug.pretrained.vq is None and debug.level2.alignment == "pixels"


@pytest.mark.slow
def test_the_list_of_presets(capsys):
    configs.main([])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert set(preset_names()) <= set(rows)
    # 707,588,257 and 482,045,555 parameters; 1,024 patches, 784 codes, 2,048 words; weights,
    # moments, gradients and a bfloat16 copy of the first, bfloat16 of the second, but for the
    # codebook of 8,192 x 256, which stays in float32.
    memory = (707_588_257 * (4 + 8 + 4 + 2) + (482_045_555 + 8192 * 256) * 2) / 2**30
    numbers = ["707.6", "M", "482.0", "M", "3,856", "12.5", f"{memory:.2f}", "GiB"]
    assert rows["standard"][1:] == numbers
    assert rows["generation_only"][5] == "1,808" and rows["ablation_single_encoder"][5] == "3,072"
