"""Records to batches with Grain: order, loading, batching.

The order of training data, and what is random in it, is a function of the seed and the step
alone, so a run resumes from its step number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from htfa_jax.config import Config, TrainConfig
from htfa_jax.data.augment import Change, draw
from htfa_jax.data.batch import Batch
from htfa_jax.data.preprocess import BOXES, IMAGES, MASKS, REGIONS, load_images, without_recon
from htfa_jax.data.records import Dataset, Record
from htfa_jax.data.sources.mixture import training_order
from htfa_jax.data.tokenizer import ChatTokenizer, encode_record
from htfa_jax.errors import DataError, TrainingError

# Bytes from which on a worker's array comes through shared memory, each in a file of its own.
MIN_SHARED = 4096

# (number of a record) -> more `Batch` fields of it; can be sent to worker processes.
Kept = Callable[[int], dict[str, np.ndarray]]


class Loaded(NamedTuple):
    """A batch on the host, and what messages need.

    Attributes:
      batch: numpy arrays.
      ids: of the records, in order.
      errors: why records were skipped.
    """

    batch: Batch
    ids: list[str]
    errors: list[str]


class SampleLoader:
    """Turns a record into the `Batch` fields of one sample; can be sent to worker processes.

    Args:
      records: the dataset.
      tokenizer: None leaves the text out.
      config: of the run.
      kept: gives more fields of a record; None if there are none.
    """

    def __init__(
        self,
        records: Dataset,
        tokenizer: ChatTokenizer | None,
        config: Config,
        kept: Kept | None = None,
    ):
        self.records, self.tokenizer, self.config = records, tokenizer, config
        self.kept = kept

    def __call__(self, index: int, change: Change | None = None) -> dict[str, Any]:
        """The sample; with `data.on_error="skip"` a bad record gives an empty one, weight 0.

        Args:
          index: number of the record.
          change: of its images.
        """
        image_size, resize = self.config.image_size, self.config.data.resize
        crop = change.window if change and self.config.augment.crop else None
        try:
            record = self.records[index]
            sample = load_images(record, image_size, resize, crop)
            text = self._text(record) if self.tokenizer else self._no_text()
        except DataError as error:
            if self.config.data.on_error == "raise":
                raise
            return {**self.empty(), "error": str(error)}
        return (change.applied(sample) if change else sample) | {
            **text,
            "weight": np.float32(1),
            "index": np.int32(index),
            "id": record.id,
            **(self.kept(index) if self.kept else {}),
        }

    def for_training(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The sample, augmented, its reconstruction dropped with probability `data.drop_recon`."""
        dropped = rng.random() < self.config.data.drop_recon
        sample = self(index, draw(self.config.augment, rng))
        return without_recon(sample) if dropped else sample

    def _text(self, record: Record) -> dict[str, np.ndarray]:
        encoded = encode_record(record, self.tokenizer, self.config.data.max_text_length)
        return {"tokens": encoded.tokens, "learned": encoded.learned}

    def _no_text(self) -> dict[str, np.ndarray]:
        return {"tokens": np.zeros(0, np.int32), "learned": np.zeros(0, bool)}

    def empty(self) -> dict[str, Any]:
        """A sample of weight 0."""
        size = self.config.image_size
        image = np.zeros((size, size, 3), np.uint8)
        mask, box = np.zeros((size, size), bool), np.zeros(4, np.float32)
        return {
            **dict.fromkeys(IMAGES, image),
            **dict.fromkeys(MASKS, mask),
            **dict.fromkeys((*REGIONS, *BOXES), box),
            **{name: np.bool_(False) for name in Batch.__annotations__ if name[:4] == "has_"},
            **self._no_text(),
            "weight": np.float32(0),
            "index": np.int32(-1),
            "id": "",
            **({name: np.zeros_like(x) for name, x in self.kept(0).items()} if self.kept else {}),
        }


class Collate:
    """Stacks samples; text is padded to the first bucket that holds it."""

    def __init__(self, config: Config, tokenizer: ChatTokenizer | None):
        self.buckets = config.data.text_buckets
        self.pad_id = tokenizer.pad_id if tokenizer else 0

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Loaded:
        longest = max(len(s["tokens"]) for s in samples)
        length = next(b for b in self.buckets if b >= longest)
        rows = len(samples)
        tokens = np.full((rows, length + 1), self.pad_id, np.int32)
        learned = np.zeros((rows, length + 1), np.float32)
        for i, s in enumerate(samples):
            tokens[i, : len(s["tokens"])] = s["tokens"]
            learned[i, : len(s["tokens"])] = s["learned"]
        text = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": learned[:, 1:]}
        fields = [f for f in Batch.__annotations__ if f in samples[0] and f not in text]
        batch = Batch(**text, **{f: _stack(f, samples) for f in fields})
        return Loaded(
            batch, [s["id"] for s in samples], [s["error"] for s in samples if "error" in s]
        )


def _flag(field: str) -> str:
    """Name of what says whether a sample has a field; not every field has such a flag."""
    return "has_" + field.removeprefix("image_")


