"""What page, API and gate share of HTTP: who asks, errors as JSON, boxes as text."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from htfa_jax.common.json_files import parse_json
from htfa_jax.errors import Busy, DataError, HTFAError

PREFIX = "/v1/"


def read_box(text: str | None, name: str) -> Any:
    """A box as JSON or as numbers with commas; None without one. Raises DataError."""
    if not text or not text.strip():
        return None
    try:
        numbers = f"[{text.strip().removeprefix('[').removesuffix(']')}]"
        return parse_json(numbers, name, DataError, list)
    except DataError:
        raise DataError(
            f"{name}={text[:80]!r} must be four numbers: x, y, width, height in pixels"
        ) from None


def client_of(request: Any) -> str:
    """The address that a request came from."""
    return request.client.host if request.client else "unknown"


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
    return problem(str(error), 429 if error.greedy else 503, headers)


def problem(message: str, status: int, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as it is answered."""
    return JSONResponse({"error": message}, status, headers)
