"""Weight folders: one part of a model (SigLIP, VQ, decoder) as config.json and safetensors.

Safetensors, because it holds arrays and nothing that runs, is read by memory mapping tensor by
tensor, and is what hubs exchange. Training state, which must be written asynchronously and in
shards, goes through Orbax instead (`checkpoint`).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from htfa_jax.errors import CheckpointError
from htfa_jax.paths import Flat

# Parts that can be pretrained, and what a folder of one is called.
FAMILIES = {"siglip": "siglip", "vq": "vq", "decoder": "internlm2"}

WEIGHTS, CONFIG = "weights.safetensors", "config.json"


def save_part(folder: Path, family: str, sizes: Any, params: Mapping[str, Any]) -> None:
    """Writes a weight folder, whole or not at all.

    Args:
      folder: where; replaced if it exists.
      family: "siglip", "vq" or "internlm2".
      sizes: the part's configuration dataclass.
      params: `{path inside the part: array}`.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arrays = {path: np.ascontiguousarray(value) for path, value in params.items()}
    save_file(arrays, partial / WEIGHTS)
    description = {"family": family, **dataclasses.asdict(sizes)}
    (partial / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def load_part(folder: str | Path, family: str, sizes: Any, shapes: Mapping[str, Any]) -> Flat:
    """Reads a weight folder strictly.

    Args:
      folder: what `save_part` wrote.
      family: what it must hold.
      sizes: the run's configuration dataclass of this part, which must agree.
      shapes: `{path: anything with .shape}` that must be there, no more and no less.

    Raises:
      CheckpointError: with both sides of what differs.
    """
    folder = Path(folder).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"no {name} in {folder}: expected a weight folder of a {family} "
                "(config.json and weights.safetensors)"
            )
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    expected = {"family": family, **json.loads(json.dumps(dataclasses.asdict(sizes)))}
    differing = [
        f"{key}: {found.get(key)!r} in the folder, {value!r} in the configuration"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    if differing:
        raise CheckpointError(f"{folder} is of another {family}:\n  " + "\n  ".join(differing))
    arrays = read_weights(folder)
    check_shapes(arrays, shapes, str(folder))
    return arrays


def read_weights(folder: Path) -> Flat:
    """The arrays of a weight folder. Raises CheckpointError if they cannot be read."""
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            return {path: file.get_tensor(path) for path in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def check_shapes(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError unless both have the same paths and shapes."""
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    wrong = [
        f"{path}: {found[path].shape} in {where}, {expected[path].shape} in the model"
        for path in sorted(set(found) & set(expected))
        if tuple(found[path].shape) != tuple(expected[path].shape)
    ]
    if missing or unknown or wrong:
        lines = [f"missing: {p}{_nearest(p, unknown)}" for p in missing]
        lines += [f"not in the model: {p}" for p in unknown] + wrong
        shown = lines[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])
        raise CheckpointError(
            f"{where} does not hold the weights of this model:\n  " + "\n  ".join(shown)
        )


def _nearest(path: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(path, candidates, n=1)
    return f" (nearest there: {close[0]})" if close else ""


def digest(params: Mapping[str, Any]) -> str:
    """SHA-256 over paths, types, shapes and values."""
    sha = hashlib.sha256()
    for path in sorted(params):
        array = np.asarray(params[path])
        sha.update(f"{path} {array.dtype} {array.shape} ".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
