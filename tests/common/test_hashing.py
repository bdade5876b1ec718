"""Names by hash: those that caches have already."""

import hashlib

import pytest

from htfa_jax.common import hashing
from htfa_jax.common.hashing import block_hashes, file_sha256, short_hash


@pytest.mark.parametrize(
    "value, digits",
    [
        ([1, "converted", ["tiny", [["config.json", "ab"]]], 448], "002271123ef67423"),
        ([{"b": 1.0, "a": None}, (True, 1e-4), "ü"], "79ae450d3785ae95"),
        ({}, "44136fa355b3678a"),
    ],
)
def test_the_same_value_has_the_same_name_in_every_version(value, digits):
    assert short_hash(value) == digits


def test_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 250])
def test_a_large_file_by_blocks(tmp_path, length, monkeypatch):
    monkeypatch.setattr(hashing, "BLOCK", 100)
    monkeypatch.setattr(hashing, "PIECE", 30)
    content = bytes(range(250))[:length]
    (tmp_path / "a").write_bytes(content)
    expected = [hashlib.sha256(content[i : i + 100]).hexdigest() for i in range(0, length, 100)]
    assert block_hashes(tmp_path / "a") == expected
