"""Inputs that are nearly right: JSON values, texts and bytes with a few places altered.

All take a `random.Random`: an input is made again of its seed, and hypothesis can shrink it.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

NUMBERS = (
    0, 1, -1, 2, 7, 1000, 1e-9, 1e308, math.nan, math.inf, -math.inf, 10**9, 2**31, 2**32, 2**63,
    -(2**63), 10**30, 10**400, 0.5,
)  # fmt: skip
TEXTS = (
    "", "x", " ", "\0", "\n", "..", "../x", "/etc/passwd", "a" * 5000, "\ud800", "é", "🙂", "file://x",
    "-1", "NaN", "null", "{id}", "%s", "<image>", "<|im_end|>", "▁", "\u202e",
)  # fmt: skip
LETTERS = "ab\n\t \"'{}[]()<>|%\\/.,:;0189é\u2028🙂\0"
# What a file of JSON becomes when it is written by something else.
DAMAGE = (b"", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 100_000, b"9" * 5000, b"\xe9", b"{", b"NaN")
RUNS = (b"\xff" * 8, b"\0" * 8, b"[" * 3000, b"9" * 5000, b"\x7f\xff\xff\xff", b"\x80")


def value(rng: Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 2:
        return rng.choice((None, True, False))
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind == 4:
        return rng.choice(TEXTS)
    if kind == 5:
        return text(rng)
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {text(rng): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    nested: Any = rng.choice((0, "x", []))
    for _ in range(rng.choice((3, 60, 200))):
        nested = [nested] if rng.randrange(2) else {"a": nested}
    return nested


def text(rng: Random, longest: int = 12) -> str:
    """Any text of some characters."""
    return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(longest)))


def altered(rng: Random, original: Any) -> Any:
    """A JSON value in a few places of which there is another value, one more, or none."""
    changed = pickle.loads(pickle.dumps(original))  # quicker than by JSON, of values of our own
    for _ in range(rng.randrange(4)):
        node, key, parent = changed, None, None
        while isinstance(node, dict | list) and node and (parent is None or rng.randrange(5)):
            parent = node
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            node = node[key]
        if parent is None or not rng.randrange(40):
            changed = value(rng)
            continue
        what = rng.randrange(4)
        if what < 2:
            parent[key] = value(rng)
        elif what == 2 and isinstance(parent, dict):
            parent.pop(key)
        elif isinstance(parent, dict):
            parent[text(rng)] = value(rng)
        elif what == 2:
            parent.pop(key)
        else:
            parent.append(rng.choice((value(rng), parent[key])))
    return changed


def flipped(rng: Random, original: bytes) -> bytes:
    """Bytes of which some were changed, left out, or put between."""
    content = bytearray(original)
    for _ in range(rng.randrange(1, 5)):
        at, how = rng.randrange(len(content) + 1), rng.randrange(6)
        if how < 2 and at < len(content):
            content[at] = rng.randrange(256)
        elif how == 2:
            del content[at : at + rng.randrange(40)]
        elif how == 3:
            content[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(6)))
        elif how == 4:
            content[at : at + 8] = rng.choice(RUNS)
        else:
            del content[at:]
    return bytes(content)


def json_bytes(rng: Random, original: Any) -> bytes:
    """A file of JSON: its value altered, at times its bytes too."""
    how = rng.randrange(24)
    if how == 0:
        return rng.choice(DAMAGE)
    try:
        found = json.dumps(altered(rng, original), ensure_ascii=bool(rng.randrange(2)))
        content = found.encode("utf-8", "surrogatepass")
    except ValueError:  # a number of too many digits
        content = json.dumps(original).encode()
    if how == 1:
        return flipped(rng, content)
    if how == 2:
        return content.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-8-sig")))
    return content


def json_lines(rng: Random, original: Any) -> bytes:
    """A file of JSON lines, some of them altered."""
    lines = [
        json_bytes(rng, original).replace(b"\n", b"") if rng.randrange(2)
        else json.dumps(original).encode()
        for _ in range(rng.randrange(1, 4))
    ]  # fmt: skip
    return b"\n".join(lines) + b"\n" * rng.randrange(2)


def pickled(rng: Random, original: Any) -> bytes:
    """A pickle: of an altered value, with altered bytes, or of instructions at random."""
    how = rng.randrange(4)
    if how == 0:
        return b"\x80\x02" + b"".join(rng.choice(STEPS) for _ in range(rng.randrange(40))) + b"."
    made = altered(rng, original) if how == 1 else original
    content = pickle.dumps(made, rng.randrange(pickle.HIGHEST_PROTOCOL + 1))
    if how == 1:
        return content
    if how == 2:
        return flipped(rng, content)
    at, step = rng.randrange(len(content)), rng.choice(STEPS)
    return content[:at] + step + content[at:]


def _names() -> Sequence[bytes]:
    found = []
    for module, name in (
        ("numpy", "dtype"), ("numpy", "ndarray"), ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"), ("numpy._core.numeric", "_frombuffer"),
        ("_codecs", "encode"), ("__builtin__", "bytes"), ("os", "system"), ("chumpy.ch", "Ch"),
    ):  # fmt: skip
        found.append(f"c{module}\n{name}\n".encode())
    return found


_ARRAY = pickle.dumps(np.arange(3.0), 2)[2:-1]
_TYPE = (
    b"cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)
_CODES = b"(.012NQR]}abdeghilopqrstu)\x85\x86\x87\x88\x89\x8f\x91\x93\x94\x95\x97\x98RbRbtt(("
STEPS = [
    *_names(), _ARRAY, _TYPE, pickle.dumps(np.float32(2), 5)[2:-1], b"K\x00K\x01\x87", b"K\x00\x85",
    b"U\x01b", b"U\x02f8", b"U\x03O8,", b"C\x08" + bytes(8), b"U\x08" + bytes(8), b"K\x01\x85",
    b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\x7f" * 8, b"\x8b\x00\x01\x00\x00" + b"\x01" * 256,
    b"I01\n", b"S'\\xe9'\n", b"Fnan\n", b"V\\u12\n", b"q\x00", b"h\x00", b"q\x01", b"h\x01",
    b"p5\n", b"g5\n", *(bytes([code]) for code in _CODES),
]  # fmt: skip
