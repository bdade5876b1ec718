"""One engine for many callers: a bounded queue, and one thread that works through it.

Callers are coroutines. What they ask for waits in one queue; the thread takes requests that may go
together as one batch, and gives every running answer one more token per turn. So nobody waits for
somebody's long answer, and a caller who reads slowly, or is gone, holds nothing up: what is ready
lies in a ticket of its own.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from htfa_jax.data.storage import PackedImage
from htfa_jax.demo.images import decode_ink
from htfa_jax.demo.options import Limits
from htfa_jax.demo.readers import Reader, Readers
from htfa_jax.demo.uploads import read, read_upload
from htfa_jax.errors import Busy, Closed, HTFAError
from htfa_jax.inference.chat import Chat
from htfa_jax.inference.engine import HTFAInference
from htfa_jax.inference.inputs import LoadedPair
from htfa_jax.inference.options import Completion, Decoding
from htfa_jax.inference.results import Result

log = logging.getLogger(__name__)

# Pairs that are decoded at a time: each may take a few hundred megabytes.
READERS = 2
T = TypeVar("T")
# Ends what a ticket brings.
END = object()


@dataclasses.dataclass(frozen=True)
class InferRequest:
    """Results for one pair. Requests with equal `options` share a batch."""

    scene: LoadedPair
    queries: tuple[str, ...]
    options: tuple[Decoding, Completion | None, bool]


# Gives an answer piece by piece.
PieceSource = Callable[[], Generator[Any]]


class Ticket:
    """A caller's place: what was asked for, and what is there already.

    Attributes:
      client: the caller's address.
      work: what was asked for.
      gone: whether nobody waits for it any more.
    """

    def __init__(self, client: str, work: InferRequest | PieceSource):
        self.client, self.work, self.abandoned = client, work, False
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, *items: Any) -> None:
        """Hands something over, from the engine's thread; an exception is raised there."""
        with contextlib.suppress(RuntimeError):  # the caller's loop has ended
            for item in items:
                self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def items(self) -> AsyncIterator[Any]:
        """What comes, until the end. Whoever stops listening is gone."""
        try:
            while (item := await self._items.get()) is not END:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.abandoned = True


