"""What people have instead of weights: pointers, web pages, trainers' pickles, adapters, gaps."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers.training_args import OptimizerNames

from htfa_jax.errors import CheckpointError
from weights_convert import htfa, internlm2, siglip, vq
from weights_convert.source import Source

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3512\n"
ONE = {"a.weight": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"],
)
def test_pointers_of_git_lfs_are_named(tmp_path, name):
    save_file(ONE, tmp_path / "model.safetensors")
    if name == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    if "index" in name:
        (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a pointer of git-lfs.*git lfs pull"):
        Source(tmp_path)


@pytest.mark.parametrize("start", [b"<!DOCTYPE html>\n<html>", b"\n <html lang='en'>"])
@pytest.mark.parametrize("name", ["model.safetensors", "a.bin"])
def test_web_pages_are_named(tmp_path, start, name):
    (tmp_path / name).write_bytes(start + b"<body>blob</body>")
    with pytest.raises(CheckpointError, match="is a web page.*/resolve/"):
        Source(tmp_path / name)


def test_what_a_server_answered_instead_is_quoted(tmp_path):
    (tmp_path / "model.safetensors").write_text("Access to model meta-llama is restricted.")
    with pytest.raises(CheckpointError, match="holds the text 'Access to model meta-llama"):
        Source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is it complete"):
        Source(tmp_path)


def trainer_folder(folder, names=("pytorch_model.bin",)):
    folder.mkdir()
    for number, name in enumerate(names):
        torch.save({f"{'abc'[number]}.weight": torch.ones(2)}, folder / name)
    torch.save({"optim": OptimizerNames.ADAMW_TORCH}, folder / "training_args.bin")
    torch.save({"state": {0: torch.ones(2)}}, folder / "optimizer.pt")
    torch.save({"last_epoch": 500}, folder / "scheduler.pt")
    torch.save({"python": (3, (1, 2), None)}, folder / "rng_state.pth")
    torch.save({"python": (3, (1, 2), None)}, folder / "rng_state_0.pth")
    torch.save({"scale": 2.0}, folder / "scaler.pt")
    return folder


def test_a_folder_of_a_trainer_is_its_weights(tmp_path):
    assert Source(trainer_folder(tmp_path / "a")).keys == ["a.weight"]
    assert Source(trainer_folder(tmp_path / "b", ["mine.pt"])).keys == ["a.weight"]
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    assert Source(trainer_folder(tmp_path / "c", shards)).keys == ["a.weight", "b.weight"]
    with pytest.raises(CheckpointError, match=r"no weights in .*optimizer.pt.* a training's state"):
        Source(trainer_folder(tmp_path / "d", []))


def test_a_pickle_of_something_else_is_told_without_pytorchs_advice(tmp_path):
    folder = trainer_folder(tmp_path / "a")
    with pytest.raises(CheckpointError, match="OptimizerNames.*state_dict") as told:
        Source(folder / "training_args.bin")
    assert "weights_only" not in str(told.value)


def test_gaps_between_shards_are_seen_without_an_index(tmp_path):
    for i in (1, 3):
        save_file(
            {f"{i}.weight": np.ones(2, np.float32)}, tmp_path / f"m-0000{i}-of-00003.safetensors"
        )
    with pytest.raises(CheckpointError, match=r"lacks m-00002-of-00003.safetensors.*download"):
        Source(tmp_path)


def test_the_usual_names_go_first_and_two_sets_of_weights_are_refused(tmp_path):
    for name in ("model", "model.fp16", "consolidated"):
        save_file({f"{name}.weight": np.ones(2, np.float32)}, tmp_path / f"{name}.safetensors")
    assert Source(tmp_path).keys == ["model.weight"]
    index = {"weight_map": {"model.weight": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="one is left over from before"):
        Source(tmp_path)


ADAPTER = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 4), np.float32),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": np.ones((4, 2), np.float32),
}
SPECS = [
    internlm2.conversion_spec,
    siglip.conversion_spec,
    vq.conversion_spec,
    htfa.conversion_spec,
]


@pytest.mark.parametrize("spec_of", SPECS)
def test_an_adapter_is_named_and_never_dropped(tmp_path, spec_of):
    model = tmp_path / "beside"
    model.mkdir()
    save_file(ONE, model / "model.safetensors")
    save_file(ADAPTER, model / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"LoRA adapter beside.*adapter_model.*merge it"):
        spec_of(Source(model))
    with pytest.raises(CheckpointError, match="is a LoRA adapter alone.*merge_and_unload"):
        spec_of(Source(model / "adapter_model.safetensors"))
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is a LoRA adapter alone"):
        spec_of(Source(model))
    inside = {k.replace("base_model.", "language_model.base_model."): v for k, v in ADAPTER.items()}
    base = "language_model.base_model.model.model.layers.0.attention.wqkv.base_layer.weight"
    save_file(inside | ONE | {base: np.ones((4, 4), np.float32)}, model / "model.safetensors")
    (model / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"LoRA adapter beside its weights \(3 tensors"):
        spec_of(Source(model))


def test_names_that_only_contain_the_letters_are_no_adapter(tmp_path):
    save_file({"floral.weight": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no InternLM2"):
        internlm2.conversion_spec(Source(tmp_path))
