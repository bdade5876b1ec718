"""The page: images in, the completed image, a conversation, and a look inside."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from htfa_jax.data.storage import PackedImage
from htfa_jax.demo import show
from htfa_jax.demo.http import client_of, read_box, sentence
from htfa_jax.demo.serving import Serving
from htfa_jax.errors import DataError, HTFAError
from htfa_jax.evaluation.look_inside import figures, png
from htfa_jax.evaluation.report_html import PREDICTIONS, write_report
from htfa_jax.inference.chat import Chat
from htfa_jax.inference.inputs import LoadedPair
from htfa_jax.inference.options import Completion, Decoding
from htfa_jax.inference.results import Result

log = logging.getLogger(__name__)
# What a drawn mask means.
COVER = "what covers the object"
MARKS = {COVER: "occluder_mask", "the object, its occluded part included": "object_mask"}
INK = "#e8a200"


def upload(**options: Any) -> gr.Image:
    """An image that reaches us as it was sent: our own reader decodes it, not Gradio."""
    image = gr.Image(type="filepath", **options)
    # Not a subclass: of those Gradio writes stubs beside their source.
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def board(**options: Any) -> gr.ImageEditor:
    """Where a mask is drawn over an image; only what was drawn comes back, as images."""
    brush = gr.Brush(colors=[INK], default_color=INK, color_mode="fixed")
    editor = gr.ImageEditor(
        type="pil", sources=(), transforms=(), layers=False, buttons=[], brush=brush, **options
    )

    def layers(payload: Any) -> list[Image.Image]:
        if payload is not None and payload.id is not None:  # it was sent ahead
            payload = editor.blob_storage.pop(payload.id, None)
        sent = [] if payload is None else payload.layers or []
        return [editor.convert_and_format_image(layer) for layer in sent if layer is not None]

    # The image below comes as an upload of its own.
    editor.preprocess = layers
    return editor


@dataclasses.dataclass(frozen=True)
class Sent:
    """What the page shows when something is asked of it.

    Attributes:
      image_orig, image_recon: paths of uploads.
      bbox_orig, bbox_recon: as they were typed.
      marks: what the mask means, a key of `MARKS`.
      mask: what was drawn.
      painting: options.
    """

    image_orig: str | None
    image_recon: str | None
    bbox_orig: str
    bbox_recon: str
    marks: str
    mask: PackedImage | None
    painting: Completion


def sentences(function: Callable) -> Callable:
    """Wraps what an event calls: what goes wrong is told on the page."""

    @contextlib.contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not isinstance(error, HTFAError):
                log.exception("the page failed")
            raise gr.Error(sentence(error), duration=None, print_exception=False) from error

    if inspect.isasyncgenfunction(function):

        @functools.wraps(function)
        async def pieces(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            with told():
                async with contextlib.aclosing(function(*args, **kwargs)) as made:
                    async for piece in made:
                        yield piece

        return pieces

    @functools.wraps(function)
    async def whole(*args: Any, **kwargs: Any) -> Any:
        with told():
            return await function(*args, **kwargs)

    return whole


class Actions:
    """What happens on the page, without its components.

    Args:
      serving: the engine behind its queue.
      visits: what belongs to every open page.
      model: what the model is called.
    """

    def __init__(self, serving: Serving, visits: Visits, model: str):
        self.serving, self.visits, self.model = serving, visits, model

    def visit(self, request: gr.Request) -> Visit:
        """What belongs to the page that asks, looked at already. Raises DataError if nothing is."""
        visit = self.visits.of(request.session_hash)
        if visit.result is None:
            raise DataError("there is nothing to look into yet: choose an image and press Look")
        return visit

    async def look(self, request: gr.Request, sent: Sent) -> tuple[Visit, bool]:
        """Looks at what the page shows; whether that was new."""
        visit = self.visits.of(request.session_hash)
        if sent == visit.looked_at:
            return visit, False
        images = {
            "image_orig": self._file(visit, sent.image_orig),
            "image_recon": self._file(visit, sent.image_recon),
            MARKS[sent.marks]: sent.mask,
        }
        boxes = {name: read_box(getattr(sent, name), name) for name in ("bbox_orig", "bbox_recon")}
        scene = await self.serving.read(images, boxes)
        (result,) = await self.serving.look(
            client_of(request),
            scene,
            [self.serving.engine.config.data.default_query],
            decoding=Decoding(),
            completion=sent.painting,
            inside=True,
        )
        if result.error is not None:
            raise DataError(result.error)
        visit.looked_at, visit.scene, visit.result = sent, scene, result
        visit.chat, visit.said, visit.drawn = None, [], False
        return visit, True

    async def ask(
        self, request: gr.Request, question: str, decoding: Decoding
    ) -> AsyncIterator[tuple[str, float | None]]:
        """The answer so far, again and again, and its confidence at its end."""
        visit = self.visit(request)

        def chat() -> Chat:
            if visit.chat is None:
                visit.chat = self.serving.engine.chat(visit.scene)
            return visit.chat

        text = ""
        pieces = self.serving.stream(client_of(request), chat, question, decoding)
        # One answer at a time: each goes on in the cache of the last.
        async with visit.talking, contextlib.aclosing(pieces):
            async for item in pieces:
                if isinstance(item, str):
                    text += item
                    yield text, None
                else:
                    visit.said.append((question, text, item))
                    yield text, item

    def forget(self, request: gr.Request) -> None:
        """Begins a new conversation about the same pair."""
        visit = self.visits.of(request.session_hash)
        visit.chat, visit.said = None, []

    async def attention(self, request: gr.Request, point: tuple[float, float] | None) -> str:
        """A figure of what a point of the original attends to."""
        return await asyncio.to_thread(show.attention, self.visit(request).result, point)

    async def inside(self, request: gr.Request) -> str:
        """Figures of what the model saw."""
        return await asyncio.to_thread(show.inside, self.visit(request).result)

    async def completed(self, visit: Visit) -> Path | None:
        """The completed image as a file."""
        path = visit.folder / "completed.png"
        await asyncio.to_thread(visit.result.completed.save, path)
        return path

    async def report(self, request: gr.Request) -> Path:
        """A page about the pair, with the conversation and all figures, as a file."""
        visit = self.visit(request)
        return await asyncio.to_thread(self._report, visit)

    def _report(self, visit: Visit) -> Path:
        result = visit.result
        said = visit.said or [(result.query, result.answer, result.confidence)]
        with show.drawing:
            drawn = {kind: png(figure) for kind, figure in figures(result).items()}
        for kind, content in drawn.items():
            (visit.folder / f"{kind}.png").write_bytes(content)
        entry = {
            "id": Path(visit.looked_at.image_orig).stem,
            "answers": [{"query": q, "answer": a, "confidence": c} for q, a, c in said],
            "alignment": result.alignment,
            "reconstruction": result.recon_source,
            "figures": {kind: f"{kind}.png" for kind in drawn},
        }
        (visit.folder / PREDICTIONS).write_text(json.dumps(entry) + "\n", encoding="utf-8")
        return write_report(visit.folder, f"{entry['id']}: {self.model}")

    def _file(self, visit: Visit, name: str | None) -> PackedImage | None:
        if name is None:
            return None
        path = Path(name)
        visit.uploads.add(path)
        try:
            return PackedImage(path.name, path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"{path.name} is not kept any more: send it again") from None


def drawn_mask(layers: list[Image.Image]) -> PackedImage | None:
    """What was drawn over the image, as a mask; None if nothing was."""
    for layer in layers:
        ink = layer.convert("RGBA").getchannel("A").point(lambda value: 255 * (value > 0))
        if ink.getbbox() is not None:
            buffer = io.BytesIO()
            ink.save(buffer, "png")
            return PackedImage("the drawn mask", buffer.getvalue())
    return None


@dataclasses.dataclass
class Visit:
    """What one open page looks at.

    Attributes:
      folder: for its downloads.
      looked_at: what images and options `scene` and `result` are of.
      scene: the pair, read.
      result: of the look.
      chat: about the pair; begins with the first question.
      talking: while an answer is given.
      drawn: whether the page shows the figures of `result`.
      said: question, answer and confidence, one after the other.
      uploads: files that the page sent.
    """

    folder: Path
    looked_at: Any = None
    scene: LoadedPair | None = None
    result: Result | None = None
    chat: Chat | None = None
    talking: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    drawn: bool = False
    said: list[tuple[str, str, float | None]] = dataclasses.field(default_factory=list)
    uploads: set[Path] = dataclasses.field(default_factory=set)


class Visits:
    """The visits of all open pages, the one that was idle for longest first.

    Args:
      private: folder in which each gets its own.
      most: how many are remembered.
    """

    def __init__(self, private: Path, most: int):
        self._private, self._most = private, most
        self._visits: collections.OrderedDict[str, Visit] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._visits)

    def of(self, session: str) -> Visit:
        """A page's visit, a new one if it is not known (any more)."""
        if session not in self._visits:
            folder = Path(tempfile.mkdtemp(prefix="visit_", dir=self._private))
            self._visits[session] = Visit(folder)
        self._visits.move_to_end(session)
        while len(self._visits) > self._most:
            self.end(next(iter(self._visits)))
        return self._visits[session]

    def end(self, session: str) -> None:
        """Forgets a page and deletes what belongs to it."""
        visit = self._visits.pop(session, None)
        if visit is None:
            return
        shutil.rmtree(visit.folder, ignore_errors=True)
        # Gradio keeps an upload under its content: another page may have sent the same.
        for path in visit.uploads.difference(*(v.uploads for v in self._visits.values())):
            if self._private in path.parents:  # examples are elsewhere
                path.unlink(missing_ok=True)
