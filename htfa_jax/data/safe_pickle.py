"""Pickles of arrays and plain values, read without running what they name.

A pickle is a program that may call anything. This reader lets it name nothing but what NumPy's own
arrays, numbers and types are made of, and refuses the rest.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from htfa_jax.errors import DataError


def _encode(text: str, encoding: str) -> bytes:
    """What protocols before 3 call for bytes: `_codecs.encode`, for that alone."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


# What arrays of any version of NumPy name, and what they get.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}
for _module in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_module}.multiarray", "_reconstruct"] = np.zeros(0).__reduce__()[0]
    _ALLOWED[f"{_module}.multiarray", "scalar"] = np.float64(0).__reduce__()[0]
    _ALLOWED[f"{_module}.numeric", "_frombuffer"] = np.zeros(0).__reduce_ex__(5)[0]


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it names something outside of itself")


def load(path: Path) -> Any:
    """The value of a pickle that holds arrays, texts, numbers, lists and dictionaries only.

    Raises DataError for any other: nothing of it was run.
    """
    try:
        with path.open("rb") as file:
            # Pickles of Python 2 hold texts as bytes of any value.
            return _Reader(file, encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"no file at {path}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(
            f"{path} cannot be read: {error}. Only arrays, texts, numbers, lists and dictionaries "
            "are read from a pickle; anything else could run a program"
        ) from error
