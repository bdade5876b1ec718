"""What a checkpoint says of itself is checked field by field."""

import json

import jax.numpy as jnp
import pytest

from htfa_jax.checkpoints import integrity
from htfa_jax.checkpoints.manager import Checkpoints
from htfa_jax.checkpoints.meta import FILE, read_meta
from htfa_jax.errors import CheckpointError

GOOD = {"step": 7, "samples": 8, "frozen": {"vq": "vq-0"}, "window": [{"loss": 1.0}], "key": "k"}


def written(folder, content):
    path = folder / "7" / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder / "7"


def test_what_is_right_is_read(tmp_path):
    assert read_meta(written(tmp_path, GOOD)) == GOOD
    assert read_meta(written(tmp_path, {})).get("window", []) == []


WRONG = {
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "frozen a list": GOOD | {"frozen": ["vq"]},
    "frozen a number": GOOD | {"frozen": 5},
    "frozen of numbers": GOOD | {"frozen": {"vq": 5}},
    "another step": GOOD | {"step": 8},
    "no step": GOOD | {"step": "7"},
    "half a step": GOOD | {"step": 7.5},
    "below 0": GOOD | {"samples": -1},
    "too many": GOOD | {"samples": 10**30},
    "window of texts": GOOD | {"window": [{"loss": "x"}]},
    "window of other names": GOOD | {"window": [{"loss": 1.0}, {"x": 1.0}]},
    "window a number": GOOD | {"window": 3},
    "key": GOOD | {"key": [1]},
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(tmp_path, content):
    with pytest.raises(CheckpointError, match=f"{tmp_path}/7/meta/metadata"):
        read_meta(written(tmp_path, content))


def test_a_field_that_is_missing_is_named_where_it_is_used(tmp_path):
    meta = read_meta(written(tmp_path, {"step": 7}))
    with pytest.raises(CheckpointError, match="meta/metadata lacks frozen: take another"):
        meta["frozen"]


@pytest.mark.parametrize("content", [b"[]", b'{"step": 2, "frozen": [1]}', b"[" * 100_000])
def test_a_checkpoint_with_hashes_that_fit_is_refused_too(tmp_path, content):
    """Whoever can write a checkpoint can write its hashes."""
    state = {"step": jnp.int32(2), "params": {"w": jnp.ones(2)}, "opt_state": {"m": jnp.ones(2)}}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, {"frozen": {}})
    folder = tmp_path / "checkpoints/2"
    with Checkpoints(tmp_path, keep=1, read_only=True) as checkpoints:
        assert checkpoints.restore(2)["meta"] == {"frozen": {}, "step": 2}
    (folder / FILE).write_bytes(content)
    (folder / integrity.HASHES).unlink()
    integrity.write_hashes(folder)
    with (
        Checkpoints(tmp_path, keep=1, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="checkpoints/2/meta/metadata"),
    ):
        checkpoints.restore(2)
