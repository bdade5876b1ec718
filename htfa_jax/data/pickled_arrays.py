"""NumPy's arrays out of what a pickle says of them, without NumPy's own rebuilding.

NumPy believes a pickled type: sizes, offsets and flags that lie make it read and write outside of
its arrays. Here a type is one of a list of codes, and an array is a view of bytes whose number was
compared with its shape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

# Booleans, whole and floating-point numbers; none holds a pointer, a field or a size of its own.
CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
AXES = 32
# What NumPy says of a plain type behind its byte order: no subarray, no names, no fields, the
# usual size and alignment, no flags.
PLAIN = (None, None, None, -1, -1, 0)


@dataclasses.dataclass(frozen=True)
class Name:
    """Something that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass
class PickledType:
    """A type of numbers; its byte order comes behind it."""

    code: str
    order: str | None = None

    def build(self, state: Any) -> PickledType:
        """Takes the byte order. Raises ValueError for all but a plain type."""
        orders = "|" if self.code.endswith("1") else "<>"
        if not any(_same(state, (3, order, *PLAIN)) for order in orders):
            raise ValueError(f"it describes a type of numbers {self.code!r} as NumPy does not")
        if self.order is not None:
            raise ValueError("it describes a type of numbers twice")
        self.order = state[1]
        return self

    def dtype(self) -> np.dtype:
        """As NumPy has it."""
        if self.order is None:
            raise ValueError("it has a type of numbers without a byte order")
        return np.dtype(self.order + self.code)


class PickledArray:
    """An array of which nothing but the name was read yet.

    Attributes:
      keys: under which the pickle remembers it.
    """

    def __init__(self) -> None:
        self.keys: list[int] = []

    def build(self, state: Any) -> np.ndarray:
        """The array that a state describes."""
        if type(state) is not tuple or len(state) != 5 or not _same(state[0], 1):
            raise ValueError("it describes an array as NumPy does not")
        _, shape, kind, fortran, content = state
        return array_of(content, kind, shape, "F" if _flag(fortran) else "C")


def array_of(content: Any, kind: Any, shape: Any, order: str = "C") -> np.ndarray:
    """An array that looks at bytes; read-only. Raises ValueError unless they are just its own.

    Args:
      content: bytes, or Python 2's text of them.
      kind: a `PickledType`.
      shape: its axes.
      order: of the numbers: C or F.
    """
    if type(kind) is not PickledType:
        raise ValueError("it has an array without a type of numbers")
    content, dtype = _as_bytes(content), kind.dtype()
    if type(shape) is not tuple or len(shape) > AXES or not all(map(_is_size, shape)):
        raise ValueError(f"it has an array whose shape is no tuple of at most {AXES} sizes")
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(content):
        raise ValueError(
            f"it has an array of {len(content)} bytes, where its shape takes {str(expected)[:30]}"
        )
    if dtype == np.bool_ and content.strip(b"\0\1"):
        raise ValueError("it has an array of truth values that are neither true nor false")
    # NumPy cannot count the bytes of some shapes without numbers, such as (2**40, 2**40, 0).
    if not expected and math.prod(size or 1 for size in shape) * dtype.itemsize >= 2**63:
        raise ValueError("it has an array without numbers whose shape is too large")
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _reconstruct(*given: Any) -> PickledArray:
    if not any(_same(given, (Name("numpy", "ndarray"), (0,), kind)) for kind in (b"b", "b")):
        raise ValueError("it begins an array as NumPy does not")
    return PickledArray()


def _scalar(kind: Any, content: Any) -> np.generic:
    return array_of(content, kind, (1,))[0]


def _frombuffer(content: Any, kind: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    if type(order) is str and order in ("C", "F") and axes is None:
        return array_of(content, kind, shape, order)
    array = array_of(content, kind, shape)
    if not _same(order, "K") or type(axes) is not tuple or not all(map(_is_size, axes)):
        raise ValueError("it has an array in an order that NumPy does not write")
    if sorted(axes) != list(range(array.ndim)):
        raise ValueError("it has an array whose axes are in no order")
    return array.transpose(axes)


def _dtype(code: Any, align: Any, copy: Any) -> PickledType:
    if type(code) is not str or code not in CODES or _flag(align) or not _flag(copy):
        named = repr(code[:40]) if type(code) is str else "no name"
        raise ValueError(f"it has an array of type {named}; plain ones are {', '.join(CODES)}")
    return PickledType(code)


def _encode(text: Any, encoding: Any) -> bytes:
    """What protocols before 3 call for bytes."""
    if type(text) is not str or not _same(encoding, "latin1"):
        raise ValueError("it has bytes in another encoding than latin1")
    return text.encode("latin1")


def _bytes() -> bytes:
    """What protocols before 3 call for no bytes."""
    return b""


# What a pickle may call, and what is done then. `numpy.ndarray` is only named.
CALLS: dict[Name, Callable[..., Any]] = {
    Name("numpy", "dtype"): _dtype,
    Name("_codecs", "encode"): _encode,
    Name("builtins", "bytes"): _bytes,
    Name("__builtin__", "bytes"): _bytes,
}
for _module in ("numpy.core", "numpy._core"):  # of NumPy 1, and of NumPy 2
    CALLS[Name(f"{_module}.multiarray", "_reconstruct")] = _reconstruct
    CALLS[Name(f"{_module}.multiarray", "scalar")] = _scalar
    CALLS[Name(f"{_module}.numeric", "_frombuffer")] = _frombuffer
NAMES = frozenset(CALLS) | {Name("numpy", "ndarray")}


def _as_bytes(content: Any) -> bytes:
    if type(content) is str:
        try:
            return content.encode("latin1")
        except UnicodeEncodeError:
            raise ValueError("it has an array made of text") from None
    if type(content) is not bytes:
        raise ValueError("it has an array that is not made of bytes (of objects?)")
    return content


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _flag(value: Any) -> bool:
    """True or false, which Python 2 wrote as 1 and 0."""
    if type(value) not in (bool, int) or value not in (0, 1):
        raise ValueError("it has something else where true or false belongs")
    return bool(value)


def _same(value: Any, expected: Any) -> bool:
    """Whether two values are equal and of the same types; asks nothing of other types."""
    if type(value) is not type(expected):
        return False
    if type(value) is not tuple:
        return value == expected
    return len(value) == len(expected) and all(map(_same, value, expected))
