"""The one reader of JSON: whatever a file holds, its errors are sentences of one class.

`json` alone raises five kinds of errors, and gives a list or NaN where a program expects an object
of numbers. All files that somebody else may have written are read here.
"""

from __future__ import annotations

import codecs
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from htfa_jax.errors import HTFAError

# Brackets inside each other. No file of ours has ten; of more, `repr` and `json.dumps` would run
# out of stack where `json.loads` did not.
NESTING = 100
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def parse_json(
    text: str | bytes,
    where: str,
    error: type[HTFAError],
    expect: type = dict,
    *,
    allow_nan: bool = False,
) -> Any:
    """The value of a JSON text.

    Args:
      text: as bytes it must be UTF-8.
      where: the file, and the line or record in it, which messages begin with.
      error: what is raised whatever is wrong with the text.
      expect: what its value must be: dict, list, str; object takes any.
      allow_nan: whether numbers may be NaN or infinite, which Python writes and JSON does not know.
    """
    try:
        plain = text.decode("utf-8") if isinstance(text, bytes) else text
        value = (_ANY_NUMBER if allow_nan else _FINITE).decode(plain)
        if plain.count("[") + plain.count("{") > NESTING and _is_too_deep(value):
            raise RecursionError
        if ("\\ud" in plain or "\\uD" in plain) and not _is_text(value):
            raise ValueError("it holds half of a surrogate pair: not a character")
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: {explained(problem)}") from problem
    if not isinstance(value, expect):
        found, wanted = _NAMES[type(value)], _NAMES[expect]
        raise error(f"{where}: expected {wanted}, found {found}: is it the right file?")
    return value


def read_json(
    path: Path, error: type[HTFAError], expect: type = dict, *, allow_nan: bool = False
) -> Any:
    """The value of a JSON file; arguments as `parse_json`. Raises `error` without such a file."""
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from problem
    return parse_json(content, str(path), error, expect, allow_nan=allow_nan)


def read_json_lines(
    path: Path, error: type[HTFAError], *, allow_nan: bool = False
) -> Iterator[Any]:
    """The objects of a file of JSON lines; arguments as `parse_json`.

    A last line that does not end is left out if it is no JSON: it is being written, or whoever
    wrote it was killed.
    """
    for number, line in json_lines(path, error):
        try:
            value = parse_json(line, f"{path}, line {number}", error, allow_nan=allow_nan)
        except error:
            if line.endswith(b"\n"):
                raise
            return
        yield value


def json_lines(path: Path, error: type[HTFAError]) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and text of each line that is not blank. Raises `error` without such a file.

    Lines end at a line feed only: JSON may hold what else ends a line for Python.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    check_beginning(line)
                if line.strip():
                    yield number, line
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from problem
    except ValueError as problem:
        raise error(f"{path} {problem}") from problem


def check_beginning(content: bytes) -> None:
    """Raises ValueError if a file begins as no UTF-8 text of JSON does."""
    if content.startswith(codecs.BOM_UTF8):
        raise ValueError("begins with a byte order mark (BOM): save it as UTF-8 without one")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("is UTF-16: save it as UTF-8")


def explained(problem: Exception, start: int = 0) -> str:
    """What is wrong with a text in words, and what to do.

    Args:
      problem: what decoding it raised.
      start: where in the decoded text the value begins.
    """
    if isinstance(problem, UnicodeDecodeError):
        if problem.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "not UTF-8 but UTF-16: save it as UTF-8"
        return not_utf8(problem, problem.start)
    if isinstance(problem, json.JSONDecodeError):
        return _syntax(problem.doc[start:], problem.msg, problem.pos - start)
    if isinstance(problem, RecursionError):
        return "not valid JSON: too many brackets inside each other"
    if str(problem).startswith("Exceeds the limit"):  # Python's own, which advises programmers
        return f"damaged: a number in it has more than {sys.get_int_max_str_digits()} digits"
    return str(problem)


def not_utf8(problem: UnicodeDecodeError, position: int) -> str:
    """Which byte of a file is no UTF-8, at its position in the whole."""
    byte = problem.object[problem.start]
    return f"not UTF-8: byte 0x{byte:02x} at position {position}; save it as UTF-8"


def _syntax(text: str, message: str, position: int) -> str:
    if message.startswith("Illegal trailing comma"):  # since Python 3.13 it is the comma's place
        position += 1
    before, behind = text[:position].rstrip(), text[position:].lstrip()
    line = text.count("\n", 0, position) + 1
    at = f"character {position}"
    if line > 1:
        at = f"line {line}, character {position - text.rfind(chr(10), 0, position) - 1}"
    if text.startswith("\ufeff"):
        return "begins with a byte order mark: write UTF-8 without one"
    half_escape = "escape" in message and len(text) - position <= 6
    if not behind or half_escape or message.startswith("Unterminated string"):
        return "not valid JSON: it ends in the middle (was the file cut off?)"
    if before.endswith(",") and behind[0] in "]}":
        return f"not valid JSON: a comma is left over before {behind[0]} at {at}"
    if behind[0] == "," and behind[1:].lstrip()[:1] in ("]", "}"):
        return f"not valid JSON: a comma is left over at {at}"
    if message.startswith("Extra data") and behind[0] == ",":
        return (
            "not valid JSON: a comma follows the record; lines of JSON have none between them "
            "(an array has, and begins with [)"
        )
    return f"not valid JSON: {message} at {at}"


def _is_text(value: Any) -> bool:
    """Whether all of a value can be written as UTF-8."""
    try:
        return bool(json.dumps(value, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(NESTING + 1):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
    return bool(level)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is no number here: write one, or leave it out")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        _refuse(text[:20])
    return value


_ANY_NUMBER = json.JSONDecoder()
_FINITE = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
