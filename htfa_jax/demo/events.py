"""What the events of the page are given, and what they give back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from htfa_jax.data.storage import PackedImage
from htfa_jax.demo import show
from htfa_jax.demo.page import COVER, Actions, Sent, result_of, sentences
from htfa_jax.demo.sessions import Session
from htfa_jax.errors import DataError
from htfa_jax.inference.options import Completion, Decoding


class Events:
    """The functions that Gradio calls.

    Attributes:
      actions: what they do.
      sent: components that a run of the model depends on.
      seen: those that it changes.
      chat: one of `seen`.
    """

    actions: Actions
    sent: list[Any]
    seen: list[Any]
    chat: Any

    # What an event is given and gives of the session comes first: giving it keeps it for longer.

    @sentences
    async def on_run(self, request: gr.Request, session: Session | None, *values: Any) -> list[Any]:
        """Values of `sent`, to those of `seen`."""
        session = self.actions.session(request, session)
        is_new = await self.actions.run(request, session, await self._sent(*values))
        return [session, *(await self._shown(session) if is_new else self._same)]

    @sentences
    async def on_question(
        self, request: gr.Request, session: Session | None, question: str, *values: Any
    ) -> AsyncIterator[list[Any]]:
        """Values of `sent` and of the sampling controls, to the question's and those of `seen`."""
        self.actions.serving.limits.check_questions([question])
        session = self.actions.session(request, session)
        controls = len(self.sent)
        sent = await self._sent(*values[:controls])
        decoding = decoding_of(*values[controls:])
        if await self.actions.run(request, session, sent):
            # At once: nothing that fails later may leave the page behind its session.
            yield [session, gr.skip(), *await self._shown(session)]
        updates = [*self._same]
        turns = talk(session)
        async for text, confidence in self.actions.ask(request, session, question, decoding):
            updates[self.seen.index(self.chat)] = turns + turn(question, text, confidence)
            yield [session, "", *updates]

    @sentences
    async def on_clear(self, session: Session | None) -> Session | None:
        """Begins a new conversation about the same pair."""
        if session is not None:
            session.chat, session.said = None, []
        return session

    @sentences
    async def on_drawing(self, session: Session | None) -> list[Any]:
        """The figures of the newest run, unless they are there."""
        result_of(session)
        if session.drawn:
            return [session, gr.skip(), gr.skip()]
        session.drawn = True
        figures = [await self.actions.attention(session, None), await self.actions.inside(session)]
        return [session, *figures]

    @sentences
    async def on_place(self, session: Session | None, across: float, down: float) -> list[Any]:
        """What a place attends to, in percent of the original's sides."""
        return [session, await self.actions.attention(session, (across / 100, down / 100))]

    @sentences
    async def on_click(self, session: Session | None, event: gr.SelectData) -> list[Any]:
        """What a clicked place attends to, and where it is in percent."""
        result_of(session)
        place = place_of(event.index, show.size_shown(session.scene.original))
        figure = await self.actions.attention(session, place)
        return [session, figure, *(round(100 * part) for part in place)]

    @sentences
    async def on_report(self, session: Session | None) -> list[Any]:
        """The path of a report."""
        return [session, await self.actions.report(session)]

    @property
    def _same(self) -> list[Any]:
        return [gr.skip()] * len(self.seen)

    async def _sent(self, *values: Any) -> Sent:
        """The values of the page's inputs, put together. Raises ConfigError, DataError."""
        *places, marks, drawing, known, temperature, passes, seed, paste_back = values
        completion = Completion(temperature, int(passes), paste_back, int(seed or 0))
        mask = await self.actions.drawn_mask(drawing)
        if mask is None and known is not None:
            marks, mask = COVER, PackedImage("the example's mask", Path(known).read_bytes())
        return Sent(*places, marks, mask, completion)

    async def _shown(self, session: Session) -> list[Any]:
        """What a run changes on the page, in the order of `seen`."""
        result, original = result_of(session), session.scene.original
        if result.completed is None:
            compare, file = show.placeholder("This run completes no images."), None
        else:
            compare = show.compare(original, result.completed)
            file = await self.actions.saved(session, "completed.png", result.completed)
        return [
            compare,
            show.facts(result),
            gr.DownloadButton(value=file, interactive=file is not None),
            gr.Button(interactive=True),
            gr.Column(visible=True),
            await self.actions.saved(session, "place.png", show.enlarged(original)),
            [],
            show.placeholder("Drawing ..."),
            show.placeholder("Drawing ..."),
        ]


def close(session: Session | None) -> None:
    """What Gradio calls when a page is gone, or nothing has happened on it for long."""
    if session is not None:
        session.close()


def turn(question: str, text: str, confidence: float | None) -> list[dict[str, str]]:
    """A question and its answer for the chat."""
    return [
        {"role": "user", "content": escape(question)},
        {"role": "assistant", "content": show.said(text, confidence)},
    ]


def talk(session: Session) -> list[dict[str, str]]:
    """The conversation so far: ours, not what the page says that it was."""
    return [message for said in session.said for message in turn(*said)]


def place_of(index: Any, size: tuple[int, int]) -> tuple[float, float]:
    """A clicked pixel in parts of an image's sides. Raises DataError if it is none."""
    try:
        across, down = (
            min(max((int(i) + 0.5) / n, 0), 1) for i, n in zip(index, size, strict=True)
        )
    except (TypeError, ValueError, OverflowError):
        raise DataError("that is no place in the image") from None
    return across, down


def decoding_of(most, temperature, top_k, top_p, penalty, seed) -> Decoding:
    """The values of the sampling controls, put together. Raises ConfigError."""
    return Decoding(int(most), temperature, int(top_k), top_p, penalty, seed=int(seed or 0))
