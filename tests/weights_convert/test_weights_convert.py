"""Checkpoints of every naming, as transformers writes them, through the command and back."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from small_checkpoints import random, tensors_of, to_internlm2, to_timm
from support import tiny, write_dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from htfa_jax import train
from htfa_jax.checkpoints import weights
from htfa_jax.config import DecoderConfig, SigLIPConfig, load_config, override
from htfa_jax.config.io import save_config
from htfa_jax.errors import CheckpointError
from htfa_jax.models.factory import build_model
from weights_convert import internlm2, siglip
from weights_convert.__main__ import main, options
from weights_convert.convert import plan
from weights_convert.folder import write_folder
from weights_convert.source import Source

VISION = {
    "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "patch_size": 8, "image_size": 40,
}  # fmt: skip
LLAMA = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 68, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-3,
    "max_position_embeddings": 600, "attn_implementation": "eager",
}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 777.0}


def run(*arguments):
    main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of random weights, saved in shards."""
    folder = tmp_path_factory.mktemp("llama")
    model = random(LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=THETA)))
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A SiglipVisionModel of random weights."""
    folder = tmp_path_factory.mktemp("vision")
    random(SiglipVisionModel(SiglipVisionConfig(**VISION))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("grid,target", [(5, 5), (5, 8), (27, 32), (32, 27), (16, 28)])
def test_positions_are_resized_as_torch_does(grid, target):
    x = np.random.default_rng(0).standard_normal((grid * grid, 7)).astype(np.float32)
    square = torch.from_numpy(x.T.reshape(1, 7, grid, grid))
    expected = torch.nn.functional.interpolate(
        square, (target, target), mode="bicubic", align_corners=False, antialias=False
    )
    got = siglip.resize_positions(target)(x[None])
    np.testing.assert_allclose(got, expected.numpy().reshape(7, -1).T, atol=1e-4)


def test_siglip_with_its_text_tower(tmp_path, capsys):
    """The larger grid of positions too; `verify` runs transformers beside it."""
    text = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1,
            "num_attention_heads": 3, "vocab_size": 50}  # fmt: skip
    model = random(SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)))
    model.save_pretrained(tmp_path / "hf")
    run("siglip", tmp_path / "hf", tmp_path / "out", "--image_size", 64)
    run("verify", tmp_path / "out", "--source", tmp_path / "hf")
    assert "features: largest difference" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["image_size"] == 64 and config["num_heads"] == 4 and config["mlp_dim"] == 56
    told = json.loads((tmp_path / "out/conversion.json").read_text())
    assert told["ignored"]["the text tower; HTFA reads images"] > 10
    assert told["files"][0]["sha256"] and told["revision"] is None
    arrays = weights.read_weights(tmp_path / "out")
    assert arrays["position_embed"].shape == (64, 48)


@pytest.mark.slow
def test_siglip_inside_janus(tmp_path, capsys):
    """timm's names and Janus's configuration; other parts beside it are left alone."""
    vision = tmp_path / "vision"
    wide = VISION | {"hidden_size": 128, "num_attention_heads": 2, "hidden_act": "gelu"}
    random(SiglipVisionModel(SiglipVisionConfig(**wide))).save_pretrained(vision)
    tensors = to_timm(tensors_of(vision))
    save_file(
        tensors | {"gen_vision_model.x": np.zeros(2), "language_model.y": np.zeros(2)},
        tmp_path / "model.safetensors",
    )
    params = {"model_name": "siglip_large_patch16_384"}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"params": params}}))
    source = Source(tmp_path)
    spec = siglip.conversion_spec(source, 40)
    assert spec.sizes.num_heads == 2 and spec.sizes.hidden_act == "gelu"
    direct = siglip.conversion_spec(Source(vision), 40)
    assert direct.sizes == SigLIPConfig(8, 128, 3, 2, 56, hidden_act="gelu")
    write_folder(source, spec, tmp_path / "janus")
    write_folder(Source(vision), direct, tmp_path / "direct")
    run("verify", tmp_path / "janus", "--source", tmp_path)
    assert "features: largest difference" in capsys.readouterr().out
    ours, expected = (weights.read_weights(tmp_path / n) for n in ("janus", "direct"))
    assert ours.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


@pytest.mark.slow
def test_llama_names_through_shards(llama, tmp_path, capsys):
    run("internlm2", llama, tmp_path / "out")
    run("verify", tmp_path / "out", "--source", llama)
    shown = capsys.readouterr().out
    assert "KL divergence per token" in shown and "logits: largest difference" in shown
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == 777 and config["max_positions"] == 600
    assert "dropout" not in config


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_internlm2_names_alone_and_inside_internvl(llama, tmp_path, prefix, capsys):
    tensors = {prefix + k: v for k, v in to_internlm2(tensors_of(llama)).items()}
    config = {
        "model_type": "internlm2", "num_attention_heads": 6, "rope_theta": 777.0,
        "rms_norm_eps": 1e-3, "hidden_act": "silu", "max_position_embeddings": 600,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }  # fmt: skip
    if prefix:
        tensors["vision_model.embeddings.class_embedding"] = np.zeros((1, 1, 4), np.float32)
        tensors["mlp1.0.weight"] = np.zeros(4, np.float32)
        config = {"model_type": "internvl_chat", "llm_config": config, "vision_config": {}}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    run("internlm2", tmp_path, tmp_path / "out", "--num_layers", 2)
    run("verify", tmp_path / "out", "--source", tmp_path)
    assert json.loads((tmp_path / "out/config.json").read_text())["num_layers"] == 2
    if prefix:
        with pytest.raises(CheckpointError, match="InternViT.*not a SigLIP. Take google/siglip"):
            siglip.conversion_spec(Source(tmp_path))
    run("info", tmp_path)
    shown = capsys.readouterr().out
    assert "internlm2: yes" in shown and "siglip: no" in shown and "vq: no" in shown


def test_linear_rope_scaling_and_tied_heads(tmp_path):
    """Positions are divided; the LM head is the embedding."""
    rope = {"rope_type": "linear", "factor": 3.0, "rope_theta": 777.0}
    model = random(
        LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=rope, tie_word_embeddings=True))
    )
    model.save_pretrained(tmp_path / "hf")
    run("internlm2", tmp_path / "hf", tmp_path / "out")
    run("verify", tmp_path / "out", "--source", tmp_path / "hf")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_factor"] == 3.0 and config["tie_head"] is True
    assert "head.kernel" not in weights.read_weights(tmp_path / "out")
    yarn = json.loads((tmp_path / "hf/config.json").read_text())
    yarn["rope_parameters"]["rope_type"] = "yarn"
    (tmp_path / "hf/config.json").write_text(json.dumps(yarn))
    with pytest.raises(CheckpointError, match="rope scaling of type yarn"):
        internlm2.conversion_spec(Source(tmp_path / "hf"))


def test_longer_sequences_than_the_weights_can_read_are_refused():
    from htfa_jax.config import override
    from htfa_jax.errors import ConfigError

    with pytest.raises(ConfigError, match=r"up to 3920 tokens .* decoder.max_positions=3000"):
        override(load_config("standard"), {"decoder.max_positions": 3000})


@pytest.mark.parametrize(
    "line,expected",
    [
        ("preset standard b --revision vq=c0ffee", {"name": "standard", "compare": True}),
        ("siglip a b --image_size 40", {"out": Path("b"), "image_size": 40, "revision": None}),
        ("siglip --revision=v2 a b", {"out": Path("b"), "image_size": 448, "revision": "v2"}),
        ("vq a b --decoder_from c", {"out": Path("b"), "decoder_from": "c"}),
        ("internlm2 a b --num_layers 4", {"out": Path("b"), "num_layers": 4}),
        ("htfa a b", {"out": Path("b")}),
        ("info a --revision v2", {"revision": "v2"}),
        ("verify b --source a --decoder_from c", {"folder": Path("b"), "decoder_from": "c"}),
        ("to_hf r b", {"run": "r", "out": Path("b")}),
    ],
)
def test_commands_and_their_flags(line, expected):
    found = options(line.split())
    assert found.command == line.split()[0] and getattr(found, "source", "a") == "a"
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("line", ["", "siglip a", "verify b", "to_hf r", "unknown a b"])
def test_an_incomplete_command_ends_with_2(line):
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2


def test_verify_notices_a_wrong_weight_and_another_source(llama, tmp_path):
    run("internlm2", llama, tmp_path / "out")
    arrays = dict(weights.read_weights(tmp_path / "out"))
    arrays["norm.scale"] = arrays["norm.scale"] * 1.1
    save_file(arrays, tmp_path / "out" / weights.WEIGHTS)
    with pytest.raises(SystemExit):
        run("verify", tmp_path / "out", "--source", llama)
    other = tmp_path / "other"
    random(LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=THETA)), 1).save_pretrained(
        other, max_shard_size="60KB"
    )
    from weights_convert.verify import verify

    with pytest.raises(CheckpointError, match="is not the file that .* was made from"):
        verify(tmp_path / "out", Source(other))


def test_failed_conversions_leave_nothing(vision, tmp_path, monkeypatch):
    tensors = tensors_of(vision)
    (key,) = [k for k in tensors if "post_layernorm.weight" in k]
    out = tmp_path / "out"

    def attempt(changed, match):
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        save_file(changed, folder / "model.safetensors")
        (folder / "config.json").write_text((vision / "config.json").read_text())
        source = Source(folder)
        with pytest.raises(CheckpointError, match=match):
            write_folder(source, siglip.conversion_spec(source, 40), out)
        assert not out.exists() and not list(tmp_path.glob("out*"))

    attempt({**tensors, key: np.full_like(tensors[key], np.nan)}, f"not finite.*{key}")
    attempt({**tensors, "extra.weight": tensors[key]}, "tensor extra.weight is not used")
    attempt({k: v for k, v in tensors.items() if k != key}, "no tensor .*post_layernorm.weight")
    attempt({**tensors, key: tensors[key][:-1]}, r"post_norm.scale \(48,\) <- ")
    layer = next(k for k in tensors if "layers.1.layer_norm1.weight" in k)
    attempt({**tensors, layer: tensors[layer].astype(np.float16)}, "is float16, other layers")

    def full(self, *args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights.WeightWriter, "write", full)
        attempt(tensors, "out cannot be written: .*No space left")


@pytest.mark.slow
def test_safetensors_convert_without_torch(vision, tmp_path):
    program = f"""
