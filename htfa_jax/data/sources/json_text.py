"""JSON of datasets: what is wrong with a text in words, and arrays read element by element."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

# A record that does not end within so many characters is damage, not a record.
LONGEST = 64 * 2**20
_BLANKS = re.compile(r"[ \t\r\n]*")


def decode(content: bytes) -> Any:
    """The value of a JSON text. Raises ValueError that says what is wrong and what to do."""
    try:
        text = content.decode("utf-8")
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(content, error.start)) from error
    except json.JSONDecodeError as error:
        raise ValueError(explained(text, error.msg, error.pos)) from error
    except RecursionError as error:
        raise ValueError("not valid JSON: too many brackets inside each other") from error


def explained(text: str, message: str, position: int) -> str:
    """What is wrong with a text of which `json` says `message` at `position`."""
    before, behind = text[:position].rstrip(), text[position:].lstrip()
    if text.startswith("\ufeff"):
        return "begins with a byte order mark: write UTF-8 without one"
    half_escape = "escape" in message and len(text) - position <= 6
    if not behind or half_escape or message.startswith("Unterminated string"):
        return "not valid JSON: it ends in the middle (was the file cut off?)"
    if before.endswith(",") and behind[0] in "]}":
        return f"not valid JSON: a comma is left over before {behind[0]} at character {position}"
    if behind[0] == "," and behind[1:].lstrip()[:1] in ("]", "}"):
        return f"not valid JSON: a comma is left over at character {position}"
    if message.startswith("Extra data") and behind[0] == ",":
        return (
            "not valid JSON: a comma follows the record; lines of JSON have none between them "
            "(an array has, and begins with [)"
        )
    return f"not valid JSON: {message} at character {position}"


def check_beginning(content: bytes) -> None:
    """Raises ValueError if a file begins as no UTF-8 text of JSON does."""
    if content.startswith(codecs.BOM_UTF8):
        raise ValueError("begins with a byte order mark (BOM): save it as UTF-8 without one")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("is UTF-16: save it as UTF-8")


def array_elements(pieces: Iterable[bytes]) -> Iterator[str]:
    """The texts of an array's elements, in order; no more than one of them is held.

    Raises ValueError that says which element is wrong and why: nothing behind it can be trusted.
    """
    return _ArrayReader(pieces).elements()


class _ArrayReader:
    def __init__(self, pieces: Iterable[bytes]):
        self.texts = _as_text(pieces)
        self.text, self.at = "", 0
        self.decoder = json.JSONDecoder()

    def elements(self) -> Iterator[str]:
        self._expect("[", "an array begins with [")
        number = 0
        if self._next() == "]":
            self.at += 1
        else:
            while True:
                yield self._element(number)
                number += 1
                if self._next() == "]":
                    self.at += 1
                    break
                self._expect(",", f"behind record {number - 1} a comma or ] must follow")
                if self._next() == "]":
                    raise ValueError(
                        f"not valid JSON: a comma is left over behind record {number - 1}, before ]"
                    )
        if self._next():
            raise ValueError("not valid JSON: something follows the end of the array")

    def _element(self, number: int) -> str:
        self._next()
        while True:
            try:
                end = self.decoder.raw_decode(self.text, self.at)[1]
            except json.JSONDecodeError as error:
                if len(self.text) - self.at < LONGEST and self._more():
                    continue
                what = explained(self.text[self.at :], error.msg, error.pos - self.at)
                raise ValueError(f"record {number}: {what}") from error
            except RecursionError as error:
                raise ValueError(f"record {number}: too many brackets in each other") from error
            if end == len(self.text) and self._more():
                continue  # a number may go on in the next piece
            found, self.at = self.text[self.at : end], end
            return found

    def _expect(self, character: str, otherwise: str) -> None:
        found = self._next()
        if found != character:
            what = f"{found!r} is there" if found else "the file ends (was it cut off?)"
            raise ValueError(f"not valid JSON: {otherwise}, but {what}")
        self.at += 1

    def _next(self) -> str:
        """The next character that is not blank, without taking it; "" at the end."""
        while True:
            self.at = _BLANKS.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Reads at least as much as is left over, so that long records cost no squares."""
        left = self.text[self.at :]
        parts, length = [left], 0
        for text in self.texts:
            parts.append(text)
            length += len(text)
            if length >= max(len(left), 1):
                break
        if length:
            self.text, self.at = "".join(parts), 0
        return length > 0


def _as_text(pieces: Iterable[bytes]) -> Iterator[str]:
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    for piece in pieces:
        waiting = len(decoder.getstate()[0])
        try:
            yield decoder.decode(piece)
        except UnicodeDecodeError as error:
            at = position - waiting + error.start
            raise ValueError(_not_utf8(error.object, error.start, at)) from error
        position += len(piece)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8: the file ends in the middle of a character") from error


def _not_utf8(content: bytes, start: int, position: int | None = None) -> str:
    position = start if position is None else position
    return f"not UTF-8: byte 0x{content[start]:02x} at position {position}; save it as UTF-8"
