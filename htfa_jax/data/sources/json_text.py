"""Arrays of JSON, read element by element: datasets need not fit into memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator

from htfa_jax.common.json_files import explained, not_utf8

# A record that does not end within so many characters is damage, not a record.
LONGEST = 64 * 2**20
_BLANKS = re.compile(r"[ \t\r\n]*")


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
            except (ValueError, RecursionError) as error:
                cut_off = isinstance(error, json.JSONDecodeError)
                if cut_off and len(self.text) - self.at < LONGEST and self._more():
                    continue
                raise ValueError(f"record {number}: {explained(error, self.at)}") from error
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
            raise ValueError(not_utf8(error, position - waiting + error.start)) from error
        position += len(piece)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8: the file ends in the middle of a character") from error
