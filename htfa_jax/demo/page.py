"""The page: images in, the completed image, a conversation, and what the model saw."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from htfa_jax.common.files import write_whole
from htfa_jax.data.storage import PackedImage
from htfa_jax.demo import show
from htfa_jax.demo.files import Files
from htfa_jax.demo.http import client_address, read_box, sentence
from htfa_jax.demo.serving import Serving
from htfa_jax.demo.sessions import Session
from htfa_jax.errors import DataError, HTFAError
from htfa_jax.evaluation.look_inside import figures, png
from htfa_jax.evaluation.report_html import PREDICTIONS, write_report
from htfa_jax.inference.chat import Chat
from htfa_jax.inference.options import Completion, Decoding
from htfa_jax.inference.results import Result

log = logging.getLogger(__name__)
# What a drawn mask means.
COVER = "what covers the object"
MARKS = {COVER: "occluder_mask", "the object, its occluded part included": "object_mask"}
INK = "#e8a200"
MOST_LAYERS = 4  # of what is drawn; the page has one


def upload(**options: Any) -> gr.Image:
    """An image that reaches us as it was sent: our own reader decodes it, not Gradio."""
    image = gr.Image(type="filepath", **options)
    # Not a subclass: of those Gradio writes stubs beside their source.
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def board(**options: Any) -> gr.ImageEditor:
    """Where a mask is drawn over an image; only the files of what was drawn come back."""
    brush = gr.Brush(colors=[INK], default_color=INK, color_mode="fixed")
    editor = gr.ImageEditor(
        type="pil", sources=(), transforms=(), layers=False, buttons=[], brush=brush, **options
    )
    # The image below comes as an upload of its own; our own reader decodes what is drawn.
    editor.preprocess = lambda payload: [layer.path for layer in payload.layers] if payload else []
    return editor


@dataclasses.dataclass(frozen=True)
class Sent:
    """What the page shows when something is asked of it.

    Attributes:
      image_orig, image_recon: paths of uploads.
      bbox_orig, bbox_recon: as they were typed.
      marks: what the mask means, a key of `MARKS`.
      mask: what was drawn.
      completion: options.
    """

    image_orig: str | None
    image_recon: str | None
    bbox_orig: str
    bbox_recon: str
    marks: str
    mask: PackedImage | None
    completion: Completion


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
      files: what visitors sent.
      model: what the model is called.
    """

    def __init__(self, serving: Serving, files: Files, model: str):
        self.serving, self.files, self.model = serving, files, model
        # Not among the threads that read images: a figure takes a second.
        self._pencil = ThreadPoolExecutor(1, "figures")

    def session(self, request: gr.Request, session: Session | None) -> Session:
        """What belongs to the page that asks, a new one if there is none (any more)."""
        if session is None or session.closed:
            return Session(str(request.session_hash), self.files)
        return session

    async def drawn_mask(self, layers: list[str]) -> PackedImage | None:
        """What was drawn over the image, as a mask; None if nothing was. Raises DataError."""
        for layer in layers[:MOST_LAYERS]:
            mask = await self.serving.read_ink(self.files.read(layer))
            if mask is not None:
                return mask
        return None

    async def run(self, request: gr.Request, session: Session, sent: Sent) -> bool:
        """Runs the model on what the page shows. Returns whether that was new."""
        if sent == session.asked:
            return False
        paths = {"image_orig": sent.image_orig, "image_recon": sent.image_recon}
        images = {
            field: None if path is None else self.files.read(path, session.name)
            for field, path in paths.items()
        }
        images[MARKS[sent.marks]] = sent.mask
        boxes = {name: read_box(getattr(sent, name), name) for name in ("bbox_orig", "bbox_recon")}
        scene = await self.serving.read(images, boxes)
        (result,) = await self.serving.infer(
            client_address(request),
            scene,
            [self.serving.engine.config.data.default_query],
            decoding=Decoding(),
            completion=sent.completion,
            return_intermediates=True,
        )
        if result.error is not None:
            raise DataError(result.error)
        session.begin(sent, scene, result)
        return True

    async def ask(
        self, request: gr.Request, session: Session, question: str, decoding: Decoding
    ) -> AsyncIterator[tuple[str, float | None]]:
        """The answer so far, again and again, and its confidence at its end."""

        def chat() -> Chat:
            if session.chat is None:
                session.chat = self.serving.engine.chat(session.scene)
            return session.chat

        text = ""
        pieces = self.serving.stream(client_address(request), chat, question, decoding)
        # One answer at a time: each goes on in the cache of the last.
        async with session.talking, contextlib.aclosing(pieces):
            async for item in pieces:
                if isinstance(item, str):
                    text += item
                    yield text, None
                else:
                    session.said.append((question, text, item))
                    yield text, item

    async def attention(self, session: Session, point: tuple[float, float] | None) -> str:
        """A figure of what a point of the original attends to."""
        return await self._draw(session, show.attention, result_of(session), point)

    async def inside(self, session: Session) -> str:
        """Figures of what the model saw."""
        return await self._draw(session, show.inside, result_of(session))

    async def saved(self, session: Session, name: str, image: Image.Image) -> str:
        """An image as a file of the page. Returns its path."""
        path = session.folder / name
        await asyncio.to_thread(image.save, path)
        return str(path)

    async def report(self, session: Session) -> str:
        """A page about the pair, with the conversation and all figures, as a file."""
        result_of(session)
        return str(await self._draw(session, self._report, session))

    async def _draw(self, session: Session, function: Callable, *args: Any) -> Any:
        """Calls what draws, one thing at a time, in turns with other pages."""
        async with session.drawing:
            return await asyncio.get_running_loop().run_in_executor(self._pencil, function, *args)

    def _report(self, session: Session) -> Path:
        result = result_of(session)
        said = session.said or [(result.query, result.answer, result.confidence)]
        with show.drawing:
            drawn = {kind: png(figure) for kind, figure in figures(result).items()}
        for kind, content in drawn.items():
            write_whole(session.folder / f"{kind}.png", content)
        entry = {
            "id": Path(session.asked.image_orig).stem,
            "answers": [{"query": q, "answer": a, "confidence": c} for q, a, c in said],
            "alignment": result.alignment,
            "reconstruction": result.recon_source,
            "figures": {kind: f"{kind}.png" for kind in drawn},
        }
        write_whole(session.folder / PREDICTIONS, json.dumps(entry) + "\n")
        return write_report(session.folder, f"{entry['id']}: {self.model}")


def result_of(session: Session | None) -> Result:
    """What the model saw on the page. Raises DataError if it has not run yet."""
    if session is None or session.result is None:
        raise DataError("there is nothing to show yet: choose an image and press Run")
    return session.result
