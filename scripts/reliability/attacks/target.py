"""The server that is attacked: its page, its events, and what came of an attempt."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import re
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL import Image

REFUSED, SURVIVED, THROUGH = "refused", "survived", "GOT THROUGH"
# Files that a visitor must never see, and what their contents look like.
SECRETS = {
    "/etc/passwd": re.compile(rb"root:[^:]*:0:0:"),
    "/proc/self/environ": re.compile(rb"(?:^|\0)PATH="),
}
EVENT_SECONDS = 30
CUT_OFF = 444  # a status that is none of HTTP's


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What came of something that was tried.

    Attributes:
      what: it was.
      outcome: `REFUSED`, `SURVIVED` or `THROUGH`.
      detail: what the server said.
    """

    what: str
    outcome: str
    detail: str = ""


class Target:
    """A running server.

    Args:
      url: without a slash at its end.
      seconds: that slow attacks wait for the server to end them.
      upload_mb: that are sent at most to fill the disk.
      image: path of an image on the server that no visitor may see.
    """

    def __init__(self, url: str, seconds: float = 90.0, upload_mb: int = 600, image: str = ""):
        self.url, self.seconds, self.upload_mb, self.image = url, seconds, upload_mb, image
        self.host, self.port = urlsplit(url).hostname or "", urlsplit(url).port or 80
        # A connection for each request: one that is cut off says nothing of the next.
        alone = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=url, timeout=EVENT_SECONDS, limits=alone)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Sends a GET; `CUT_OFF` is the status where no answer came."""
        return self._send("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """Sends a POST; `CUT_OFF` is the status where no answer came."""
        return self._send("POST", path, **options)

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self.http.request(method, path, **options)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
            return httpx.Response(CUT_OFF, text=f"cut off: {error}")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The page's components and events, as Gradio describes them."""
        return self.get("/config").json()

    @property
    def components(self) -> dict[int, dict[str, Any]]:
        """By id."""
        return {component["id"]: component for component in self.config["components"]}

    @property
    def events(self) -> list[dict[str, Any]]:
        """Those that call the server."""
        return [event for event in self.config["dependencies"] if event["backend_fn"]]

    def values(self, event: dict[str, Any]) -> list[Any]:
        """What the page sends with an event before anybody has touched it."""
        components = self.components
        return [components[i]["props"].get("value") for i in event["inputs"]]

    def types(self, event: dict[str, Any]) -> list[str]:
        """Of the components that an event takes."""
        components = self.components
        return [components[i]["type"] for i in event["inputs"]]

    def event_of(self, elem_id: str, kind: str) -> dict[str, Any]:
        """The event that a component starts."""
        names = {i: c["props"].get("elem_id") for i, c in self.components.items()}
        return next(
            event
            for event in self.events
            for component, what in event["targets"]
            if names.get(component) == elem_id and what == kind
        )

    def filled(self, event: dict[str, Any], **values: Any) -> list[Any]:
        """What the page sends with an event, with other values for components of these names."""
        components = self.components
        names = [components[i]["props"].get("elem_id") for i in event["inputs"]]
        return [values.get(n, old) for n, old in zip(names, self.values(event), strict=True)]

    def health(self, what: str) -> Attempt:
        """Whether the server is there."""
        start = time.monotonic()
        try:
            answer = self.get("/healthz", timeout=10)
        except httpx.HTTPError as error:
            return Attempt(what, THROUGH, f"it does not answer: {error!r}")
        well = answer.status_code == 200 and '"ok"' in answer.text
        took = f"{time.monotonic() - start:.1f} s, {answer.text}"
        return Attempt(what, SURVIVED if well else THROUGH, took)

    def upload(self, name: str, content: bytes) -> str:
        """Sends a file as the page does. Returns its path, empty if it was refused."""
        answer = self.post("/gradio_api/upload", files={"files": (name, content)})
        return answer.json()[0] if answer.status_code == 200 else ""

    def connect(self, seconds: float = 10) -> socket.socket:
        """A connection without HTTP."""
        return socket.create_connection((self.host, self.port), timeout=seconds)

    def head(self, line: str, *headers: str) -> bytes:
        """The head of a request."""
        return "\r\n".join([line, f"Host: {self.host}:{self.port}", *headers, "", ""]).encode()

    @contextlib.contextmanager
    def page(self, name: str | None = None, *headers: str) -> Iterator[Page]:
        """Opens a page as a browser does; refused if its `status` is not 200."""
        name = name or secrets.token_hex(6)
        with self.connect() as connection:
            line = f"GET /gradio_api/heartbeat/{name} HTTP/1.1"
            connection.sendall(self.head(line, *headers))
            yield Page(self, name, int(connection.recv(4096).split(b" ", 2)[1]))


@dataclasses.dataclass(frozen=True)
class Page:
    """An open page.

    Attributes:
      target: whose.
      name: Gradio's for it.
      status: of the connection that keeps it open.
    """

    target: Target
    name: str
    status: int

    def join(self, event: dict[str, Any], data: Any, detail: Any = None) -> httpx.Response:
        """Starts an event."""
        body = {
            "data": data,
            "fn_index": event["id"],
            "session_hash": self.name,
            "event_data": detail,
            "trigger_id": event["targets"][0][0] if event["targets"] else None,
        }
        return self.target.post("/gradio_api/queue/join", json=body)

    def run(self, event: dict[str, Any], data: Any, detail: Any = None) -> str:
        """What an event gives in the end, or why it was refused, as text."""
        joined = self.join(event, data, detail)
        if joined.status_code != 200:
            return f"refused with {joined.status_code}: {joined.text}"
        said, begun = "", time.monotonic()
        parameters = {"session_hash": self.name}
        with self.target.http.stream("GET", "/gradio_api/queue/data", params=parameters) as lines:
            for line in lines.iter_lines():
                said += line
                if "process_completed" in line or time.monotonic() - begun > EVENT_SECONDS:
                    break
        return said


def file_of(path: str, **more: Any) -> dict[str, Any]:
    """A file as the page speaks of it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def paths_in(text: str) -> set[str]:
    """Places of files that an answer names."""
    return {json.loads(f'"{path}"') for path in re.findall(r'"path":\s*"((?:[^"\\]|\\.)+)"', text)}


def shows(content: bytes, path: str) -> bool:
    """Whether something holds what is in a secret file."""
    return SECRETS[path].search(content) is not None


def png(size: tuple[int, int] = (48, 48), color: str = "orange") -> bytes:
    """An image."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "png")
    return buffer.getvalue()