def _without_zeros(loaded: Loaded) -> Loaded:
    """Images and masks that no sample has by their shape: a worker need not send them."""
    batch, changes = loaded.batch, {}
    for field in (*IMAGES, *MASKS):
        if not np.any(getattr(batch, _flag(field), True)):
            zeros = getattr(batch, field)
            changes[field] = jax.ShapeDtypeStruct(zeros.shape, zeros.dtype)
    return loaded._replace(batch=dataclasses.replace(batch, **changes))


def _with_zeros(loaded: Loaded) -> Loaded:
    """The reverse of `_without_zeros`."""

    def whole(leaf: Any) -> Any:
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return np.zeros(leaf.shape, leaf.dtype) if is_shape else leaf

    return loaded._replace(batch=jax.tree.map(whole, loaded.batch))


def _stack(field: str, samples: Sequence[dict[str, Any]]) -> np.ndarray:
    """A field of all samples. What a sample does not have is zero as it is, and not copied."""
    flag, first = _flag(field), np.asarray(samples[0][field])
    stacked = np.zeros((len(samples), *first.shape), first.dtype)
    for i, sample in enumerate(samples):
        if sample.get(flag, True):
            stacked[i] = sample[field]
    return stacked


def samples_per_step(train: TrainConfig, num_shards: int) -> int:
    """Samples of one update, on a mesh that cuts a batch into `num_shards` parts."""
    return train.batch_size * train.accumulation_steps * num_shards


def num_steps(
    train: TrainConfig, num_records: int, samples: int, step: int = 0, seen: int = 0
) -> int:
    """Step at which a run is complete: `train.max_steps`, or the end of `train.epochs`.

    Args:
      train: section of the run's configuration.
      num_records: of an epoch.
      samples: of an update.
      step, seen: updates and samples that are behind it already, maybe of another size.
    """
    if train.max_steps is not None:
        return train.max_steps
    left = train.epochs * num_records - seen
    return max(1, step + max(left, 0) // samples)


def training_batches(
    config: Config,
    records: Dataset,
    tokenizer: ChatTokenizer | None,
    seen: int,
    samples: int,
    share: tuple[int, int] = (0, 1),
    kept: Kept | None = None,
) -> Generator[Loaded, None, None]:
    """Endless updates' worth of samples; each epoch in another order.

    Args:
      config: of the run.
      records: the training data.
      tokenizer: None leaves the text out.
      seen: samples that are behind the run already.
      samples: of one update, over all processes.
      share: this process's part of them: its number, of how many.
      kept: as in `SampleLoader`.
    """
    part, parts = share
    loader = SampleLoader(records, tokenizer, config, kept)
    dataset = training_order(records, config.seed).random_map(loader.for_training)
    # Whatever the number of processes, the samples of an update are the same.
    dataset = dataset[seen + part :: parts].batch(
        samples // parts,
        # The repeated dataset has no end, so no remainder either; Grain cannot round its length up.
        drop_remainder=True,
        batch_fn=Collate(config, tokenizer),
    )
    return read(dataset, config)


def evaluation_batches(
    config: Config,
    records: Dataset,
    tokenizer: ChatTokenizer | None,
    max_samples: int | None = None,
    num_shards: int = 1,
    share: tuple[int, int] = (0, 1),
) -> Generator[Loaded, None, None]:
    """Every record once; the last batch is filled up with samples of weight 0.

    In order, with one process; `num_shards` and `share` are a layout's.
    """
    part, parts = share
    loader = SampleLoader(records, tokenizer, config)
    size = config.eval.batch_size * num_shards // parts
    num = len(records) if max_samples is None else min(max_samples, len(records))
    # Filled up, so that every process has as many batches.
    filled = -(-num // (size * parts)) * size * parts
    dataset = grain.MapDataset.range(filled)[part::parts].map(
        lambda i: loader(i) if i < num else loader.empty()
    )
    dataset = dataset.batch(size, batch_fn=Collate(config, tokenizer))
    return read(dataset, config)


def read(dataset: grain.MapDataset, config: Config) -> Generator[Any, None, None]:
    """Reads a dataset in order, ahead of its use, in threads or in worker processes.

    Raises TrainingError if a worker process dies, and what loading raises, from wherever it is.
    """
    data = config.data
    options = grain.ReadOptions(
        num_threads=data.num_threads, prefetch_buffer_size=2 * data.num_threads
    )
    if data.num_workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's workers read absl's flags
            flags.FLAGS.mark_as_parsed()
        iterable = grain.experimental.WithOptionsIterDataset(
            dataset.map(_without_zeros).to_iter_dataset(options),
            grain.experimental.DatasetOptions(min_shm_size=MIN_SHARED),
        )
        workers = grain.MultiprocessingOptions(num_workers=data.num_workers)
        iterable = iterable.mp_prefetch(workers).map(_with_zeros)
    else:
        iterable = dataset.to_iter_dataset(options)
    iterator = iter(iterable)
    try:
        yield from iterator
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise TrainingError(
            f"a process that loads data was killed, perhaps out of memory: {error} Try fewer "
            f"with data.num_workers ({data.num_workers} now) or data.num_threads "
            f"({data.num_threads} in each)"
        ) from error
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
