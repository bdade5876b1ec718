"""Pickles of arrays and plain values, read without running what they name.

A pickle is a program for a small machine, which may call anything. This is such a machine that
cannot: it makes dictionaries, lists, tuples, texts, bytes and numbers, and arrays by the functions
of `pickled_arrays`. Whatever else a pickle names is refused. Files of ObMan and HO-3D are such.
"""

from __future__ import annotations

import codecs
import io
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from htfa_jax.data.pickled_arrays import CALLS, NAMES, Name, PickledArray, PickledType
from htfa_jax.errors import DataError

MAX_BYTES = 64 * 2**20  # of a file
MAX_STEPS = 2**20  # of the program in it
# Values inside each other. No dataset has ten; of more, `repr` would run out of stack.
NESTING = 50
# Of numbers, as in arrays. Longer ones cost squares: to print them, and as keys of one hash.
BITS = 64

_PUSHED = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
# Their argument is the value.
_GIVEN = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE BINUNICODE8 SHORT_BINUNICODE BINBYTES BINBYTES8 SHORT_BINBYTES "
    "BYTEARRAY8".split()
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS, _GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
# What they do is nothing here: the whole file is in memory.
_IDLE = ("PROTO", "FRAME")
_PLAIN = (str, bytes, int, float, bool, type(None))


