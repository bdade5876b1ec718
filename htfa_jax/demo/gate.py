"""What stands before page and API: who may ask, how much may come, and in what time."""

from __future__ import annotations

import asyncio
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from htfa_jax.demo.http import PREFIX, busy_problem, problem
from htfa_jax.demo.serving import Serving
from htfa_jax.errors import Busy

# Of a request to the API, besides its images: the other fields.
FIELDS_BYTES = 2**20
SAFE = ("GET", "HEAD", "OPTIONS")


class Gate:
    """ASGI middleware that refuses, before anything is read where it can.

    - A request whose Host is none of ours: a page elsewhere may have bent its own name to our
      address (DNS rebinding).
    - A request that changes something and says that another site's page made it.
    - More bytes than allowed, told or counted, or bytes that come too slowly.
    - A request to the API for which there is no room in the queue.

    Args:
      app: what stands behind it.
      serving: whose queue and limits these are.
      hosts: names that this server is called by; None allows all.
    """

    def __init__(self, app: ASGIApp, serving: Serving, hosts: frozenset[str] | None):
        self.app, self.serving, self.hosts = app, serving, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
            if scope["method"] not in SAFE:
                receive = self._counted(receive)
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts is not None and _parts(f"//{host}").hostname not in self.hosts:
            return problem(f"this server is not called {host!r}: --hosts tells it its names", 400)
        if scope["method"] in SAFE:
            return None
        origin = headers.get("origin")
        if origin is not None and _parts(origin).netloc != host:
            return problem(f"pages of {origin} may not use this server", 403)
        told = headers.get("content-length", "0")
        if not told.isdigit() or int(told) > self._most:
            return problem(self._too_large, 413)
        if scope["path"].startswith(PREFIX):
            try:
                self.serving.check_room((scope.get("client") or ("unknown",))[0])
            except Busy as busy:
                return busy_problem(busy)
        return None

    @property
    def _most(self) -> int:
        return self.serving.limits.upload_mb * 10**6 + FIELDS_BYTES

    @property
    def _too_large(self) -> str:
        return f"more than {self.serving.limits.upload_mb} MB: make the images smaller"

    def _counted(self, receive: Receive) -> Receive:
        """The same, as long as the body keeps to the limits."""
        seconds = self.serving.limits.upload_seconds
        deadline = asyncio.get_running_loop().time() + seconds
        come, whole = 0, False

        async def counted() -> Message:
            nonlocal come, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request took more than {seconds} s") from None
            come += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if come > self._most:
                raise HTTPException(413, self._too_large)
            return message

        return counted


def _parts(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")
