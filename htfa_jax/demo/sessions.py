"""What belongs to an open page, and how many pages may be open."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import cancel_tasks

from htfa_jax.demo.files import Files
from htfa_jax.errors import Busy, DataError
from htfa_jax.inference.chat import Chat
from htfa_jax.inference.inputs import LoadedPair
from htfa_jax.inference.results import Result

AT_ONCE = 8  # events of one page that wait or run
UNREAD = 16  # messages that wait for one page
IDLE = 3600  # seconds without an event after which a page's session is deleted
RETRY = 60  # seconds: when a page is closed, there is room at once


class Session:
    """What one open page is about; Gradio keeps it (`gr.State`) and deletes it with the page.

    Args:
      name: Gradio's for the page.
      files: where its folder is made.

    Attributes:
      asked: the images and options that `scene` and `result` are of.
      scene: the pair, read.
      result: of the run.
      chat: about the pair; begins with the first question.
      said: question, answer and confidence, one after the other.
      drawn: whether the page shows the figures of `result`.
      talking, drawing: held while an answer is given, while a figure is drawn.
    """

    def __init__(self, name: str, files: Files):
        self.name, self._files, self.closed = name, files, False
        # It goes with this object at the latest, whoever drops that. Nobody can guess the name.
        self._folder = tempfile.TemporaryDirectory(
            prefix=f"session_{secrets.token_hex(16)}_", dir=files.root, ignore_cleanup_errors=True
        )
        self.talking, self.drawing = asyncio.Lock(), asyncio.Lock()
        self.asked: Any = None
        self.scene: LoadedPair | None = None
        self.result: Result | None = None
        self.chat: Chat | None = None
        self.said: list[tuple[str, str, float | None]] = []
        self.drawn = False

    def begin(self, asked: Any, scene: LoadedPair, result: Result) -> None:
        """Takes a new result, in place of the last one and of its files and conversation."""
        for old in self._root.iterdir():
            shutil.rmtree(old, ignore_errors=True)
        # A folder of its own: a browser may keep what it has seen at an address.
        (self._root / secrets.token_hex(8)).mkdir()
        self.asked, self.scene, self.result = asked, scene, result
        self.chat, self.said, self.drawn = None, [], False

    @property
    def folder(self) -> Path:
        """For what is made of this result. Raises DataError when the page is closed."""
        return next(self._root.iterdir())

    @property
    def _root(self) -> Path:
        if self.closed:
            raise DataError("this page was closed")
        return Path(self._folder.name)

    def close(self) -> None:
        """Deletes all that belongs to the page."""
        self.closed = True
        self.asked = self.scene = self.result = self.chat = None
        self._folder.cleanup()
        self._files.release(self.name)


class Sessions:
    """The pages that are open: each holds a connection (Gradio's heartbeat) as long as it is.

    Nobody's session ends because others come: who comes when there is no room is refused.

    Args:
      most: how many may be open.
      files: what they sent.
    """

    def __init__(self, most: int, files: Files):
        self._most, self._files = most, files
        # One address never takes the last quarter.
        self._most_of_one = max(1, 3 * most // 4)
        # Connections of each page, and the address that it was opened from.
        self._connections: collections.Counter[str] = collections.Counter()
        self._clients: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def __contains__(self, name: str) -> bool:
        return name in self._clients

    def check_room(self, client: str) -> None:
        """Raises Busy if no other page may be opened from an address."""
        own = list(self._clients.values()).count(client)
        if len(self) >= self._most:
            raise Busy(
                f"{len(self)} pages are open, as many as this server takes: try again later", RETRY
            )
        if own >= self._most_of_one:
            raise Busy(
                f"{own} pages are open from your address: close one", RETRY, by_this_client=True
            )

    @contextlib.asynccontextmanager
    async def connected(self, name: str, client: str, page: gr.Blocks) -> AsyncIterator[None]:
        """One connection of a page; with its last one all that belongs to it is deleted.

        Args:
          name: Gradio's for the page, which is opened if it is not.
          client: address that it is opened from.
          page: whose.

        Raises Busy.
        """
        if name not in self:
            self.check_room(client)
            self._clients[name] = client
        self._connections[name] += 1
        try:
            yield
        finally:
            self._connections[name] -= 1
            if not self._connections[name]:
                del self._connections[name], self._clients[name]
                await forget(page, name)
                self._files.release(name)

    async def sweep(self, page: gr.Blocks) -> None:
        """Deletes what an event left that came while its page was being closed."""
        for name in set(page.state_holder.session_data).difference(self._clients):
            await forget(page, name)


async def forget(page: gr.Blocks, name: str) -> None:
    """Deletes what Gradio holds for a page: its state, what waits for it and what it is sent."""
    states, queue = page.state_holder, page._queue
    await cancel_tasks({f"{name}_{event}" for event in page.fns})
    states.delete_state(name)
    states.session_data.pop(name, None)
    states.time_last_used.pop(name, None)
    await queue.clean_events(session_hash=name)
    queue.pending_messages_per_session.pop(name, None)
    queue.pending_event_ids_session.pop(name, None)


def check_burden(page: gr.Blocks, name: str) -> None:
    """Raises Busy if a page has sent many events whose results it has not fetched."""
    queue = page._queue
    running = sum(event.session_hash == name for event in queue.event_ids_to_events.values())
    unread = queue.pending_messages_per_session.get(name)
    if running >= AT_ONCE or (unread is not None and unread.qsize() > UNREAD):
        raise Busy(
            "this page waits for too much already: wait until it is there", 2, by_this_client=True
        )
