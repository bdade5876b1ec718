"""Vision towers are what their config.json says: which GELU, how many heads; others are refused."""

import contextlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from small_checkpoints import random, tensors_of, to_timm, written
from transformers import (
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.janus.configuration_janus import JanusVisionConfig
from transformers.models.janus.modeling_janus import JanusVisionModel

from htfa_jax.checkpoints import weights
from htfa_jax.checkpoints.weights import load_component
from htfa_jax.common.param_paths import unflatten
from htfa_jax.errors import CheckpointError
from htfa_jax.models.layers import make_rngs
from htfa_jax.models.siglip import SigLIP
from weights_convert import siglip
from weights_convert.folder import write_folder
from weights_convert.source import Source
from weights_convert.to_hf import siglip_config
from weights_convert.verify import verify
from weights_convert.vision_tower import DEFAULTS, read_janus, read_transformers

SIDE = 32
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "patch_size": 8, "image_size": SIDE,
}  # fmt: skip


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """{GELU: (transformers' model, its tensors, its config.json)}, the same weights in both."""
    found = {}
    for act in ("gelu_pytorch_tanh", "gelu"):
        folder = tmp_path_factory.mktemp(act)
        config = SiglipVisionConfig(**SIZES, hidden_act=act, vision_use_head=False)
        model = random(SiglipVisionModel(config))
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        found[act] = model, tensors_of(folder), config
    return found


def features(folder, out, image):
    source = Source(folder)
    spec = siglip.conversion_spec(source, SIDE)
    write_folder(source, spec, out)
    params = load_component(out, "siglip", spec.sizes, spec.shapes)
    made = nnx.eval_shape(
        lambda: SigLIP(spec.sizes, SIDE, dtype=jnp.dtype("float32"), rngs=make_rngs(0))
    )
    params = unflatten({k: jnp.asarray(v, jnp.float32) for k, v in params.items()})
    return np.asarray(nnx.merge(nnx.split(made)[0], params)(jnp.asarray(image)))


def image():
    return np.random.default_rng(0).uniform(-1, 1, (1, SIDE, SIDE, 3)).astype(np.float32)


def expected(model):
    with torch.no_grad():
        return model(torch.from_numpy(image().transpose(0, 3, 1, 2))).last_hidden_state.numpy()


def near(a, b):
    return np.abs(a - b).max() < 2e-5 * np.abs(b).max()


def test_the_table_of_defaults_is_that_of_the_classes():
    for cls in (SiglipVisionConfig, JanusVisionConfig):
        ours = DEFAULTS[cls.model_type]
        assert ours == {name: getattr(cls(), name) for name in ours}


@pytest.mark.slow
def test_both_gelus_compute_what_their_checkpoints_do(towers, tmp_path):
    assert not near(expected(towers["gelu"][0]), expected(towers["gelu_pytorch_tanh"][0]))
    for act, (model, tensors, config) in towers.items():
        folder = written(tmp_path / act, tensors, config)
        out = tmp_path / f"out_{act}"
        assert near(features(folder, out, image()), expected(model)), act
        assert json.loads((out / "config.json").read_text())["hidden_act"] == act
        assert "transformers' SiglipVisionModel" in verify(out, Source(folder))


def test_an_image_that_patches_do_not_fill(tmp_path):
    """As 384 pixels and patches of 14, which the best known SigLIP has."""
    config = SiglipVisionConfig(**SIZES | {"image_size": SIDE + 5}, vision_use_head=False)
    random(SiglipVisionModel(config)).save_pretrained(tmp_path / "a")
    source = Source(tmp_path / "a")
    spec = siglip.conversion_spec(source, 40)
    write_folder(source, spec, tmp_path / "out")
    assert verify(tmp_path / "out", source)


def janus(tensors):
    config = {
        "model_type": "multi_modality",
        "vision_config": {
            "cls": "CLIPVisionTower", "model_type": "vision",
            "params": {"model_name": "siglip_large_patch16_384", "select_layer": -1,
                       "select_feature": "same", "image_size": 384},
        },
    }  # fmt: skip
    return to_timm(tensors), config


def test_januss_own_tower_has_the_exact_gelu(towers, tmp_path):
    model, tensors, _ = towers["gelu"]
    folder = written(tmp_path / "a", *janus(tensors))
    assert near(features(folder, tmp_path / "out", image()), expected(model))
    assert "exact GELU" in verify(tmp_path / "out", Source(folder))


