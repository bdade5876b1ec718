"""The HTTP API: answers, streamed answers and completed images for images sent as a form.

Errors are JSON, {"error": sentence}; a full queue is 503 and too many requests of one address are
429, both with Retry-After. `/openapi.json` describes it all.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from htfa_jax.config.renamed import PARAMETERS, current, names_of
from htfa_jax.data.storage import PackedImage
from htfa_jax.demo.http import busy_problem, client_address, problem, read_box, sentence
from htfa_jax.demo.serving import Serving
from htfa_jax.errors import Busy, Closed, ConfigError, DataError, HTFAError
from htfa_jax.inference.inputs import LoadedPair
from htfa_jax.inference.options import Completion, Decoding
from htfa_jax.inference.results import Result

T = TypeVar("T")
# Seconds between two checks whether a client is still there.
PATIENCE = 0.2
(OLD_STEPS,) = names_of(PARAMETERS, "refinement_steps")[1:]


class Answer(BaseModel):
    """An answer to one question."""

    query: str
    answer: str
    confidence: float | None = Field(description="mean probability of the answer's tokens")


class Answers(BaseModel):
    """What the model says of a pair."""

    answers: list[Answer]
    alignment: str = Field(description="how the reconstruction was aligned: boxes, mask, ...")
    reconstruction: str = Field(description="given, own completion, or none")


class Problem(BaseModel):
    """Why there is no result."""

    error: str


class Health(BaseModel):
    """Whether the server works, and on what."""

    status: str
    model: str
    step: int
    waiting: int
    streaming: int


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The form cannot be read."},
    403: {"model": Problem, "description": "A page of another site sent it."},
    408: {"model": Problem, "description": "It came too slowly."},
    413: {"model": Problem, "description": "It is too large."},
    422: {"model": Problem, "description": "An image, box, question or option cannot be used."},
    429: {"model": Problem, "description": "Too many requests of yours wait: see Retry-After."},
    503: {"model": Problem, "description": "The queue is full: see Retry-After."},
}
BOX = "the object's box in its pixels: a JSON list [x, y, width, height]"


async def images(
    request: Request,
    image_orig: Annotated[UploadFile, File(description="where something hides the object")],
    image_recon: Annotated[
        UploadFile | None,
        File(description="a reconstruction (default: the model's own completion)"),
    ] = None,
    object_mask: Annotated[
        UploadFile | None, File(description="white where the object is, its occluded part included")
    ] = None,
    occluder_mask: Annotated[
        UploadFile | None, File(description="white where something covers the original")
    ] = None,
    bbox_orig: Annotated[str | None, Form(description=f"in the original, {BOX}")] = None,
    bbox_recon: Annotated[str | None, Form(description=f"in the reconstruction, {BOX}")] = None,
) -> LoadedPair:
    """The pair of a request, decoded and checked."""
    sent = {
        "image_orig": image_orig,
        "image_recon": image_recon,
        "object_mask": object_mask,
        "occluder_mask": occluder_mask,
    }
    packed = {
        field: PackedImage(upload.filename or field, await upload.read())
        for field, upload in sent.items()
        if upload is not None
    }
    boxes = {"bbox_orig": bbox_orig, "bbox_recon": bbox_recon}
    serving: Serving = request.app.state.serving
    read = serving.read(packed, {name: read_box(box, name) for name, box in boxes.items()})
    return await while_connected(request, read)


async def decoding_options(
    request: Request,
    max_new_tokens: Annotated[
        int | None, Form(description="most tokens of an answer (default: the run's)")
    ] = None,
    temperature: Annotated[float, Form(description="0: greedy decoding")] = 0.0,
    top_k: Annotated[
        int, Form(description="sample from this many most probable tokens only; 0: all", lt=2**31)
    ] = 0,
    top_p: Annotated[
        float,
        Form(
            description="sample from the most probable tokens that together have this probability"
        ),
    ] = 1.0,
    repetition_penalty: Annotated[float, Form()] = 1.0,
    seed: Annotated[int, Form()] = 0,
) -> Decoding:
    """How answers are decoded."""
    serving: Serving = request.app.state.serving
    most = serving.limits.max_new_tokens
    if max_new_tokens is not None and max_new_tokens > most:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at most {most}")
    return Decoding(
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )


async def completion_options(
    temperature: Annotated[
        float,
        Form(description="0: none is drawn, each cell gets the expected one", allow_inf_nan=False),
    ] = 0.0,
    refinement_steps: Annotated[
        int, Form(description="passes that predict the least confident tokens again", le=16)
    ] = 1,
    paste_back: Annotated[bool, Form(description="replace only what occluder_mask covers")] = False,
    seed: Annotated[int, Form()] = 0,
    old_steps: Annotated[int | None, Form(alias=OLD_STEPS, deprecated=True, le=16)] = None,
) -> Completion:
    """How the image is completed."""
    if old_steps is not None:
        current(PARAMETERS, OLD_STEPS, "form field")
        refinement_steps = old_steps
    return Completion(temperature, refinement_steps, paste_back, seed)


UploadedPair = Annotated[LoadedPair, Depends(images)]
DecodingForm = Annotated[Decoding, Depends(decoding_options)]
CompletionForm = Annotated[Completion, Depends(completion_options)]
Begun = tuple[str | float, AsyncIterator[str | float]]
Queries = Annotated[
    list[str] | None, Form(description="a question; several times for several (default: the run's)")
]


async def begin(
    request: Request,
    pair: UploadedPair,
    decoding: DecodingForm,
    query: Annotated[str | None, Form(description="a question (default: the run's)")] = None,
) -> AsyncIterator[Begun]:
    """An answer's first piece, and the others to come; it ends with the request."""
    serving: Serving = request.app.state.serving
    (question,) = _questions(serving, None if query is None else [query])
    client = client_address(request)
    pieces = serving.stream(client, lambda: serving.engine.chat(pair), question, decoding)
    async with contextlib.aclosing(pieces):
        # Before anything is sent, so that a full queue is an answer with its own status.
        yield await while_connected(request, anext(pieces)), pieces