import sys
from pathlib import Path

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from weights_convert.__main__ import main, options
main(["siglip", {str(vision)!r}, {str(tmp_path / "out")!r}, "--image_size", "40"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/weights.safetensors").is_file()


@pytest.mark.parametrize(
    "name,sizes,image_size",
    [
        ("so400m-patch14-384", SigLIPConfig(), 448),
        ("base-patch16-224", SigLIPConfig(16, 768, 12, 12, 3072), 224),
        ("large-patch16-384", SigLIPConfig(16, 1024, 24, 16, 4096), 384),
    ],
)
def test_published_siglips_have_the_shapes_that_the_tables_expect(name, sizes, image_size):
    with torch.device("meta"):
        model = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=sizes.embed_dim, intermediate_size=sizes.mlp_dim,
                num_hidden_layers=sizes.num_layers, num_attention_heads=sizes.num_heads,
                patch_size=sizes.patch_size, image_size=image_size,
            )
        )  # fmt: skip
    check_shapes(model, siglip.shapes(sizes, image_size), siglip.RULES, {r"head\..*": "pooling"})


@pytest.mark.parametrize(
    "sizes",
    [
        DecoderConfig(num_layers=24),  # InternLM2-1.8B
        DecoderConfig(num_layers=24, vocab_size=92553),  # inside InternVL2-2B
        DecoderConfig(92544, 4096, 32, 32, 8, 14336),  # InternLM2-7B
        DecoderConfig(92544, 6144, 48, 48, 8, 16384),  # InternLM2-20B
    ],
)
def test_published_internlm2s_have_the_shapes_that_the_tables_expect(sizes):
    shapes = {"model.norm.weight": (sizes.embed_dim,)}
    for name in ("model.tok_embeddings", "output"):
        shapes[f"{name}.weight"] = (sizes.vocab_size, sizes.embed_dim)
    head = sizes.embed_dim // sizes.num_heads
    for i in range(sizes.num_layers):
        layer = {
            "attention.wqkv": ((sizes.num_heads + 2 * sizes.num_kv_heads) * head, sizes.embed_dim),
            "attention.wo": (sizes.embed_dim, sizes.embed_dim),
            "feed_forward.w1": (sizes.mlp_dim, sizes.embed_dim),
            "feed_forward.w2": (sizes.embed_dim, sizes.mlp_dim),
            "feed_forward.w3": (sizes.mlp_dim, sizes.embed_dim),
            "attention_norm": (sizes.embed_dim,),
            "ffn_norm": (sizes.embed_dim,),
        }
        shapes |= {f"model.layers.{i}.{k}.weight": v for k, v in layer.items()}
    steps = plan(internlm2.shapes(sizes), ShapesOnly(shapes), internlm2.internlm2_rules(sizes), {})
    assert len(steps) == 3 + 9 * sizes.num_layers


