"""Validation and test data out of the user's own records, which training then leaves out.

`data.validation=from_train` takes every tenth record of the training data, `data.test=from_train`
another tenth. Which ones depends on their numbers alone, so that a run that goes on, and another
machine, take the same.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import numpy as np

from htfa_jax.config import DataConfig
from htfa_jax.data.records import EMBEDDED, Dataset, Record, Split
from htfa_jax.errors import DataError

FROM_TRAIN = "from_train"
# Of so many records one goes to each split; which of them.
EVERY, PLACES = 10, {"validation": 0, "test": 1}

log = logging.getLogger(__name__)


class Part:
    """Some records of a dataset.

    Args:
      records: all of them.
      numbers: of those that it holds, rising.
      name: of the part, for messages.
    """

    def __init__(self, records: Dataset, numbers: np.ndarray, name: str):
        self.records, self.numbers, self.name = records, numbers, name
        self.identity: list[Any] = [records.identity, name]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        return self.records[int(self.numbers[index])]

    def __repr__(self) -> str:
        return f"{self.name} of {self.records} ({len(self)} records)"


def held_out(data: DataConfig) -> list[str]:
    """The splits that are taken out of the training data."""
    return [split for split in PLACES if getattr(data, split) == FROM_TRAIN]


def part_of(records: Dataset, split: Split, data: DataConfig) -> Dataset:
    """A split's part of the records that `data.train` names: all of them if none is held out.

    Raises DataError if there are too few to hold some out.
    """
    out = {name: PLACES[name] for name in held_out(data)}
    if not out:
        return records
    if len(records) <= max(out.values()) + 1:
        raise DataError(
            f"{records} has {len(records)} records, too few to take {' and '.join(out)} data from: "
            + " ".join(f"--config.data.{name}=None" for name in out)
        )
    place = np.arange(len(records)) % EVERY
    taken = ~np.isin(place, list(out.values())) if split == "train" else place == out[split]
    others = " and ".join(out)
    name = f"all but {others}" if split == "train" else f"one in {EVERY}, as {split},"
    return Part(records, np.flatnonzero(taken), name)


def own_splits(data: DataConfig, given: Collection[str]) -> dict[str, Any]:
    """What else changes where a command names its own training data, and a preset named drawn data.

    A preset's `data.validation` and `data.test` are drawn scenes, which say nothing about the
    user's own records. With neither of them given, both become parts of these; with one, the
    other is left out. It is said.

    Args:
      data: with what the command gives.
      given: names of the fields that it gives, such as `data.train`.

    Returns the fields that change, by dotted name.
    """
    own = {"data.train", "data.sources"} & set(given)
    if not own or (data.train == EMBEDDED and not data.sources):
        return {}
    drawn = [
        split
        for split in PLACES
        if getattr(data, split) == EMBEDDED and f"data.{split}" not in given
    ]
    if not drawn:
        return {}
    neither = not any(f"data.{split}" in given for split in PLACES)
    names = " and ".join(f"data.{split}" for split in drawn)
    if neither:
        log.warning(
            "%s of the preset are drawn scenes: instead %s the training data are held out for it. "
            "Others: --config.data.validation=FILE --config.data.test=FILE (or None)",
            names,
            "a tenth of" if len(drawn) == 1 else "a tenth each of",
        )
    else:
        log.warning("%s of the preset is drawn scenes: left out, as your own data is given", names)
    return {f"data.{split}": FROM_TRAIN if neither else None for split in drawn}
