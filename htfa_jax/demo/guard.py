"""What of Gradio a visitor reaches: a list of its routes, and events that were looked through."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from htfa_jax.common.json_files import parse_json
from htfa_jax.demo.files import API, Files
from htfa_jax.demo.http import client_address
from htfa_jax.demo.sessions import Sessions, check_burden
from htfa_jax.errors import DataError

# The page itself and what it is made of. All else of Gradio (its file server, uploads, proxies,
# functions of components, recordings, deep links, editors, ...) is not there.
PAGE = frozenset({"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"})
FOLDERS = ("/assets/", "/static/", "/svelte/")
INFO = frozenset({f"{API}/info", f"{API}/app_id"})
HEARTBEAT, DATA, JOIN = f"{API}/heartbeat/", f"{API}/queue/data", f"{API}/queue/join"
CANCEL, RESET = f"{API}/cancel", f"{API}/reset"
# How Gradio's page names itself.
NAME = re.compile(r"[A-Za-z0-9_-]{4,64}")
EVENT_BYTES = 2**16  # of an event: images come as uploads
DEPTH = 16  # brackets inside each other
CLOSED = "this page is not open any more: reload it"


class Guard:
    """ASGI application that lets a part of Gradio's through.

    Args:
      app: Gradio's application.
      page: what it shows.
      sessions: the pages that are open.
      files: of which events may speak.
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks, sessions: Sessions, files: Files):
        self.app, self.page, self.sessions, self.files = app, page, sessions, files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        path, client = scope["path"], client_address(request)
        if scope["method"] == "POST":
            if path in (JOIN, CANCEL, RESET):
                # Starlette reads the body once: Gradio gets what was looked through.
                receive = _given(await self._checked(request, path), receive)
                await self.app(scope, receive, send)
                return
        elif scope["method"] in ("GET", "HEAD"):
            if path == "/":
                self.sessions.check_room(client)
            if path in PAGE:  # without deep links
                await self.app({**scope, "query_string": b""}, receive, send)
                return
            if path in INFO or path.startswith(FOLDERS):
                await self.app(scope, receive, send)
                return
            if path.startswith(HEARTBEAT) or path == DATA:
                name = _name(path.removeprefix(HEARTBEAT) if path != DATA else _asked(scope))
                if path == DATA and name not in self.sessions:
                    raise HTTPException(410, CLOSED)
                async with self.sessions.connected(name, client, self.page):
                    await self.app(scope, receive, send)
                return
        raise HTTPException(404, "there is nothing here")

    async def _checked(self, request: Request, path: str) -> bytes:
        """The body of an event, put together anew. Raises HTTPException, Busy."""
        try:
            event = parse_json(await _read(request), "the event", DataError)
            if path == RESET:  # does nothing
                return json.dumps({"event_id": str(event.get("event_id"))}).encode()
            fields = {key: _own(event.get(key), self.files) for key in FIELDS[path]}
        except (DataError, ValueError) as error:
            raise HTTPException(400, f"the request cannot be read: {error}") from None
        name = _name(fields["session_hash"])
        if name not in self.sessions:
            self.sessions.check_room(client_address(request))
            raise HTTPException(410, CLOSED)
        function = fields["fn_index"]
        if not isinstance(function, int) or function not in self.page.fns:
            raise HTTPException(400, "there is no such event")
        if path == JOIN:
            data = fields["data"]
            if not isinstance(data, list) or len(data) != len(self.page.fns[function].inputs):
                raise HTTPException(400, "the event is given more or less than it takes")
            check_burden(self.page, name)
        return json.dumps(fields).encode()


# What Gradio's page sends; other fields are dropped.
FIELDS = {
    JOIN: ("data", "fn_index", "session_hash", "event_data", "trigger_id"),
    CANCEL: ("fn_index", "session_hash", "event_id"),
}


def _own(value: Any, files: Files, depth: int = 0) -> Any:
    """The same, where every file is one of ours. Raises ValueError."""
    if depth > DEPTH:
        raise ValueError("too many brackets inside each other")
    if isinstance(value, list):
        return [_own(item, files, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if "path" not in value and "url" not in value:
        return {key: _own(item, files, depth + 1) for key, item in value.items()}
    path = value.get("path")
    if not isinstance(path, str) or files.find(path) is None:
        raise ValueError("a file in it is not kept (any more): send it again")
    # Gradio would believe what else is said of a file.
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


async def _read(request: Request) -> bytes:
    """A body. Raises ValueError if it is long."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > EVENT_BYTES:
            raise ValueError(f"it has more than {EVENT_BYTES >> 10} KiB")
    return body


def _given(body: bytes, receive: Receive) -> Receive:
    """Gives a body, then what comes after it."""
    given = False

    async def receive_body() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body


def _asked(scope: Scope) -> str:
    return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]


def _name(text: Any) -> str:
    """A page's name. Raises HTTPException."""
    if not isinstance(text, str) or NAME.fullmatch(text) is None:
        raise HTTPException(400, "this is no name of a page")
    return text
