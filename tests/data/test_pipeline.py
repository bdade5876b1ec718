import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import time

import jax
import numpy as np
import pytest
from support import tiny, write_dataset

from htfa_jax.data.pipeline import evaluation_batches, num_steps, samples_per_step, training_batches
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.data.splits import open_tokenizer
from htfa_jax.errors import DataError, TrainingError

# All that is random in a training sample.
RANDOM = {
    "data__drop_recon": 0.5,
    "augment__crop": 0.3,
    "augment__flip": 0.5,
    "augment__brightness": 0.2,
}


@pytest.fixture(scope="module")
def source(dataset, tmp_path_factory):
    """(records, tokenizer) of the tiny dataset."""
    records = RecordFile(dataset)
    return records, open_tokenizer(tiny(), tmp_path_factory.mktemp("workdir"), records)


def take(config, source, start, num, samples=2):
    batches = training_batches(config, *source, start * samples, samples)
    found = list(itertools.islice(batches, num))
    batches.close()
    return found


def same(a, b):
    assert a.ids == b.ids
    jax.tree.map(np.testing.assert_array_equal, a.batch, b.batch)


def test_each_epoch_is_another_order_of_every_record(source):
    ids = [i for loaded in take(tiny(), source, 0, 7) for i in loaded.ids]
    first, second = ids[:7], ids[7:]
    assert sorted(first) == sorted(second) == sorted(f"r{i}" for i in range(7))
    assert first != second
    assert ids != [i for loaded in take(tiny(seed=1), source, 0, 7) for i in loaded.ids]


def test_batches_of_one_are_the_same_order(source):
    ones = [i for loaded in take(tiny(), source, 0, 6, samples=1) for i in loaded.ids]
    assert ones == [i for loaded in take(tiny(), source, 0, 3) for i in loaded.ids]


