"""What a mixture draws, and in which order."""

import collections
import itertools
import json

import jax
import numpy as np
import pytest
from support import tiny, write_dataset

from htfa_jax.data.pipeline import training_batches
from htfa_jax.data.sources.mixture import Mixture, training_order
from htfa_jax.data.splits import open_split, open_tokenizer


class Numbers:
    """A dataset whose records are numbers."""

    def __init__(self, num):
        self.num, self.identity = num, [num]

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return index


def drawn(seed=0, start=0, num=84, weights=(1.0, 2.5)):
    """Numbers 0 to 6 are of the first dataset, 7 to 9 of the second."""
    order = training_order(Mixture([Numbers(7), Numbers(3)], weights), seed)
    return [order[i] for i in range(start, start + num)]


@pytest.mark.slow
def test_each_part_gives_its_share_evenly():
    found = np.array(drawn(num=700)) >= 7
    assert found.sum() == 500
    so_far = np.cumsum(found) - np.arange(1, 701) * 2.5 / 3.5
    assert np.abs(so_far).max() < 1, "no stretch of the run has another share"
    assert drawn(weights=(2, 5)) == drawn()


def test_each_part_is_gone_through_before_it_begins_again():
    found = drawn()
    for part, size in ((range(7), 7), (range(7, 10), 3)):
        own = [i for i in found if i in part]
        passes = [tuple(own[i : i + size]) for i in range(0, len(own) - size + 1, size)]
        assert all(sorted(p) == list(part) for p in passes)
        assert len(set(passes)) > 1, "in another order each time"


@pytest.mark.slow
def test_the_order_depends_on_the_seed_and_the_samples_seen_alone():
    assert drawn() == drawn() != drawn(seed=1)
    assert drawn(start=31, num=20) == drawn()[31:51]


def test_parts_of_one_length_have_orders_of_their_own():
    order = training_order(Mixture([Numbers(9), Numbers(9)], [1, 1]), 0)
    first = [order[i] for i in range(18)]
    a, b = ([i % 9 for i in first if (i < 9) == is_first] for is_first in (True, False))
    assert sorted(a) == sorted(b) and a != b


def test_numbers_of_records():
    mixture = Mixture([Numbers(7), Numbers(3)], [1, 1])
    assert len(mixture) == 10
    assert [mixture[i] for i in range(10)] == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]


@pytest.fixture
def mixed(tmp_path):
    """A configuration of two datasets with other ids."""
    for name, num in (("a", 5), ("b", 3)):
        path = write_dataset(tmp_path / name, num, seed=num)
        records = [json.loads(line) for line in path.read_text().splitlines()]
        named = [{**record, "id": name + record["id"]} for record in records]
        path.write_text("".join(json.dumps(record) + "\n" for record in named))
    sources = [[str(tmp_path / "a" / "data.jsonl"), 1.0], [str(tmp_path / "b" / "data.jsonl"), 1.0]]
    return tiny(data__sources=sources, data__drop_recon=0.5)


def batches(config, source, start, num, samples=4, share=(0, 1)):
    found = training_batches(config, *source, start * samples, samples, share)
    result = list(itertools.islice(found, num))
    found.close()
    return result


def test_training_on_a_mixture(mixed, tmp_path):
    records = open_split(mixed, "train")
    source = records, open_tokenizer(mixed, tmp_path / "workdir", records)
    whole = batches(mixed, source, 0, 6)
    counts = collections.Counter(i[0] for loaded in whole for i in loaded.ids)
    assert counts == {"a": 12, "b": 12}
    for loaded in whole:
        assert [records[int(i)].id for i in loaded.batch.index] == loaded.ids
    for late, loaded in zip(batches(mixed, source, 2, 4), whole[2:], strict=True):
        assert late.ids == loaded.ids
        jax.tree.map(np.testing.assert_array_equal, late.batch, loaded.batch)
    shares = [batches(mixed, source, 0, 6, share=(part, 2)) for part in range(2)]
    for parts, loaded in zip(zip(*shares, strict=True), whole, strict=True):
        assert sorted(parts[0].ids + parts[1].ids) == sorted(loaded.ids)