def add_api(app: FastAPI, serving: Serving, model: str) -> None:
    """Adds the routes and what turns errors into sentences.

    Args:
      app: where to.
      serving: the engine behind its queue.
      model: how /healthz calls the model.
    """
    app.state.serving = serving
    _add_errors(app)

    @app.get("/healthz", tags=["health"], responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether the server works, and how much waits; 503 if the engine has stopped."""
        response.status_code = 200 if serving.alive else 503
        return Health(
            status="ok" if serving.alive else "the engine has stopped",
            model=model,
            step=serving.engine.step,
            waiting=serving.waiting,
            streaming=serving.streaming,
        )

    @app.post("/v1/infer", responses=PROBLEMS)
    async def infer(
        request: Request, pair: UploadedPair, decoding: DecodingForm, query: Queries = None
    ) -> Answers:
        """Answers one question about a pair, or several."""
        questions = _questions(serving, query)
        work = serving.infer(
            client_address(request), pair, questions, decoding=decoding, completion=None
        )
        results = _checked(await while_connected(request, work))
        return Answers(
            answers=[
                Answer(query=r.query, answer=r.answer, confidence=r.confidence) for r in results
            ],
            alignment=results[0].alignment,
            reconstruction=results[0].recon_source,
        )

    events = {
        200: {
            "description": 'Server-sent events: {"text": piece} each, then `end` with '
            '{"answer", "confidence"}, or `error` with {"error"}.',
        }
    }

    @app.post("/v1/stream", responses=PROBLEMS | events, response_class=EventSourceResponse)
    async def stream(begun: Annotated[Begun, Depends(begin)]) -> AsyncIterator[ServerSentEvent]:
        """Answers one question piece by piece, as server-sent events."""
        item, pieces = begun
        text = ""
        try:
            while isinstance(item, str):
                text += item
                yield ServerSentEvent(data={"text": item})
                item = await anext(pieces)
            yield ServerSentEvent(data={"answer": text, "confidence": item}, event="end")
        except Exception as error:
            yield ServerSentEvent(data={"error": sentence(error)}, event="error")

    image = {200: {"content": {"image/png": {}}, "description": "The whole object."}}

    @app.post("/v1/complete", responses=PROBLEMS | image, response_class=Response)
    async def complete(
        request: Request, pair: UploadedPair, completion: CompletionForm
    ) -> Response:
        """Completes the object, in the original's frame and size: a PNG."""
        serving.engine.need_completion()
        work = serving.infer(
            client_address(request),
            pair,
            # A request has a question; nobody reads this answer.
            [serving.engine.config.data.default_query],
            decoding=Decoding(max_new_tokens=1),
            completion=completion,
        )
        (result,) = _checked(await while_connected(request, work))
        return Response(await asyncio.to_thread(png, result), media_type="image/png")


def png(result: Result) -> bytes:
    """The completed image as a file."""
    buffer = io.BytesIO()
    result.completed.save(buffer, "png")
    return buffer.getvalue()


def _questions(serving: Serving, queries: list[str] | None) -> list[str]:
    serving.engine.need_text()
    if queries is None:
        return [serving.engine.config.data.default_query]
    serving.limits.check_questions(queries)
    return queries


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is given up when the client leaves."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=PATIENCE))[0]:
            if await request.is_disconnected():
                raise HTTPException(499, "nobody waits for this any more")
        return task.result()
    finally:
        if task.cancel():
            await asyncio.wait({task})


def _checked(results: list[Result]) -> list[Result]:
    """The same. Raises DataError of a bad pair."""
    if results[0].error is not None:
        raise DataError(results[0].error)
    return results


def _add_errors(app: FastAPI) -> None:
    """Every error as JSON with a sentence."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, Busy):
            return busy_problem(error)
        if isinstance(error, Closed):
            return problem(str(error), 503, {"retry-after": "10"})
        if isinstance(error, StarletteHTTPException):
            headers = dict(error.headers or {})
            return problem(sentence(error), error.status_code, headers)
        expected = isinstance(error, HTFAError | RequestValidationError)
        return problem(sentence(error), 422 if expected else 500)

    for kind in (HTFAError, RequestValidationError, StarletteHTTPException, Exception):
        app.add_exception_handler(kind, answer)