def test_starting_late_gives_the_batches_that_would_have_come(source):
    """Random drops of the reconstruction and augmentation included; threads do not matter."""
    config = tiny(**RANDOM)
    whole = take(config, source, 0, 9)
    assert {bool(x) for loaded in whole for x in loaded.batch.has_recon} == {True, False}
    one_thread = tiny(**RANDOM, data__num_threads=1)
    for a, b in zip(whole[4:], take(one_thread, source, 4, 5), strict=True):
        same(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_going_on_with_other_workers_gives_the_batches_that_would_have_come(source, workers):
    """From the middle of an epoch into the next, all that is random included."""
    config = tiny(**RANDOM)
    expected = take(config, source, 2, 4)
    changed = tiny(**RANDOM, data__num_workers=workers)
    with contextlib.closing(training_batches(changed, *source, 4, 2)) as batches:
        for a, b in zip(expected, itertools.islice(batches, 4), strict=True):
            same(a, b)
        assert len(multiprocessing.active_children()) >= workers


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_processes_share_an_update_whatever_their_number(source, parts):
    """Row by row what one process would see, from the middle of an epoch over several more."""
    config = tiny(**RANDOM)
    steps, samples, start = 6, 6, 2
    whole = take(config, source, start, steps, samples)
    found = []
    for part in range(parts):
        batches = training_batches(config, *source, start * samples, samples, (part, parts))
        found.append(list(itertools.islice(batches, steps)))
        batches.close()
    for step, expected in enumerate(whole):
        assert sorted(expected.ids) == sorted(i for part in found for i in part[step].ids)
        for part in range(parts):
            rows = jax.tree.map(lambda x, part=part: x[part::parts], expected.batch)
            assert found[part][step].ids == expected.ids[part::parts]
            jax.tree.map(np.testing.assert_array_equal, found[part][step].batch, rows)
    # Every epoch that lies in these steps whole has every record once, over all processes.
    ids = [i for step in range(steps) for row in range(samples // parts)
           for part in range(parts) for i in [found[part][step].ids[row]]]  # fmt: skip
    for epoch in (2, 3, 4):
        begin = 7 * epoch - start * samples
        assert sorted(ids[begin : begin + 7]) == [f"r{i}" for i in range(7)]


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("max_samples", [None, 5, 1])
def test_processes_share_an_evaluation_and_none_is_lost(source, parts, max_samples):
    config = tiny(eval__batch_size=1)
    found = [
        list(evaluation_batches(config, *source, max_samples, num_shards=4, share=(part, parts)))
        for part in range(parts)
    ]
    # As many batches in each, or they would wait for each other for ever.
    assert len({len(batches) for batches in found}) == 1
    ids = [i for batches in found for loaded in batches for i in loaded.ids if i]
    assert sorted(ids) == [f"r{i}" for i in range(max_samples or 7)]
    for batches in found:
        for loaded in batches:
            real = np.array([bool(i) for i in loaded.ids])
            np.testing.assert_array_equal(loaded.batch.weight, real)
            np.testing.assert_array_equal(loaded.batch.index >= 0, real)
            assert len(loaded.ids) == 4 // parts
            # Padding has nothing that a metric could count.
            assert not loaded.batch.loss_mask[~real].any()
            assert not loaded.batch.has_target[~real].any()


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_with_the_reason(source):
    batches = training_batches(tiny(data__num_workers=2), *source, 0, 2)
    try:
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(TrainingError, match=r"killed, .* exit code -9.*data.num_workers \(2 "):
            for _ in range(1000):
                next(batches)
        assert time.monotonic() - started < 30
    finally:
        batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_batches_are_read_ahead(source, threads):
    """Behind one batch those of two updates a thread are read, before anybody asks for them."""
    records, tokenizer = source
    read = []

    class Watched(type(records)):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    batches = training_batches(
        tiny(data__num_threads=threads), Watched(records.path), tokenizer, 0, 2
    )
    try:
        next(batches)
        deadline = time.monotonic() + 10
        wanted = 2 * (1 + 2 * threads)
        while len(read) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(read) >= wanted
        time.sleep(0.1)
        assert len(read) <= wanted + 2 * (threads + 1)  # those under way
    finally:
        batches.close()


@pytest.mark.slow
def test_a_image_that_disappears_under_way_is_told_from_a_worker(tmp_path, source):
    records = RecordFile(write_dataset(tmp_path, 7))
    batches = training_batches(tiny(data__num_workers=1), records, source[1], 0, 2)
    try:
        next(batches)
        for i in range(7):
            (tmp_path / f"orig{i}.png").unlink()
        with pytest.raises(DataError, match=r"record \d \(id r\d\): image_orig: no file") as caught:
            for _ in range(1000):
                next(batches)
        assert caught.value.kind == "missing image"
    finally:
        batches.close()


def test_labels_are_the_next_tokens_of_the_assistant(source):
    records, tokenizer = source
    batch = take(tiny(), source, 0, 1)[0].batch
    for row in range(2):
        encoded = tokenizer.encode(records[int(batch.index[row])].turns)
        length = len(encoded.tokens)
        np.testing.assert_array_equal(batch.tokens[row, :length], encoded.tokens)
        np.testing.assert_array_equal(batch.labels[row, : length - 1], encoded.tokens[1:])
        np.testing.assert_array_equal(batch.loss_mask[row, : length - 1], encoded.learned[1:])
        assert not batch.loss_mask[row, length - 1 :].any()
        assert np.all(batch.tokens[row, length:] == tokenizer.pad_id)


def test_text_is_padded_to_the_first_bucket_that_holds_it(source):
    buckets = tiny(data__text_buckets=(8, 64, 100), data__max_text_length=100)
    assert take(buckets, source, 0, 1)[0].batch.tokens.shape == (2, 64)
    assert take(tiny(), source, 0, 1)[0].batch.tokens.shape == (2, 70)


def test_an_answer_that_is_cut_off_is_an_error(source):
    with pytest.raises(DataError, match=r"\(id r\d\): no answer is left within .*=12 tokens"):
        take(tiny(data__max_text_length=12), source, 0, 1)


def test_evaluation_sees_every_record_once_in_order(source):
    loaded = list(evaluation_batches(tiny(eval__batch_size=3), *source))
    assert [i for part in loaded for i in part.ids] == [*(f"r{i}" for i in range(7)), "", ""]
    weights = np.concatenate([part.batch.weight for part in loaded])
    np.testing.assert_array_equal(weights, [1] * 7 + [0] * 2)
    assert loaded[-1].batch.index.tolist() == [6, -1, -1]
    few = list(evaluation_batches(tiny(eval__batch_size=3), *source, max_samples=2))
    assert len(few) == 1 and few[0].batch.weight.sum() == 2


@pytest.fixture
def damaged(tmp_path, source):
    """The tiny dataset with record 2's original gone and record 4 without a conversation."""
    path = write_dataset(tmp_path, 7)
    (tmp_path / "orig2.png").unlink()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[4]["conversations"] = []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RecordFile(path), source[1]


def test_bad_records_stop_by_default(damaged):
    with pytest.raises(DataError, match=r"record (2 \(id r2\)|4 \(id r4\))"):
        take(tiny(), damaged, 0, 4)


def test_skipped_records_keep_their_places(damaged, source):
    config = tiny(data__on_error="skip")
    whole, skipped = take(config, source, 0, 4), take(config, damaged, 0, 4)
    errors = [e for loaded in skipped for e in loaded.errors]
    assert any("record 2 (id r2)" in e for e in errors)
    assert any("record 4 (id r4)" in e for e in errors)
    for a, b in zip(whole, skipped, strict=True):
        for row, name in enumerate(a.ids):
            if name in ("r2", "r4"):
                assert b.batch.weight[row] == 0 and not b.batch.loss_mask[row].any()
            else:
                assert b.ids[row] == name and b.batch.weight[row] == 1


def test_number_of_steps():
    config = tiny(train__accumulation_steps=3, train__epochs=2)
    assert samples_per_step(config.train, num_shards=4) == 24
    epochs = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=None))
    assert num_steps(config.train, 100, 6) == 4
    assert num_steps(epochs.train, 100, 6) == 33
    assert num_steps(epochs.train, 1, 6) == 1
    # 10 updates of 6 were done on other devices: 140 samples are left for updates of 12.
    assert num_steps(epochs.train, 100, 12, step=10, seen=60) == 21
    assert num_steps(epochs.train, 100, 6, step=33, seen=198) == 33
