"""What page, API and gate share of HTTP: who asks, errors as JSON, boxes as text."""

from __future__ import annotations

import ipaddress
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from htfa_jax.common.json_files import parse_json
from htfa_jax.errors import Busy, DataError, HTFAError

PREFIX = "/v1/"
LONGEST_BOX = 200  # characters


def read_box(text: str | None, name: str) -> Any:
    """A box as JSON or as numbers with commas; None without one. Raises DataError."""
    if not text or not text.strip():
        return None
    numbers = f"[{text.strip().removeprefix('[').removesuffix(']')}]"
    try:
        if len(text) > LONGEST_BOX:
            raise DataError(f"{name} is {len(text)} characters long")
        return parse_json(numbers, name, DataError, list)
    except DataError:
        raise DataError(
            f"{name}={text[:80]!r} must be four numbers: x, y, width, height in pixels"
        ) from None


def client_address(request: Any) -> str:
    """Whom a request came from."""
    return client_at(request.client.host if request.client else None)


def client_at(address: str | None) -> str:
    """Who is at an address, for limits: of IPv6 one connection has 2^64 of them."""
    try:
        found = ipaddress.ip_address(address or "")
    except ValueError:
        return address or "unknown"
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found.packed, 64), strict=False))


def sentence(error: Exception) -> str:
    """What a caller is told of an error."""
    if isinstance(error, HTFAError):
        return str(error)
    if isinstance(error, StarletteHTTPException):
        return str(error.detail)
    if isinstance(error, RequestValidationError):
        return "; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors())
    return "the server failed at this; its log says why"


def busy_problem(error: Busy) -> JSONResponse:
    """No room, and when there may be some."""
    headers = {"retry-after": str(error.retry_after)}
    return problem(str(error), 429 if error.by_this_client else 503, headers)


def problem(message: str, status: int, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as it is answered."""
    return JSONResponse({"error": message}, status, headers)