class ShapesOnly:
    """A checkpoint of which only the shapes are there."""

    def __init__(self, shapes):
        self.shapes = shapes

    @property
    def keys(self):
        return list(self.shapes)

    def shape(self, key):
        return self.shapes[key]


def check_shapes(model, expected, rules, ignored):
    found = {k.removeprefix("vision_model."): tuple(v.shape) for k, v in model.state_dict().items()}
    assert plan(expected, ShapesOnly(found), rules, ignored)


@pytest.mark.slow
def test_training_takes_sizes_from_the_folders_and_goes_back_bit_for_bit(llama, vision, tmp_path):
    """Convert, train a step, write the run for PyTorch, convert that: the same weights."""
    run("siglip", vision, tmp_path / "siglip", "--image_size", 48)
    run("internlm2", llama, tmp_path / "internlm2")
    records = write_dataset(tmp_path / "data", 3)
    config = tiny(
        data__train=str(records), data__validation=None, data__test=None,
        data__cache_dir=str(tmp_path / "cache"), 
        level3__generation=False, loss__code_weight=0.0, train__max_steps=1,
    )  # fmt: skip
    save_config(config, tmp_path / "config.json")
    train.main([
        "--config", str(tmp_path / "config.json"), "--workdir", str(tmp_path / "run"),
        f"--config.pretrained.siglip={tmp_path / 'siglip'}",
        f"--config.pretrained.decoder={tmp_path / 'internlm2'}",
        f"--config.data.tokenizer={tokenizer_folder(tmp_path)}",
    ])  # fmt: skip
    used = load_config(tmp_path / "run")
    assert used.siglip == SigLIPConfig(8, 48, 3, 4, 56)
    assert used.decoder.embed_dim == 48 and used.decoder.num_layers == 3

    run("to_hf", tmp_path / "run", tmp_path / "hf")
    hf = tmp_path / "hf"
    theirs = SiglipVisionModel.from_pretrained(hf / "siglip")
    expected = SiglipVisionModel.from_pretrained(vision).state_dict()
    for name, value in theirs.state_dict().items():
        if "position" not in name:  # resized, and SigLIP is frozen: all else is what it was
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    run("siglip", hf / "siglip", tmp_path / "siglip2", "--image_size", 48)
    run("internlm2", hf / "internlm2", tmp_path / "internlm2b")
    from htfa_jax.checkpoints.loading import load_run

    _, params, _, _ = load_run(tmp_path / "run", lambda c: build_model(c).shapes)
    for part, folder in (("siglip", "siglip2"), ("decoder", "internlm2b")):
        again = weights.read_weights(tmp_path / folder)
        for path, value in again.items():
            np.testing.assert_array_equal(value, params[f"{part}.{path}"], err_msg=path)
    before = weights.read_weights(tmp_path / "internlm2")["norm.scale"]
    assert np.any(weights.read_weights(tmp_path / "internlm2b")["norm.scale"] != before)


