"""Weight files of others: types, axes and numbers that are no weights."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import tiny

from htfa_jax.checkpoints import weights
from htfa_jax.config import PretrainedConfig
from htfa_jax.errors import CheckpointError

SIZES = {"F4": 1, "F8_E4M3": 2, "F8_E5M2": 2, "I64": 16, "U8": 2, "U64": 16, "BOOL": 2, "C64": 16}


def file_of(path, dtype, shape, size):
    header = {"layer.kernel": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(size))


@pytest.mark.parametrize("dtype", SIZES)
def test_a_type_that_no_weights_have_is_named(tmp_path, dtype):
    file_of(tmp_path / weights.WEIGHTS, dtype, [2], SIZES[dtype])
    with pytest.raises(CheckpointError) as caught:
        weights.read_weights(tmp_path)
    said = str(caught.value)
    assert f"layer.kernel is of type {dtype}; only F64, F32, F16, BF16" in said or (
        "cannot be read" in said  # of those that the safetensors of today does not know
    )
    assert said.startswith(str(tmp_path / weights.WEIGHTS))


@pytest.mark.parametrize("dtype,size", [("F64", 8), ("F32", 4), ("F16", 2), ("BF16", 2)])
def test_types_of_weights_are_read(tmp_path, dtype, size):
    file_of(tmp_path / weights.WEIGHTS, dtype, [2, 1], 2 * size)
    assert weights.read_weights(tmp_path)["layer.kernel"].shape == (2, 1)


def test_a_hundred_axes_are_refused(tmp_path):
    file_of(tmp_path / weights.WEIGHTS, "F32", [1] * 100, 4)
    with pytest.raises(CheckpointError, match="layer.kernel has 100 axes; weights have at most 8"):
        weights.read_weights(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 2**20, 2**21])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value, at):
    array = np.zeros(2**21 + 1, np.float16)
    array[at] = value
    save_file({"a": np.zeros(3, np.float32), "b": array}, tmp_path / weights.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"weights.safetensors: b holds values that are not"):
        weights.read_weights(tmp_path)


def test_a_folder_whose_description_lies_is_a_sentence(tmp_path):
    base = tiny()
    weights.save_component(tmp_path / "vq", "vq", base.vq, {"a": np.zeros(2, np.float32)})
    path = tmp_path / "vq" / weights.CONFIG
    config = dataclasses.replace(base, pretrained=PretrainedConfig(vq=str(tmp_path / "vq")))
    told = json.loads(path.read_text())
    for wrong in ("x", None, [1], -1, 1e30, {"a": 1}, True):
        path.write_text(json.dumps(told | {"codebook_size": wrong}))
        with pytest.raises(CheckpointError):
            weights.load_component(
                tmp_path / "vq", "vq", weights.with_sizes(config, base).vq, {}, unused=".*"
            )


def test_levels_that_do_not_say_their_sizes(tmp_path):
    base = tiny()
    config = dataclasses.replace(base, pretrained=PretrainedConfig(htfa=str(tmp_path)))
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / weights.WEIGHTS)
    (tmp_path / weights.CONFIG).write_text('{"family": "htfa"}')
    for read in (
        lambda: weights.with_sizes(config, base),
        lambda: weights.load_levels(config, {}),
    ):
        with pytest.raises(CheckpointError, match="config.json lacks num_scales: convert the lev"):
            read()
