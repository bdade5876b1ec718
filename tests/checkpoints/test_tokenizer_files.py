"""A run's tokenizer is the one that its checkpoints were trained with."""

import pytest

from htfa_jax.checkpoints.tokenizer_files import KEY, check_tokenizer, tokenizer_hashes
from htfa_jax.errors import CheckpointError


@pytest.fixture
def meta(tmp_path):
    """What a checkpoint says of the tokenizer in `tmp_path`."""
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer" / name).write_text(name)
    return {"step": 3, KEY: tokenizer_hashes(tmp_path)}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_changed_added_or_missing_file_is_named(tmp_path, meta, name):
    check_tokenizer(tmp_path, meta)
    (tmp_path / "tokenizer" / name).write_text("other")
    with pytest.raises(CheckpointError, match=rf"tokenizer/{name} is not what checkpoint 3 was"):
        check_tokenizer(tmp_path, meta)
    (tmp_path / "tokenizer" / name).unlink()
    if name in meta[KEY]:
        with pytest.raises(CheckpointError, match=r"SHA-256 \w{12}\.\.\. expected, no such file"):
            check_tokenizer(tmp_path, meta)


def test_a_checkpoint_of_an_older_version_fits_any(tmp_path, meta):
    (tmp_path / "tokenizer/tokenizer.json").write_text("other")
    check_tokenizer(tmp_path, {"step": 3})
