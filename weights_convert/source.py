"""Where weights come from: a folder, a single file or a repository of the Hugging Face hub.

Tensors are read one at a time, a file is downloaded when something in it is needed, and nothing
that a checkpoint brings along is ever run: safetensors hold no code, pickles go through
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from htfa_jax.checkpoints import hub, weights
from htfa_jax.common.hashing import file_sha256
from htfa_jax.common.json_files import read_json
from htfa_jax.errors import CheckpointError
from weights_convert.files import (
    AGAIN,
    PICKLES,
    SAFETENSORS,
    Files,
    HubFiles,
    LocalFiles,
    weight_files,
)

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Source:
    """A checkpoint's configuration and tensors.

    Args:
      name: a folder, a `.safetensors`, `.bin`, `.pt`, `.pth` or `.ckpt` file, or a hub id.
      revision: of a hub repository: branch, tag or commit.

    Attributes:
      name: as given.
      revision: the hub's commit, None for local files.
      config: `config.json`, {} without one.
      files: all files by name.
      is_file: a single file was named.

    Raises:
      CheckpointError: nothing there, no weights, a missing shard, an unreadable file.
    """

    def __init__(self, name: str | Path, revision: str | None = None):
        self.name = str(name)
        self.revision: str | None = None
        path = Path(name).expanduser()
        weights: list[str] | None = None
        self.is_file = path.is_file()
        if self.is_file:
            if path.suffix not in SAFETENSORS + PICKLES:
                raise CheckpointError(
                    f"{path} is no weight file: expected {', '.join(SAFETENSORS + PICKLES)}"
                )
            self.files: Files = LocalFiles(path.parent)
            weights = [path.name]
        elif path.is_dir():
            self.files = LocalFiles(path)
        elif hub.is_repository(name):
            self.files = HubFiles(self.name, revision)
            self.revision = self.files.revision
        else:
            raise CheckpointError(f"no file or folder {path}")
        self.config = self._json("config.json") if "config.json" in self.files.names else {}
        self._reader: tuple[str, Mapping[str, Any]] | None = None
        self._where = self._index(weights)

    def _json(self, name: str) -> dict[str, Any]:
        return read_json(self.files.get(name), CheckpointError, allow_nan=True)

    def _index(self, weights: list[str] | None) -> dict[str, str]:
        """{key: file that holds it}."""
        if weights is None:
            index, weights = weight_files(self.files.names, self.name)
            if index is not None:
                return self._checked(index, self._json(index))
        where: dict[str, str] = {}
        for file in weights:
            for key in self._open(file):
                if key in where:
                    raise CheckpointError(
                        f"{self.name}: {where[key]} and {file} both hold {key}; name one file"
                    )
                where[key] = file
        return where

    def _checked(self, index: str, content: dict[str, Any]) -> dict[str, str]:
        where = content.get("weight_map")
        named = isinstance(where, dict) and all(isinstance(v, str) for v in where.values())
        if not named or not where:
            raise CheckpointError(f"{self.name}/{index} has no weight_map of tensors to files")
        missing = sorted(set(where.values()) - set(self.files.names))
        if missing:
            raise CheckpointError(
                f"{self.name}: {index} names {', '.join(missing)}, which is not there: {AGAIN}"
            )
        return where

    def _open(self, file: str) -> Mapping[str, Any]:
        """{key: handle} of a file. One file is open at a time: memory maps count as memory."""
        if self._reader is None or self._reader[0] != file:
            self._reader = None
            path = self.files.get(file)
            read = safetensors_file if path.suffix in SAFETENSORS else pickle_file
            self._reader = file, read(path)
        return self._reader[1]

    def handle(self, key: str) -> Handle:
        """A tensor that is not read yet: shape, dtype_name, read()."""
        if key not in self._where:
            raise CheckpointError(f"{self.name} has no tensor {key}, which tells the sizes")
        file = self._where[key]
        try:
            return self._open(file)[key]
        except KeyError:
            raise CheckpointError(
                f"{self.name}/{file} lacks {key}, which the index places there; the file is "
                "incomplete or altered"
            ) from None

    @property
    def weight_files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return sorted(set(self._where.values()))

    def file_of(self, key: str) -> str:
        """Name of the file that holds a tensor."""
        return self._where[key]

    @property
    def keys(self) -> list[str]:
        """Names of all tensors, file by file."""
        return sorted(self._where, key=lambda key: (self._where[key], key))

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def shape(self, key: str, rank: int | None = None) -> tuple[int, ...]:
        """Shape of a tensor. Raises CheckpointError if it has not `rank` axes."""
        found = tuple(self.handle(key).shape)
        if rank not in (None, len(found)):
            raise CheckpointError(f"{self.name}: {key} is of shape {found}; expected {rank} axes")
        return found

    def section(self, *names: str) -> dict[str, Any]:
        """The innermost of nested sections of the configuration, as far as they are there."""
        section = self.config
        for name in names:
            inner = section.get(name, section)
            if not isinstance(inner, dict):
                raise CheckpointError(f"{self.name}: {name} of its config.json is no object")
            section = inner
        return section

    def dtype(self, key: str) -> np.dtype:
        """Type of a tensor; raises CheckpointError unless it is a floating-point one."""
        name = self.handle(key).dtype_name
        if name not in FLOATS:
            raise weights.not_weights(self.name, key, name)
        return FLOATS[name]

    def read(self, key: str) -> np.ndarray:
        """A tensor."""
        return self.handle(key).read()

    def hashes(self, keys: list[str]) -> list[dict[str, str]]:
        """Name and SHA-256 of the files that hold some tensors."""
        names = sorted({self._where[key] for key in keys})
        return [{"name": name, "sha256": file_sha256(self.files.get(name))} for name in names]


class Handle:
    """A tensor that is read on demand."""

    def __init__(self, shape: tuple[int, ...], dtype_name: str, read: Callable[[], np.ndarray]):
        self.shape, self.dtype_name, self.read = tuple(shape), dtype_name, read


def safetensors_file(path: Path) -> dict[str, Handle]:
    """{key: handle} of a safetensors file. Raises CheckpointError if it is damaged."""
    with weights.reading(path):
        file = safe_open(path, framework="numpy")
        kinds = weights.kinds_of(file, path)

    def read(key: str) -> np.ndarray:
        if kinds[key][1] not in FLOATS:
            raise weights.not_weights(path, key, kinds[key][1])
        with weights.reading(path):
            return file.get_tensor(key)

    return {
        key: Handle(shape, dtype, functools.partial(read, key))
        for key, (shape, dtype) in kinds.items()
    }


def pickle_file(path: Path) -> dict[str, Handle]:
    """{key: handle} of a PyTorch file; tensors only, nothing in it is run."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path} needs PyTorch to be read: pip install 'htfa-jax[convert]'"
        ) from error

    def load(**options: Any) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, **options)

    try:
        try:
            content = load(mmap=True)
        except RuntimeError:  # files of before PyTorch 1.6 cannot be mapped
            content = load()
    except Exception as error:  # of a damaged file PyTorch raises nearly anything
        raise CheckpointError(f"{path} cannot be read as tensors: {_refused(error)}") from error
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16"}
    names[torch.bfloat16] = "BF16"

    def kind(tensor: Any) -> str:
        if tensor.layout != torch.strided:
            return str(tensor.layout)
        return names.get(tensor.dtype, str(tensor.dtype))

    def reader(tensor: Any) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if tensor.dtype == torch.bfloat16:
                return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return tensor.contiguous().numpy()

        return read

    return {
        key: Handle(tuple(t.shape), kind(t), reader(t))
        for key, t in state_dict(content, path).items()
        if isinstance(t, torch.Tensor)
    }


def _refused(error: Exception) -> str:
    """Why PyTorch read no tensors; not its advice, which is to run what the file says."""
    said = str(error)
    if "eights only load failed" in said or "weights_only" in said:
        found = re.search(r"GLOBAL:? `?([\w.]+)", said)
        return (
            f"it holds {found[1] if found else 'something else'} too, which is Python code, and "
            "nothing else in it is loaded. Name the file of the weights if this is another one, "
            "or save the weights alone: torch.save(model.state_dict(), ...) or save_pretrained"
        )
    return f"is it complete? {said.splitlines()[0] if said else type(error).__name__}"


def state_dict(content: Any, path: Path) -> Mapping[str, Any]:
    """The tensors of what training scripts save, inside the usual wrappings."""
    for wrapping in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content