class Serving:
    """The engine behind a queue. A context manager: the thread runs inside of it.

    Args:
      engine: of which nobody else may make use meanwhile.
      limits: of the queue.
      chores: what the thread does while nobody waits, each once.
    """

    def __init__(
        self,
        engine: HTFAInference,
        limits: Limits,
        chores: Iterable[Callable[[], object]] = (),
    ):
        self.engine, self.limits = engine, limits
        self._chores = collections.deque(chores)
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._taken: list[Ticket] = []  # a batch that is worked on
        # With each its answer, None as long as it has not begun.
        self._running: list[tuple[Ticket, Generator[Any] | None]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._turn_seconds = 0.1  # of a turn with a batch, smoothed
        self._readers = Readers(limits.decode_seconds)
        self._threads = ThreadPoolExecutor(READERS, "reader")
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def __enter__(self) -> Serving:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._readers.close()
        self._threads.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs: without it nobody is answered."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def streaming(self) -> int:
        """Answers that are being given."""
        return len(self._running)

    async def read(
        self, images: Mapping[str, PackedImage | None], boxes: Mapping[str, Any]
    ) -> LoadedPair:
        """Decodes and checks a pair as `uploads.read_upload` does, in a process for images."""
        limits = self.limits
        return await self._apart(
            lambda call: read_upload(images, boxes, self.engine.config, limits, call)
        )

    async def read_ink(self, layer: PackedImage) -> PackedImage | None:
        """What was drawn on a layer, as a mask; None if nothing was. Raises DataError."""
        return await self._apart(
            lambda call: read(call, decode_ink, "drawing", layer, self.limits.megapixels)
        )

    async def _apart(self, work: Callable[[Reader], T]) -> T:
        """Calls `work` in a thread that has a process for decoding images."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(self._readers.mine))

    async def infer(
        self,
        client: str,
        scene: LoadedPair,
        queries: Sequence[str],
        *,
        decoding: Decoding,
        completion: Completion | None,
        return_intermediates: bool = False,
    ) -> list[Result]:
        """What `HTFAInference.infer` gives for several questions, from a batch if others wait too.

        Args:
          client: address of who asks.
          scene, queries: the pair and the questions.
          decoding, completion: options.
          return_intermediates: whether results hold what the model saw.

        Raises:
          Busy, Closed: see there.
        """
        ticket = Ticket(
            client,
            InferRequest(scene, tuple(queries), (decoding, completion, return_intermediates)),
        )
        self._enter(ticket)
        async with contextlib.aclosing(ticket.items()) as items:
            return await anext(items)

    async def stream(
        self, client: str, chat: Callable[[], Chat], query: str, decoding: Decoding
    ) -> AsyncIterator[str | float]:
        """An answer piece by piece, and its confidence behind it.

        Args:
          client: address of who asks.
          chat: the conversation; called in the engine's thread.
          query: question.
          decoding: options.

        Raises:
          Busy, Closed: see there.
        """

        def answer() -> Generator[str | float]:
            talk = chat()
            yield from talk.stream(query, decoding=decoding)
            yield talk.confidence

        ticket = Ticket(client, answer)
        self._enter(ticket)
        async with contextlib.aclosing(ticket.items()) as items:
            async for item in items:
                yield item

    def check_room(self, client: str) -> None:
        """Raises Busy, before anything is read for a request that would find no room."""
        with self._changed:
            length = len(self._waiting)
            own = sum(ticket.client == client for ticket in self._waiting)
        wait = max(1, math.ceil((1 + length / self.limits.batch) * self._turn_seconds))
        if length >= self.limits.queue:
            raise Busy(f"{length} requests wait already: try again in {wait} s", wait)
        if own >= self.limits.per_client:
            raise Busy(
                f"{own} of your requests wait already: try again in {wait} s",
                wait,
                by_this_client=True,
            )

    def _enter(self, ticket: Ticket) -> None:
        with self._changed:
            if self._closed:
                raise Closed("the server is going down: ask again when it is back")
            if not self.alive:
                raise Closed("the engine has stopped: the server must be started again")
            self.check_room(ticket.client)
            self._waiting.append(ticket)
            self._changed.notify()

    def _work(self) -> None:
        while not self._closed:
            try:
                self._turn()
            # Whatever it is (a Rust library's panic is no `Exception`): the thread must live on.
            except BaseException as error:
                self._tell_all(_failure(error))
        self._tell_all(Closed("the server went down before it was this request's turn"))

    def _turn(self) -> None:
        """Waits for something to do, and does what waits: a batch, and one more piece each."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._waiting or self._running or self._chores or self._closed
            )
            if self._closed:
                return
            idle = not self._waiting and not self._running
            self._taken = batch = self._next_batch()
            self._running += [(ticket, None) for ticket in self._next_answers()]
        if idle:
            self._do_chore()
            return
        start = time.monotonic()
        if batch:
            self._infer(batch)
            self._taken = []
        self._running = [
            (ticket, answer)
            for ticket, begun in self._running
            if (answer := self._proceed(ticket, begun)) is not None
        ]
        if batch:
            self._turn_seconds += 0.2 * (time.monotonic() - start - self._turn_seconds)

    def _tell_all(self, error: Exception) -> None:
        """Ends what waits and what runs."""
        with self._changed:
            tickets = [*self._taken, *self._waiting, *(ticket for ticket, _ in self._running)]
            self._taken, self._running = [], []
            self._waiting.clear()
        for ticket in tickets:
            ticket.put(error)

    def _do_chore(self) -> None:
        try:
            self._chores.popleft()()
        except BaseException as error:  # callers come first, and are told themselves what fails
            log.error("a chore failed", exc_info=error)

    def _next_batch(self) -> list[Ticket]:
        """The oldest request and those that may go with it; they leave the queue."""
        found = [t for t in self._waiting if isinstance(t.work, InferRequest) and not t.abandoned]
        batch = [t for t in found if t.work.options == found[0].work.options][: self.limits.batch]
        self._leave(batch)
        return batch

    def _next_answers(self) -> list[Ticket]:
        """The oldest answers that there is room for; they leave the queue."""
        room = self.limits.streams - len(self._running)
        found = [
            t for t in self._waiting if not isinstance(t.work, InferRequest) and not t.abandoned
        ][:room]
        self._leave(found)
        return found

    def _leave(self, tickets: list[Ticket]) -> None:
        self._waiting = collections.deque(
            t for t in self._waiting if not t.abandoned and t not in tickets
        )

    def _infer(self, tickets: list[Ticket]) -> None:
        decoding, completion, return_intermediates = tickets[0].work.options
        try:
            results = self.engine.batch_infer(
                [ticket.work.scene for ticket in tickets],
                [list(ticket.work.queries) for ticket in tickets],
                batch_size=self.limits.batch,
                decoding=decoding,
                completion=completion,
                return_intermediates=return_intermediates,
            )
            if len(results) != len(tickets):
                raise RuntimeError(
                    f"the engine gave {len(results)} results for {len(tickets)} pairs"
                )
        except BaseException as error:  # whatever it is, the next batch may do
            failure = _failure(error)
            for ticket in tickets:
                ticket.put(failure)
            return
        for ticket, rows in zip(tickets, results, strict=True):
            ticket.put(rows, END)

    def _proceed(self, ticket: Ticket, answer: Generator[Any] | None) -> Generator[Any] | None:
        """One more piece for a caller, of a new answer if it is None; None after the last one."""
        try:
            if ticket.abandoned:
                if answer is not None:
                    answer.close()
                return None
            answer = ticket.work() if answer is None else answer
            ticket.put(next(answer))
            return answer
        except StopIteration:
            ticket.put(END)
        except BaseException as error:
            ticket.put(_failure(error))
        return None


def _failure(error: BaseException) -> Exception:
    """What a caller is told: sentences as they are; what else there may be goes to the log too."""
    if not isinstance(error, HTFAError):
        log.error("a request failed", exc_info=error)
    # What is no `Exception` would end the caller's server too.
    return error if isinstance(error, Exception) else RuntimeError(repr(error))
