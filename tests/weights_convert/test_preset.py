"""One command for the published weights of a preset, against a hub of small files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import COMMIT, hub
from safetensors.numpy import save_file
from small_checkpoints import random, tensors_of, to_internlm2, written
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from htfa_jax.config import load_config
from htfa_jax.config.io import preset_names
from htfa_jax.data.tokenizer import train_tokenizer
from htfa_jax.errors import CheckpointError
from weights_convert.preset import BROUGHT, SIGLIP, _needs, fetch_preset, published_for

ROOT = Path(__file__).parents[2]
LLAMA = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 600,
    "tie_word_embeddings": False,
}  # fmt: skip


def publish(folder):
    """The three repositories of `standard`, small, with the names and files of the real ones."""
    vision = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 1,
              "num_attention_heads": 4, "patch_size": 14, "image_size": 56}  # fmt: skip
    text = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1,
            "num_attention_heads": 3, "vocab_size": 50}  # fmt: skip
    model = random(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))
    model.save_pretrained(folder / "google/siglip-so400m-patch14-384")
    sizes = JanusVQVAEConfig(
        base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, latent_channels=12,
        embed_dim=6, num_embeddings=20, num_patches=4, double_latent=False,
    )  # fmt: skip
    state = random(JanusVQVAE(sizes)).state_dict()
    tensors = {f"gen_vision_model.{k}": v.numpy() for k, v in state.items()}
    tensors["language_model.lm_head.weight"] = np.ones((4, 2), np.float32)
    written(folder / "deepseek-ai/Janus-1.3B", tensors, {"model_type": "multi_modality"})
    language = folder / "internlm/internlm2-1_8b"
    random(LlamaForCausalLM(LlamaConfig(**LLAMA))).save_pretrained(language)
    tensors = to_internlm2(tensors_of(language))
    (language / "model.safetensors").unlink()
    late = {k for k in tensors if "layers.4." in k or "layers.5." in k}
    where = {k: f"model-0000{2 if k in late else 1}-of-00002.safetensors" for k in tensors}
    for name in set(where.values()):
        save_file({k: v for k, v in tensors.items() if where[k] == name}, language / name)
    index = {"metadata": {}, "weight_map": where}
    (language / "model.safetensors.index.json").write_text(json.dumps(index))
    told = {k: v for k, v in LLAMA.items()} | {"model_type": "internlm2", "bias": False}
    (language / "config.json").write_text(json.dumps(told))
    (language / "modeling_internlm2.py").write_text("raise SystemExit('run')\n")
    train_tokenizer(["what color is it red blue"], 60, language)
    return folder


def command(address, tmp_path, *words):
    """The command with this hub and a cache of its own."""
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"),
           "HF_HUB_DISABLE_XET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}  # fmt: skip
    env.pop("HF_HUB_OFFLINE", None)
    arguments = ["preset", "standard", "weights", *words]
    done = subprocess.run(
        [sys.executable, "-m", "weights_convert", *arguments],
        capture_output=True, text=True, cwd=tmp_path, env=env,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_standard_is_fetched_converted_compared_and_done_once(tmp_path):
    janus = "Janus-1.3B/model.safetensors"
    with hub(publish(tmp_path / "published")) as (address, asked):
        code, said, _ = command(address, tmp_path, "--dry_run")
        assert code == 0 and not (tmp_path / "weights").exists()
        assert f"deepseek-ai/Janus-1.3B at {COMMIT}" in said and "to download" in said
        assert not [name for name in asked["files"] if name.endswith(".safetensors")]

        asked["broken"].append("model.safetensors")  # of SigLIP and Janus
        code, _, why = command(address, tmp_path, "--no_compare")
        assert code == 2 and "cannot be fetched" in why

        asked["broken"].clear()
        code, said, why = command(address, tmp_path)
        assert code == 0, why
        assert said.count("computes what") == 3
        assert "--config standard" in said and "--config.pretrained.vq=weights/vq" in said
        assert "internlm2-1_8b/model-00002-of-00002.safetensors" not in asked["files"]
        assert not [name for name in asked["files"] if name.endswith(".py")]
        record = json.loads((tmp_path / "weights/revisions.json").read_text())
        assert {c: r["revision"] for c, r in record.items()} == dict.fromkeys(record, COMMIT)
        assert len(record) == 3
        decoder = json.loads((tmp_path / "weights/internlm2/config.json").read_text())
        assert decoder["num_layers"] == 4 and decoder["vocab_size"] == 300
        assert (tmp_path / "weights/internlm2/tokenizer.json").is_file()
        assert asked["files"].count(janus) == 1
        # The table's commit is asked for, and whatever was taken where it has none.
        assert (SIGLIP.repository, SIGLIP.revision) in asked["revisions"]

        asked["files"].clear()
        code, said, _ = command(address, tmp_path, "--revision", f"siglip={COMMIT}")
        assert code == 0 and said.count("is there already") == 3 and not asked["files"]
        code, _, why = command(address, tmp_path, "--revision", "vq=nothing")
        assert code == 2 and "no such revision" in why


@pytest.mark.parametrize("name", [n for n in preset_names() if n not in BROUGHT])
def test_every_preset_has_published_components_of_its_shape(name):
    found, config = published_for(name), load_config(name)
    assert [p.component for p in found] == ["siglip", "vq", "decoder"]
    wide = "InternVL2-8B" in found[2].repository
    assert (config.decoder.embed_dim == 4096) == wide


def test_what_is_wrong_is_said_before_anything_is_fetched(tmp_path, monkeypatch):
    for name, message in (
        ("debug", "come with the package"),
        ("huge", "no preset huge; there are"),
    ):
        with pytest.raises(CheckpointError, match=message):
            published_for(name)
    with pytest.raises(
        CheckpointError, match="--revision vq: expected COMPONENT=COMMIT, of siglip"
    ):
        fetch_preset("standard", tmp_path, ["vq"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"htfa-jax\[convert\].*or --no_compare"):
        fetch_preset("standard", tmp_path)


def test_layers_that_are_not_taken_are_not_downloaded():
    published, config = published_for("standard")[2], load_config("standard")
    assert _needs(published, config, "model.layers.3.ffn_norm.weight")
    assert not _needs(published, config, "model.layers.4.ffn_norm.weight")
    assert _needs(published, config, "output.weight")


def test_a_disk_without_room_is_told(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from weights_convert import preset

    fetch = preset.Fetch(SIGLIP, COMMIT, {"model.safetensors": 3_500_000_000}, [], 1_700_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(CheckpointError, match=r"1.0 GB free, and .* GB are needed: make room"):
        preset._say([fetch], tmp_path)