def test_transformers_names_of_janus(tmp_path):
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"} | {"mlp_ratio": 2.0}
    model = random(JanusVisionModel(JanusVisionConfig(**sizes)))
    tensors = {f"model.vision_model.{k}": v.numpy() for k, v in model.state_dict().items()}
    part = {"model_type": "janus_vision_model", **sizes}
    folder = written(tmp_path / "a", tensors, {"model_type": "janus", "vision_config": part})
    assert near(features(folder, tmp_path / "out", image()), expected(model))
    assert "transformers' JanusVisionModel" in verify(tmp_path / "out", Source(folder))
    del part["model_type"]  # what Janus's part is by default
    folder = written(tmp_path / "a", tensors, {"model_type": "janus", "vision_config": part})
    assert siglip.conversion_spec(Source(folder), SIDE).sizes.hidden_act == "gelu"


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 "),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_channels": 4}, "num_channels 4"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 1 of SigLIP: the tensors say 2"),
        ({"image_size": 64}, "image_size 64"),
        ({"layer_norm_eps": "no"}, "layer_norm_eps"),
        ({"use_qk_norm": True}, "use_qk_norm True"),
        ({"rope_theta": 100.0}, "rope_theta"),
        ({"model_type": "idefics3_vision"}, "vision tower of model_type 'idefics3_vision'"),
        ({"model_type": "siglip2_vision_model"}, "NaFlex"),
    ],
    ids=str,
)
def test_what_would_compute_something_else_is_named(towers, tmp_path, changes, message):
    _, tensors, config = towers["gelu_pytorch_tanh"]
    folder = written(tmp_path, tensors, config | changes)
    with pytest.raises(CheckpointError, match=message):
        siglip.conversion_spec(Source(folder), SIDE)


def test_odd_values_end_in_sentences(towers, tmp_path):
    _, tensors, config = towers["gelu"]
    odd = [None, True, -1, 0, 1e400, float("nan"), "x", [], [[]], {}, {"a": {}}]
    names, (timm, own) = [*config, "vision_config"], janus(tensors)
    for said, given in ((config, tensors), (own, timm), (own["vision_config"]["params"], timm)):
        folder = written(tmp_path, given, {})
        for name in [*names, *said]:
            for value in odd:
                inner = {**said, name: value}
                inner = {"vision_config": {"params": inner}} if "select_layer" in said else inner
                (folder / "config.json").write_text(json.dumps(inner))
                source = Source(folder)
                with contextlib.suppress(CheckpointError):
                    read_transformers(source, {"hidden_size": 128})
                with contextlib.suppress(CheckpointError):
                    read_janus(source, 128)


def test_left_out_heads_are_the_twelve_of_the_class(towers, tmp_path):
    """Not a guess from the width, which would be 2."""
    _, tensors, config = towers["gelu_pytorch_tanh"]
    del (config := dict(config))["num_attention_heads"]
    with pytest.raises(CheckpointError, match="num_attention_heads 12 .* does not divide .* 128"):
        siglip.conversion_spec(Source(written(tmp_path, tensors, config)), SIDE)


def test_without_a_config_json_nothing_is_guessed(towers, tmp_path):
    _, tensors, _ = towers["gelu"]
    for named in (tensors, to_timm(tensors)):
        with pytest.raises(CheckpointError, match="no config.json beside the weights"):
            siglip.conversion_spec(Source(written(tmp_path, named)), SIDE)
    with pytest.raises(CheckpointError, match="no tower of Janus"):
        siglip.conversion_spec(
            Source(written(tmp_path, to_timm(tensors), {"model_type": "timm"})), SIDE
        )


def test_siglip_2_of_free_resolution_is_named(tmp_path):
    config = Siglip2VisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        patch_size=16, num_patches=16,
    )  # fmt: skip
    random(Siglip2VisionModel(config)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="NaFlex.*google/siglip2-so400m-patch14-384"):
        siglip.conversion_spec(Source(tmp_path), 64)


def test_weight_folders_of_before_hold_the_tanh_form(towers, tmp_path):
    _, tensors, config = towers["gelu_pytorch_tanh"]
    features(written(tmp_path / "a", tensors, config), tmp_path / "out", image())
    told = json.loads((tmp_path / "out/config.json").read_text())
    del told["hidden_act"]
    (tmp_path / "out/config.json").write_text(json.dumps(told))
    spec = siglip.conversion_spec(Source(tmp_path / "a"), SIDE)
    assert weights.load_component(tmp_path / "out", "siglip", spec.sizes, spec.shapes)


def test_the_way_back_says_which_gelu():
    from htfa_jax.config import Config, override

    exact = override(Config(), {"siglip.hidden_act": "gelu"})
    assert siglip_config(exact)["hidden_act"] == "gelu"
    assert siglip_config(Config())["hidden_act"] == "gelu_pytorch_tanh"
