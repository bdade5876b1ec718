"""Reading checkpoints: folders, shards, single files, pickles, the hub; and what is refused."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from htfa_jax.checkpoints.hub import is_repository
from htfa_jax.common.hashing import file_sha256
from htfa_jax.errors import CheckpointError
from weights_convert.source import Source

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.ones(4, np.float16),
    "c.weight": np.full((2, 2), 1.5, ml_dtypes.bfloat16),
}


def sharded(folder):
    folder.mkdir(exist_ok=True)
    names = {key: f"model-0000{i}-of-00003.safetensors" for i, key in enumerate(TENSORS, 1)}
    for key, name in names.items():
        save_file({key: TENSORS[key]}, folder / name)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "thing"}')
    return folder


def check(source):
    assert sorted(source.keys) == sorted(TENSORS)
    for key, value in TENSORS.items():
        assert source.shape(key) == value.shape and source.dtype(key) == value.dtype
        read = source.read(key)
        assert read.dtype == value.dtype
        np.testing.assert_array_equal(read.astype(np.float32), value.astype(np.float32))


def test_shards_are_read_through_their_index(tmp_path):
    source = Source(sharded(tmp_path))
    check(source)
    assert source.config["model_type"] == "thing" and source.revision is None
    (file,) = source.hashes(["b.weight"])
    assert file == {
        "name": "model-00002-of-00003.safetensors",
        "sha256": file_sha256(tmp_path / "model-00002-of-00003.safetensors"),
    }


def test_single_files_and_folders_without_index(tmp_path):
    save_file(TENSORS, tmp_path / "weights.safetensors")
    check(Source(tmp_path))
    check(Source(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize("wrapping", [None, "state_dict", "model", "model_state_dict"])
def test_pickles_hold_tensors_in_the_usual_wrappings(tmp_path, wrapping):
    tensors = {
        k: torch.from_numpy(v.astype(np.float32)).to(
            {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[
                v.dtype.name
            ]
        )
        for k, v in TENSORS.items()
    }
    content = {**tensors, "epoch": 3} if wrapping is None else {wrapping: tensors, "epoch": 3}
    torch.save(content, tmp_path / "model.pt")
    check(Source(tmp_path / "model.pt"))
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    check(Source(tmp_path / "old.bin"))


class Trap:
    """What a pickle could do to its reader."""

    def __reduce__(self):
        return print, ("run by a pickle",)


def test_nothing_in_a_pickle_is_run(tmp_path, capsys):
    torch.save({"a": torch.ones(2), "b": Trap()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="nothing else in it is loaded"):
        Source(tmp_path / "model.pt")
    assert "run by a pickle" not in capsys.readouterr().out


def test_damaged_and_incomplete_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no file or folder"):
        Source(tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(CheckpointError, match="no weights in"):
        Source(tmp_path)
    with pytest.raises(CheckpointError, match="is no weight file"):
        Source(tmp_path / "readme.txt")

    folder = sharded(tmp_path / "shards")
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match="00002.* cannot be read; is it complete"):
        Source(folder).read("b.weight")
    save_file({"x": np.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match="lacks b.weight, which the index places there"):
        Source(folder).read("b.weight")
    shard.unlink()
    with pytest.raises(CheckpointError, match="names model-00002-of-00003.safetensors, which"):
        Source(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Source(folder)

    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("one", "two"):
        save_file({"a": np.zeros(1)}, twice / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="both hold a; name one"):
        Source(twice)

    (tmp_path / "broken.bin").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        Source(tmp_path / "broken.bin")
    save_file({"q": np.zeros(2, np.int8)}, tmp_path / "int8.safetensors")
    with pytest.raises(CheckpointError, match="q is of type I8; only .*quantised"):
        Source(tmp_path / "int8.safetensors").dtype("q")


def test_sparse_tensors_are_no_weights(tmp_path):
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a is of type torch.sparse_coo; only F64, F32"):
        Source(tmp_path / "a.pt").dtype("a")


def test_types_that_numpy_does_not_know_are_refused_before_they_are_read(tmp_path):
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    source = Source(tmp_path / "a.safetensors")
    for ask in (source.dtype, source.read):
        with pytest.raises(CheckpointError, match="a is of type F8_E4M3; only F64, F32, F16, BF16"):
            ask("a")


def test_safetensors_need_no_torch_and_pickles_say_how_to_get_it(tmp_path, monkeypatch):
    save_file(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / "a.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    check(Source(tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match=r"pip install 'htfa-jax\[convert\]'"):
        Source(tmp_path / "a.bin")


def test_the_hub_gives_files_of_one_commit_when_they_are_needed(tmp_path, monkeypatch):
    folder = sharded(tmp_path / "remote")
    fetched = []

    class Api:
        def model_info(self, repository, revision):
            from types import SimpleNamespace as Space

            assert (repository, revision) == ("someone/model", "v2")
            files = [*(p.name for p in folder.iterdir()), "onnx/model.onnx"]
            return Space(sha="c0ffee", siblings=[Space(rfilename=f) for f in files])

    def download(repository, name, revision):
        assert revision == "c0ffee"
        fetched.append(name)
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    source = Source("someone/model", "v2")
    assert source.revision == "c0ffee"
    source.read("c.weight")
    assert not [name for name in fetched if "00001" in name or "00002" in name]
    check(source)
    assert is_repository("google/siglip-so400m-patch14-384") and not is_repository(folder)


def test_a_hub_that_says_no_is_explained(monkeypatch):
    class Api:
        def model_info(self, repository, revision):
            raise OSError("401 Client Error")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(CheckpointError, match="neither a file or folder here nor a repository"):
        Source("someone/private")
