"""Several datasets as one, each drawn from with its weight, and the order of training.

An epoch of a mixture is as many samples as its datasets have records together. Of these, each
dataset gives its weight's share, spread evenly; a dataset is gone through whole, in an order of its
own, before it begins again in another. So a small one may come several times in an epoch, and of a
large one a part, with the rest in the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from htfa_jax.data.records import Dataset, Record

if TYPE_CHECKING:
    import grain


class Mixture:
    """Datasets one behind the other; `training_order` draws from them by weight.

    Args:
      parts: the datasets.
      weights: of each, above 0; what counts is their ratio.
    """

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[float]):
        self.parts, self.weights = tuple(parts), tuple(weights)
        self.ends = np.cumsum([len(part) for part in parts])
        self.identity: list[Any] = [
            [part.identity, weight] for part, weight in zip(parts, weights, strict=True)
        ]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Record:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][int(index) - (int(self.ends[part - 1]) if part else 0)]

    def __repr__(self) -> str:
        parts = ", ".join(f"{w:g} of {p}" for p, w in zip(self.parts, self.weights, strict=True))
        return f"Mixture({parts})"


def training_order(records: Dataset, seed: int) -> grain.MapDataset:
    """Numbers of records without end, each epoch in another order; a function of the seed alone."""
    import grain  # a second that who only reads records need not wait

    if not isinstance(records, Mixture):
        return grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat()
    starts = [0, *records.ends[:-1].tolist()]
    orders = [
        grain.MapDataset.range(start, end).shuffle(seed=_seed(seed, part)).repeat()
        for part, (start, end) in enumerate(zip(starts, records.ends.tolist(), strict=True))
    ]
    return grain.MapDataset.mix(orders, records.weights).seed(seed)


def _seed(seed: int, part: int) -> int:
    """Another seed for each part, so that parts of one length have orders of their own."""
    return int(np.random.SeedSequence((seed, part)).generate_state(1)[0])
