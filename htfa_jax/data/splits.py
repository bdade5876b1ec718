"""The datasets and the tokenizer of a run: the user's files, or the embedded ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from htfa_jax.config import Config, DataConfig
from htfa_jax.data.held_out import FROM_TRAIN, held_out, part_of
from htfa_jax.data.records import EMBEDDED, Dataset, Split
from htfa_jax.data.sources.mixture import Mixture
from htfa_jax.data.sources.open import open_source
from htfa_jax.data.tokenizer import ChatTokenizer, train_tokenizer
from htfa_jax.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def cache_folder(data: DataConfig) -> Path:
    """Where embedded images and what is learned from them are kept."""
    return Path(data.cache_dir).expanduser()


def open_split(config: Config, split: Split) -> Dataset:
    """The records of a split: for training those of the mixture `data.sources`, if it is set.

    Raises DataError if there is no such split or file, or too few records to hold some out.
    """
    source = getattr(config.data, split)
    if split == "train" or source == FROM_TRAIN:
        return _from_training_data(config, split)
    if not source:
        raise DataError(f"data.{split} is not set: give a source, or {EMBEDDED}")
    return open_named(config, source, split)


def _from_training_data(config: Config, split: Split) -> Dataset:
    data = config.data
    if not data.sources:
        if not data.train:
            raise DataError(f"data.train is not set: give a source, or {EMBEDDED}")
        return part_of(open_named(config, data.train, "train"), split, data)
    names, weights = zip(*data.sources, strict=True)
    parts = [part_of(open_named(config, name, "train"), split, data) for name in names]
    return Mixture(parts, weights)


def open_named(config: Config, source: str, split: Split) -> Dataset:
    """The records of a source; the embedded dataset is made on first use. Raises DataError."""
    if source != EMBEDDED:
        return open_source(source, config.data, split)
    # The ray caster is loaded only where scenes are drawn.
    from htfa_jax.data.held_objects.builder import drawn_scenes

    folder, size = cache_folder(config.data), config.image_size
    return drawn_scenes(config.held_objects, size, split, folder)


def describe_training_data(config: Config) -> list[Any]:
    """What tells one training dataset from another, for the names of what is made from it.

    Of a file: where it is, its size, when it was written. Images that change under the same
    names are not noticed.
    """
    held, data = config.held_objects, config.data
    if data.train == EMBEDDED and not data.sources and not held_out(data):
        from htfa_jax.data.held_objects.scenes import RECIPE

        return [EMBEDDED, RECIPE, held.seed, held.num_train]
    template = [data.recon_template] if data.recon_template else []
    return [*open_split(config, "train").identity, data.image_root, *template]


def open_tokenizer(config: Config, workdir: Path, train: Dataset) -> ChatTokenizer:
    """The run's tokenizer, kept in its workdir.

    The first that exists: what the workdir holds, `data.tokenizer`, that of the run or decoder
    that weights come from, one trained on the text of the training data.
    """
    from htfa_jax.checkpoints.runs import find_run

    folder = workdir / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        if config.data.tokenizer is not None:
            ChatTokenizer(config.data.tokenizer).save(folder)
        elif config.pretrained.run is not None:
            ChatTokenizer(find_run(config.pretrained.run)[0] / "tokenizer").save(folder)
        elif config.pretrained.decoder is not None:
            ChatTokenizer(config.pretrained.decoder).save(folder)
        else:
            log.info("training a tokenizer on the text of %s", train)
            train_tokenizer(_texts(config.data, train), config.data.tokenizer_vocab_size, folder)
    tokenizer = ChatTokenizer(folder)
    if len(tokenizer) > config.decoder.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, more than "
            f"decoder.vocab_size={config.decoder.vocab_size}"
        )
    return tokenizer


def _texts(data: DataConfig, records: Dataset) -> Iterator[str]:
    for i in range(len(records)):
        try:
            turns = records[i].turns
        except DataError:
            if data.on_error == "raise":
                raise
            continue  # counted and logged when it is its turn to be trained on
        for turn in turns:
            # Role names too: the chat template writes one in every turn.
            yield from (turn.role, turn.text)
