"""What stands before page and API: who may ask, how much may come, and in what time."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from htfa_jax.demo.http import PREFIX, busy_problem, client_at, problem
from htfa_jax.demo.serving import Serving
from htfa_jax.errors import Busy, ConfigError

# Of a request to the API, besides its images: the other fields.
FIELDS_BYTES = 2**20
SAFE = ("GET", "HEAD", "OPTIONS")
# What only the page itself and programs ask for.
INSIDE = (PREFIX, "/gradio_api/")
HOST_IS_OURS = "htfa_jax.host_is_ours"


class Gate:
    """ASGI middleware that refuses, before anything is read where it can.

    - A request whose Host is none of ours: a page elsewhere may have bent its own name to our
      address (DNS rebinding).
    - A request that another site's page made, as browsers say.
    - More bytes than allowed, told or counted, or bytes that come too slowly.
    - A request to the API for which there is no room in the queue.

    Args:
      app: what stands behind it.
      serving: whose queue and limits these are.
      hosts: names that this server is called by, `*.example.org` for all below; None allows all.
      public: of these, the names behind which there is no other server. A proxy may change Host
        or leave out its port, so pages of these names may use this server whatever Host says.

    Raises ConfigError for a name that cannot be.
    """

    def __init__(
        self,
        app: ASGIApp,
        serving: Serving,
        hosts: frozenset[str] | None,
        public: frozenset[str] = frozenset(),
    ):
        self.serving = serving
        self.public = public
        # Requests to the API that are not answered yet, by address.
        self.answering: collections.Counter[str] = collections.Counter()
        self.app = RequestBodyLimitMiddleware(app, serving.limits.upload_mb * 10**6 + FIELDS_BYTES)
        self.trusted = TrustedHostMiddleware(
            _note, ["*"] if hosts is None else patterns(hosts), www_redirect=False
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # The middleware answers with plain text: here it is only asked, and answered for.
        await self.trusted(scope, receive, _nowhere)
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        with self._counted(_client(scope)) if asks(scope) else contextlib.nullcontext():
            await self.app(scope, self._timed(receive), self._explained(scope, receive, send))

    @contextlib.contextmanager
    def _counted(self, client: str) -> Iterator[None]:
        self.answering[client] += 1
        try:
            yield
        finally:
            self.answering[client] -= 1
            self.answering = +self.answering

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if HOST_IS_OURS not in scope:
            return problem(f"this server is not called {host!r}: --hosts tells it its names", 400)
        origin = headers.get("origin")
        if origin is not None and not self._is_ours(origin, host):
            return problem(
                f"pages of {origin} may not use this server, which is {host} here. If that is its "
                "own page, a proxy changed its name: start it with --hosts NAME",
                403,
            )
        # Of an image or a link in such a page browsers say no origin.
        if headers.get("sec-fetch-site") == "cross-site" and scope["path"].startswith(INSIDE):
            return problem("pages of other sites may not use this server", 403)
        if asks(scope):
            try:
                self._check_room(_client(scope))
            except Busy as busy:
                return busy_problem(busy)
        return None

    def _is_ours(self, origin: str, host: str) -> bool:
        """Whether a page of this server made the request, as far as a browser says."""
        if _place(origin) == host.lower():
            return True
        name = _place(origin).rsplit(":", 1)[0]
        return any(
            name == public.lower() or (public[:2] == "*." and name.endswith(public[1:].lower()))
            for public in self.public
        )

    def _check_room(self, client: str) -> None:
        """Raises Busy if the queue is full, or if more is being read than it will hold."""
        limits = self.serving.limits
        self.serving.check_room(client)
        # Those that the engine works on have left the queue.
        worked_on = limits.batch + limits.streams
        if self.answering[client] >= limits.per_client + worked_on:
            raise Busy("too many requests of yours are being read: try again in 1 s", 1, True)
        if self.answering.total() >= limits.queue + worked_on:
            raise Busy("too many requests are being read: try again in 1 s", 1)

    def _explained(self, scope: Scope, receive: Receive, send: Send) -> Send:
        """The same, but what is too large is refused with our sentence, whoever notices it."""
        refused = False

        async def explained(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] == 413:
                refused = True
                most = self.serving.limits.upload_mb
                answer = problem(f"more than {most} MB: make the images smaller", 413)
                await answer(scope, receive, send)
            elif not refused:
                await send(message)

        return explained

    def _timed(self, receive: Receive) -> Receive:
        """The same, as long as the body comes in time."""
        seconds = self.serving.limits.upload_seconds
        deadline = asyncio.get_running_loop().time() + seconds
        whole = False

        async def timed() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                reason, headers = f"the request took more than {seconds} s", {"connection": "close"}
                raise HTTPException(408, reason, headers) from None
            whole = not message.get("more_body", False)
            return message

        return timed


def patterns(hosts: frozenset[str]) -> list[str]:
    """Names as Starlette writes them. Raises ConfigError for one that cannot be."""
    for host in hosts:
        if "*" in host.removeprefix("*.") and host != "*":
            raise ConfigError(f"--hosts {host!r}: a * stands for the first part, as *.example.org")
    return [f"[{host}]" if ":" in host and host[0] != "[" else host for host in hosts]


def asks(scope: Scope) -> bool:
    """Whether a request asks the engine for something."""
    return scope["method"] not in SAFE and scope["path"].startswith(PREFIX)


def _client(scope: Scope) -> str:
    return client_at((scope.get("client") or (None,))[0])


async def _note(scope: Scope, receive: Receive, send: Send) -> None:
    scope[HOST_IS_OURS] = True


async def _nowhere(message: Message) -> None:
    pass


def _place(address: str) -> str:
    """Host and port of an address; empty if it has none."""
    try:
        return urlsplit(address).netloc.lower()
    except ValueError:
        return ""
