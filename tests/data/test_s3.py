"""A dataset in S3, against a server of its own on this machine."""

import itertools
import shutil

import fsspec
import jax
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from support import tiny, write_dataset

from htfa_jax.config import Config, override
from htfa_jax.data.convert import convert
from htfa_jax.data.pipeline import training_batches
from htfa_jax.data.splits import open_split, open_tokenizer
from htfa_jax.errors import DataError


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """(local folder, URL) of the tiny dataset."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir("bucket")
    folder = write_dataset(tmp_path_factory.mktemp("local"), 5).parent
    files.put(str(folder) + "/", "bucket/set/", recursive=True)
    yield folder, "s3://bucket/set"
    type(files).clear_instance_cache()  # connections to the server
    patch.undo()
    server.stop()


def batches(config, tokenizer):
    found = training_batches(config, open_split(config, "train"), tokenizer, 0, 2)
    result = list(itertools.islice(found, 4))
    found.close()
    return result


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.ids == b.ids
        jax.tree.map(np.testing.assert_array_equal, a.batch, b.batch)


@pytest.mark.slow
def test_training_from_s3(bucket, tmp_path):
    folder, url = bucket
    local = tiny(data__train=str(folder / "data.jsonl"), data__cache_dir=str(tmp_path / "cache"))
    tokenizer = open_tokenizer(local, tmp_path / "workdir", open_split(local, "train"))
    expected = batches(local, tokenizer)
    same(batches(override(local, {"data.train": f"{url}/data.jsonl"}), tokenizer), expected)
    # Records here, images there.
    shutil.copy(folder / "data.jsonl", tmp_path)
    mixed = {"data.train": str(tmp_path / "data.jsonl"), "data.image_root": url}
    same(batches(override(local, mixed), tokenizer), expected)
    # Packed shards.
    convert(str(folder / "data.jsonl"), tmp_path / "packed", shard_size=2, num_workers=1)
    files = fsspec.filesystem("s3")
    files.put(str(tmp_path / "packed") + "/", "bucket/packed/", recursive=True)
    for name in ("s3://bucket/packed", "s3://bucket/packed/*.array_record"):
        same(batches(override(local, {"data.train": name}), tokenizer), expected)


def test_what_is_missing_in_s3(bucket, tmp_path):
    _, url = bucket
    config = override(Config(), {"data.cache_dir": str(tmp_path)})
    with pytest.raises(DataError, match="no dataset at s3://bucket/set/none.jsonl"):
        open_split(override(config, {"data.train": f"{url}/none.jsonl"}), "train")
    fsspec.filesystem("s3").rm("bucket/set/orig1.png")
    records = open_split(override(config, {"data.train": f"{url}/data.jsonl"}), "train")
    with pytest.raises(FileNotFoundError):
        records[1].image_orig.read_bytes()
    assert records[2].image_orig.is_file() and not records[1].image_orig.is_file()
