"""Connections: how many there may be, and how long one may be open without asking anything."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from htfa_jax.demo.http import client_at
from htfa_jax.demo.options import Limits

RETRY = 10  # seconds


class Connection(H11Protocol):
    """uvicorn's, with two limits that it does not have.

    A connection that is not being answered is closed after `limits.header_seconds`: one that
    sends half a request's head, or goes on sending what was refused. And there are at most
    `limits.connections` of them, and `limits.connections_per_client` from one address, unless
    they all come from a proxy.
    """

    def __init__(self, *args: Any, limits: Limits, proxied: bool, **options: Any):
        super().__init__(*args, **options)
        self.limits = limits
        self._most_of_one = limits.connections if proxied else limits.connections_per_client
        self.visitor = ""
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Takes a connection, or refuses it."""
        super().connection_made(transport)
        self.visitor = client_at(self.client[0] if self.client else None)
        others = list(self.connections)
        own = sum(other.visitor == self.visitor for other in others)
        if len(others) > self.limits.connections or own > self._most_of_one:
            whose = "of yours " if len(others) <= self.limits.connections else ""
            transport.write(_refusal(f"too many connections {whose}are open: try again later"))
            transport.close()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Takes what came."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """An answer is sent."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Counts the seconds while nothing is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.limits.header_seconds, self.transport.close)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def connections(limits: Limits, proxied: bool) -> Any:
    """What uvicorn makes of every connection.

    Args:
      limits: of their number and time.
      proxied: whether they all come from a proxy.
    """
    return functools.partial(Connection, limits=limits, proxied=proxied)


@functools.cache
def _refusal(reason: str) -> bytes:
    body = json.dumps({"error": reason}).encode()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
        b"retry-after: %d\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"
        % (RETRY, len(body), body)
    )