def load(path: Path) -> Any:
    """The value of a pickle that holds arrays, texts, numbers, lists and dictionaries only.

    Arrays are read-only. Raises DataError for any other: nothing of it was run.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise DataError(f"{path} has {size >> 20} MiB, more than {MAX_BYTES >> 20}")
        return loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"no file at {path}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(
            f"{path} cannot be read: {error}. Only arrays, texts, numbers, lists and dictionaries "
            "are read from a pickle; anything else could run a program"
        ) from error


def loads(content: bytes) -> Any:
    """The value of a pickle; ValueError says why it has none."""
    machine = _Machine(content)
    try:
        value = machine.run()
    except (IndexError, KeyError, OverflowError, struct.error) as error:
        raise ValueError("it is damaged") from error
    _measure(value, {}, 0)
    return value


class _Machine:
    def __init__(self, content: bytes):
        self.file, self.size = io.BytesIO(content), len(content)
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # stacks below a mark
        self.memo: dict[int, Any] = {}
        self.array_bytes = 0

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            code = self.file.read(1)
            opcode = pickletools.code2op.get(code.decode("latin1"))
            if opcode is None:
                raise ValueError("it ends in the middle" if not code else "it is no pickle")
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PUSHED:
                self.stack.append(_PUSHED[name]())
            elif name in _GIVEN:
                self.stack.append(self._given(name, opcode))
            elif name in _TUPLES:
                self.stack.append(tuple(self._pop(_TUPLES[name])))
            elif name in _PUTS:
                self._remember(opcode.arg.reader(self.file))
            elif name in _GETS:
                self.stack.append(self.memo[opcode.arg.reader(self.file)])
            elif name in _DONE:
                _DONE[name](self)
            elif name in _IDLE:
                opcode.arg.reader(self.file)
            elif name == "GLOBAL":
                self._name(*opcode.arg.reader(self.file).split(" ", 1))
            else:
                raise ValueError(f"it makes objects ({name})")
        raise ValueError(f"it has more than {MAX_STEPS} steps")

    def _given(self, name: str, opcode: pickletools.OpcodeInfo) -> Any:
        if name == "STRING":  # whose bytes may be any, which pickletools does not know
            value = pickletools.read_stringnl(self.file, decode=False)
            value = codecs.escape_decode(value)[0].decode("latin1")
        else:
            value = opcode.arg.reader(self.file)
        if isinstance(value, int) and value.bit_length() > BITS:
            raise ValueError(f"it has a number of more than {BITS} bits")
        return bytes(value) if isinstance(value, bytearray) else value

    def _pop(self, number: int) -> list[Any]:
        if number > len(self.stack):
            raise IndexError
        values = self.stack[len(self.stack) - number :]
        del self.stack[len(self.stack) - number :]
        return values

    def _pop_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.marked.pop()
        return values

    def _mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def _drop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._pop_mark()

    def _drop_marked(self) -> None:
        self._pop_mark()

    def _twice(self) -> None:
        self.stack.append(self.stack[-1])

    def _tuple(self) -> None:
        values = self._pop_mark()
        self.stack.append(tuple(values))

    def _list(self) -> None:
        values = self._pop_mark()
        self.stack.append(values)

    def _dict(self) -> None:
        values = self._pop_mark()
        self.stack.append({})
        self._set(values)

    def _append(self) -> None:
        self._extend(self._pop(1))

    def _appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to something that is no list")
        self.stack[-1].extend(values)

    def _set_item(self) -> None:
        self._set(self._pop(2))

    def _set_items(self) -> None:
        self._set(self._pop_mark())

    def _set(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(values) % 2:
            raise ValueError("it sets an entry of something that is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in _PLAIN:
                raise ValueError("it has a dictionary whose keys are no texts or numbers")
            self.stack[-1][key] = value

    def _remember(self, key: int) -> None:
        self.memo[key] = value = self.stack[-1]
        if type(value) is PickledArray:
            value.keys.append(key)

    def _remember_next(self) -> None:
        self._remember(len(self.memo))

    def _named(self) -> None:
        module, name = self._pop(2)
        if type(module) is not str or type(name) is not str:
            raise ValueError("it names something that is no text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        found = Name(module, name)
        if found not in NAMES:
            raise ValueError(f"it names {str(found)[:200]!r}")
        self.stack.append(found)

    def _call(self) -> None:
        called, given = self._pop(2)
        if type(called) is not Name or called not in CALLS or type(given) is not tuple:
            raise ValueError("it calls something that it did not name")
        try:
            value = CALLS[called](*given)
        except TypeError:  # too few or too many arguments
            raise ValueError(f"it calls {called} as NumPy does not") from None
        self.stack.append(self._counted(value))

    def _build(self) -> None:
        built, state = self._pop(2)
        if type(built) not in (PickledArray, PickledType):
            raise ValueError("it gives a state to something that is no array")
        value = self._counted(built.build(state))
        self.stack.append(value)
        if type(built) is PickledArray:
            # It was remembered before its state came, and is used again behind it.
            self.memo.update(dict.fromkeys(built.keys, value))

    def _counted(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            # The same bytes twice are a pickle that grows while it is read.
            self.array_bytes += value.nbytes
            if self.array_bytes > self.size:
                raise ValueError("its arrays have more bytes than itself")
        return value


_DONE: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine._mark,
    "POP": _Machine._drop,
    "POP_MARK": _Machine._drop_marked,
    "DUP": _Machine._twice,
    "TUPLE": _Machine._tuple,
    "LIST": _Machine._list,
    "DICT": _Machine._dict,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "MEMOIZE": _Machine._remember_next,
    "STACK_GLOBAL": _Machine._named,
    "REDUCE": _Machine._call,
    "BUILD": _Machine._build,
}


def _measure(value: Any, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """Depth and number of values in a value. Raises ValueError for too many, and what is no value.

    Values that are used many times count as often: whoever prints them visits them as often.

    Args:
      value: of a pickle.
      known: of containers by their place in memory; (0, -1) of those that are being measured.
      depth: of containers around it.
    """
    if type(value) in _PLAIN or isinstance(value, np.ndarray | np.generic):
        return 0, 1
    if type(value) not in (dict, list, tuple):
        raise ValueError("it has a part that is no value")
    if id(value) not in known:
        if depth > NESTING:
            raise ValueError(f"it has more than {NESTING} lists inside each other")
        known[id(value)] = (0, -1)
        inside = [
            _measure(each, known, depth + 1)
            for each in (value.values() if type(value) is dict else value)
        ]
        deepest = 1 + max((height for height, _ in inside), default=0)
        known[id(value)] = deepest, 1 + sum(number for _, number in inside)
    height, number = known[id(value)]
    if number < 0:
        raise ValueError("it has a list that holds itself")
    if depth + height > NESTING + 1:
        raise ValueError(f"it has more than {NESTING} lists inside each other")
    if number > MAX_STEPS:
        raise ValueError(f"it has more than {MAX_STEPS} values")
    return height, number