def tokenizer_folder(tmp_path):
    from htfa_jax.data.tokenizer import train_tokenizer

    # At most the decoder's 300 words.
    train_tokenizer(["user assistant what color is it red blue"], 60, tmp_path / "tok")
    return tmp_path / "tok"


def test_flags_that_contradict_a_folder_are_refused(vision, tmp_path):
    run("siglip", vision, tmp_path / "siglip", "--image_size", 48)
    config = tiny()
    base = weights.with_sizes(
        override(config, {"pretrained.siglip": str(tmp_path / "siglip")}), config
    )
    assert base.siglip.embed_dim == 48 and base.siglip.num_layers == 3
    flagged = override(base, {"siglip.num_layers": 2})
    assert weights.with_sizes(flagged, config).siglip.num_layers == 3
    flagged = override(
        config, {"pretrained.siglip": str(tmp_path / "siglip"), "siglip.num_layers": 5}
    )
    assert weights.with_sizes(flagged, config).siglip.num_layers == 5
    shapes = {"x": jnp.zeros(1)}
    with pytest.raises(CheckpointError, match="num_layers: 3 in the folder, 5 in the conf"):
        weights.load_component(
            tmp_path / "siglip", "siglip", weights.with_sizes(flagged, config).siglip, shapes
        )
    with pytest.raises(CheckpointError, match="image_size: 48 in the folder, 56 in the conf"):
        weights.load_component(tmp_path / "siglip", "siglip", base.siglip, shapes, image_size=56)
