"""What a dataset holds and what is wrong with it, record by record, in worker processes."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool

from htfa_jax.config import Config
from htfa_jax.data.augment import Change
from htfa_jax.data.decode import decode_original
from htfa_jax.data.hints import Hints
from htfa_jax.data.preprocess import BOXES, IMAGES, MASKS, load_images
from htfa_jax.data.records import Dataset, Record
from htfa_jax.data.tokenizer import ChatTokenizer, whole_answers
from htfa_jax.errors import DataError

# Records that a worker looks at before it reports.
CHUNK = 32


@dataclasses.dataclass(frozen=True)
class RecordProblem:
    """Something that would stop training.

    Attributes:
      record: its number in the dataset.
      id: its own name, if it can be read so far.
      kind: as in `DataError`.
      reason: the message, with what to do.
    """

    record: int
    id: str | None
    kind: str
    reason: str


@dataclasses.dataclass
class Seen:
    """What some records hold.

    Attributes:
      records: how many they are.
      problems: in the order of the records.
      ids: of records that can be read, with their numbers.
      sizes: how many originals have a size (width, height), upright.
      fields: how many records have an optional image, mask or box.
      lengths: how many conversations have so many tokens, before any is cut.
      answers: how many there are.
      cut: how many of them `data.max_text_length` leaves out.
      labels: how often each answer is given, by kind of question.
      lines: the good records as text, if asked for.
      hints: what is odd though it stops nothing.
    """

    records: int = 0
    problems: list[RecordProblem] = dataclasses.field(default_factory=list)
    ids: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    sizes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    fields: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    lengths: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    answers: int = 0
    cut: int = 0
    labels: dict[str, collections.Counter] = dataclasses.field(default_factory=dict)
    lines: list[str] = dataclasses.field(default_factory=list)
    hints: Hints = dataclasses.field(default_factory=Hints)


@dataclasses.dataclass(frozen=True)
class Examiner:
    """Looks at records as training would; can be sent to worker processes.

    Attributes:
      records: the dataset.
      tokenizer: of the run.
      config: of the run.
      write: from a good record to its line; None wants no lines.
    """

    records: Dataset
    tokenizer: ChatTokenizer
    config: Config
    write: Callable[[Record], str] | None = None

    def __call__(self, indices: range) -> Seen:
        """What these records hold."""
        seen = Seen(records=len(indices))
        for index in indices:
            self._look(index, seen)
        return seen

    def _look(self, index: int, seen: Seen) -> None:
        before, record = len(seen.problems), None

        def attempt(kind: str, look: Callable[[], None]) -> None:
            try:
                look()
            except DataError as error:
                name = None if record is None else record.id
                seen.problems.append(RecordProblem(index, name, error.kind or kind, str(error)))

        def read() -> None:
            nonlocal record
            record = self.records[index]

        attempt("record", read)
        if record is None:
            return
        seen.ids.append((record.id, index))
        seen.hints.look_at_fields(record, self.config.data.recon_template)
        attempt("image", lambda: self._images(record, seen))
        attempt("text", lambda: self._text(record, seen))
        if self.write is not None and len(seen.problems) == before:
            attempt("record", lambda: seen.lines.append(self.write(record)))

    def _images(self, record: Record, seen: Seen) -> None:
        for field in (*IMAGES, *MASKS, *BOXES):
            seen.fields[field] += getattr(record, field) is not None
        original = decode_original(record)
        seen.sizes[original.size] += 1
        decoded = dataclasses.replace(record, image_orig=original)
        size, resize = self.config.image_size, self.config.data.resize
        seen.hints.look_at_images(decoded, load_images(decoded, size, resize))
        if self.config.augment.crop:
            load_images(decoded, size, resize, Change().window)

    def _text(self, record: Record, seen: Seen) -> None:
        for question, answer in zip(record.turns, record.turns[1:], strict=False):
            if (question.role, answer.role) == ("user", "assistant"):
                kind = seen.labels.setdefault(question.kind or "answer", collections.Counter())
                kind[answer.text] += 1
        whole, limit = self.tokenizer.encode(record.turns), self.config.data.max_text_length
        seen.lengths[len(whole.tokens)] += 1
        seen.answers += len(whole.ends)
        seen.cut += len(whole.ends) - len(whole.within(limit).ends)
        whole_answers(record, whole, limit)


def examine(examiner: Examiner, num: int, num_workers: int) -> Iterator[Seen]:
    """What the first `num` records hold, some records at a time, in order.

    Raises DataError if a worker process dies.
    """
    chunks = [range(i, min(i + CHUNK, num)) for i in range(0, num, CHUNK)]
    if num_workers <= 1 or len(chunks) == 1:
        yield from map(examiner, chunks)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(num_workers, len(chunks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(examiner,),
    )
    with pool:
        # Not all at once: what is done waits in memory until its turn has come.
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 4 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that looks at records was killed, perhaps out of memory: try fewer "
                f"with --num_workers ({num_workers} now)"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


_examiner: Examiner | None = None


def _begin(examiner: Examiner) -> None:
    global _examiner
    _examiner = examiner


def _work(chunk: range) -> Seen:
    return _examiner(chunk)
