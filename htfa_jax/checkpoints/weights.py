"""Weight folders: one component of a model (SigLIP, VQ, decoder) as config.json and safetensors.

Safetensors, because it holds arrays and nothing that runs, is read by memory mapping tensor by
tensor, and is what hubs exchange. Training state, which must be written asynchronously and in
shards, goes through Orbax instead (`checkpoint`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from htfa_jax.common.files import whole_folder, write_whole
from htfa_jax.common.json_files import read_json
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, get, override
from htfa_jax.config.io import preset_changes
from htfa_jax.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

# Parts that can be pretrained, and what a folder of one is called.
FAMILIES = {"siglip": "siglip", "vq": "vq", "decoder": "internlm2"}

WEIGHTS, CONFIG = "weights.safetensors", "config.json"

# What a folder of the PyTorch original's levels decides.
LEVEL_SIZES = (
    "level1.num_scales",
    "level2.num_heads",
    "level3.adapter_mlp_dim",
    "level3.adapter_norm",
)
# What it was trained with; the weights fit other choices too.
LEVEL_CHOICES = "pytorch_original"

AXES = 8  # of an array; those of weights have at most five

# Fields that folders of before they existed do not name, with what these folders hold.
ADDED: dict[str, dict[str, Any]] = {
    "siglip": {"hidden_act": "gelu_pytorch_tanh"},
    "internlm2": {"attention_bias": False},
}

# Fields of the components' configurations that no weight depends on.
NOT_SIZES = ("dropout",)


def save_component(folder: Path, family: str, sizes: Any, params: Mapping[str, Any]) -> None:
    """Writes a weight folder, whole or not at all.

    Args:
      folder: where; replaced if it exists.
      family: "siglip", "vq" or "internlm2".
      sizes: the component's configuration dataclass.
      params: `{path inside the component: array}`.

    Raises CheckpointError if it cannot be written.
    """
    arrays = {path: np.ascontiguousarray(value) for path, value in params.items()}
    with whole_folder(folder, CheckpointError) as partial:
        save_file(arrays, partial / WEIGHTS)
        write_json(partial / CONFIG, description(family, sizes))


def description(family: str, sizes: Any) -> dict[str, Any]:
    """What config.json of a weight folder says: the sizes, not how a run trains the component."""
    fields = {k: v for k, v in dataclasses.asdict(sizes).items() if k not in NOT_SIZES}
    return {"family": family, **json.loads(json.dumps(fields))}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON that people can read."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


class WeightWriter:
    """Writes a safetensors file piece by piece, so that it never is in memory as a whole.

    Args:
      path: of the file.
      kinds: `{parameter path: (shape, dtype)}` of all that will be written.
      facts: more that the file says, as text.
    """

    NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

    def __init__(
        self,
        path: Path,
        kinds: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        facts: Mapping[str, str] | None = None,
    ):
        header: dict[str, dict[str, Any]] = {}
        end = 0
        for name, (shape, dtype) in sorted(kinds.items()):
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": self.NAMES[dtype.name],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        encoded = json.dumps({"__metadata__": dict(facts or {}), **header}).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._begin = 8 + len(encoded)
        self._starts = {name: entry["data_offsets"][0] for name, entry in header.items()}
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._file.truncate(self._begin + end)

    def write(self, name: str, layer: int | None, array: np.ndarray) -> None:
        """A whole parameter, or one layer of a stacked one."""
        self._file.seek(self._begin + self._starts[name] + (layer or 0) * array.nbytes)
        self._file.write(np.ascontiguousarray(array).view(np.uint8).data)

    def close(self) -> None:
        """Makes the file complete."""
        self._file.close()


def read_description(folder: str | Path, family: str) -> dict[str, Any]:
    """config.json of a weight folder. Raises CheckpointError unless it is one of this family."""
    folder = Path(folder).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"no {name} in {folder}: expected a weight folder of a {family} "
                "(config.json and weights.safetensors, as `python -m weights_convert` writes)"
            )
    found = read_json(folder / CONFIG, CheckpointError)
    if found.get("family") != family:
        raise CheckpointError(
            f"{folder} is of another family: {found.get('family')!r} in the folder, "
            f"{family!r} expected"
        )
    return ADDED.get(family, {}) | found


def with_sizes(config: Config, base: Config, gone: Collection[str] = ()) -> Config:
    """The configuration with the sizes of the weight folders that it names.

    Fields that differ from `base`, as a flag makes them, stay as they are: `load_component` refuses
    them if they contradict the folder. The folders of components in `gone` are not read.
    """
    changes: dict[str, Any] = {}
    for component, family in FAMILIES.items():
        folder = getattr(config.pretrained, component)
        if folder is None or component in gone:
            continue
        found = read_description(folder, family)
        sizes, before = getattr(config, component), getattr(base, component)
        for f in dataclasses.fields(sizes):
            if f.name in found and getattr(sizes, f.name) == getattr(before, f.name):
                changes[f"{component}.{f.name}"] = found[f.name]
    if config.pretrained.htfa is not None and "htfa" not in gone:
        found = read_description(config.pretrained.htfa, "htfa")
        choices = preset_changes(LEVEL_CHOICES)
        told = {name: _told(found, name, config.pretrained.htfa) for name in LEVEL_SIZES} | choices
        taken = {k: v for k, v in told.items() if get(config, k) == get(base, k) != v}
        if chosen := [f"{name}={taken[name]}" for name in choices if name in taken]:
            log.info("%s was trained with %s", config.pretrained.htfa, ", ".join(chosen))
        changes |= taken
    try:
        return override(config, changes)
    except ConfigError as error:  # no flag says so, but a folder that the configuration names
        raise CheckpointError(
            f"config.json of a weight folder that `pretrained` names cannot be: {error}"
        ) from error


def _told(found: Mapping[str, Any], name: str, folder: str | Path | None) -> Any:
    """What a weight folder of levels says of a field. Raises CheckpointError if it does not."""
    field = name.rpartition(".")[2]
    if field not in found:
        raise CheckpointError(
            f"{Path(str(folder)).expanduser() / CONFIG} lacks {field}: convert the levels again"
        )
    return found[field]


def load_component(
    folder: str | Path,
    family: str,
    sizes: Any,
    shapes: Mapping[str, Any],
    *,
    unused: str = "",
    **facts: Any,
) -> Flat:
    """Reads a weight folder strictly.

    Args:
      folder: what `save_component` wrote.
      family: what it must hold.
      sizes: the run's configuration dataclass of this component, which must agree.
      shapes: `{path: anything with .shape}` that must be there, no more and no less.
      unused: regex of the paths that may be there besides, and are left out.
      **facts: more of the run's configuration that must agree, where the folder tells it.

    Raises:
      CheckpointError: with both sides of what differs.
    """
    folder = Path(folder).expanduser()
    found = read_description(folder, family)
    expected = description(family, sizes) | {k: v for k, v in facts.items() if k in found}
    differing = [
        f"{key}: {found.get(key)!r} in the folder, {value!r} in the configuration"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    if differing:
        raise CheckpointError(f"{folder} is of another {family}:\n  " + "\n  ".join(differing))
    arrays = read_weights(folder)
    arrays = {p: x for p, x in arrays.items() if p in shapes or not re.fullmatch(unused, p)}
    check_shapes(arrays, shapes, str(folder))
    return arrays


def load_levels(config: Config, shapes: Mapping[str, Any]) -> Flat:
    """Reads what `weights_convert htfa` wrote, as far as this run's model has it.

    The generation head and adapter stay fresh if they were made for other codes.

    Args:
      config: of the run.
      shapes: `{path: anything with .shape}` of all the model's parameters.

    Raises:
      CheckpointError: with both sides of what differs.
    """
    folder = Path(str(config.pretrained.htfa)).expanduser()
    found, arrays = read_description(folder, "htfa"), read_weights(folder)
    differing = [
        f"{name}: {told!r} in the folder, {value!r} in the configuration"
        for name in LEVEL_SIZES
        if (value := get(config, name)) != (told := _told(found, name, folder))
    ]
    if differing:
        raise CheckpointError(f"{folder} is of other levels:\n  " + "\n  ".join(differing))
    for component, size in (
        ("adapter_generate", "codebook_dim"),
        ("head_generate", "codebook_size"),
    ):
        if (told := _told(found, size, folder)) != getattr(config.vq, size):
            log.warning(
                "level3.%s starts fresh: %s has vq.%s=%s, this run %s",
                component,
                folder,
                size,
                told,
                getattr(config.vq, size),
            )
            arrays = {k: v for k, v in arrays.items() if not k.startswith(f"level3.{component}.")}
    kept = {path: value for path, value in arrays.items() if path in shapes}
    for path in sorted(set(arrays) - set(kept)):
        log.warning("%s of %s is not used: this run's model has no such component", path, folder)
    check_shapes(kept, {path: shapes[path] for path in kept}, str(folder))
    log.info("%d parameters of the levels from %s", len(kept), folder)
    return kept


def read_weights(folder: Path, name: str = WEIGHTS) -> Flat:
    """The arrays of a weight file. Raises CheckpointError if they are no weights."""
    arrays = {}
    with reading(folder / name), safe_open(folder / name, framework="numpy") as file:
        for path, (_, dtype) in kinds_of(file, folder / name).items():
            if dtype not in WeightWriter.NAMES.values():
                raise not_weights(folder / name, path, dtype)
            arrays[path] = file.get_tensor(path)
            if not is_finite(arrays[path]):
                raise CheckpointError(
                    f"{folder / name}: {path} holds values that are not finite; it is damaged or "
                    "its training failed"
                )
    return arrays


def not_weights(path: Path | str, tensor: str, dtype: str) -> CheckpointError:
    """The error of a tensor whose type no weights have."""
    return CheckpointError(
        f"{path}: {tensor} is of type {dtype}; only {', '.join(WeightWriter.NAMES.values())} are "
        "read as weights (those of quantised checkpoints are not)"
    )


def is_finite(array: np.ndarray) -> bool:
    """Whether all of an array's numbers are finite; takes no memory of its size."""
    flat, step = array.reshape(-1), 2**20
    return all(np.isfinite(flat[i : i + step]).all() for i in range(0, flat.size, step))


def read_facts(path: Path) -> dict[str, str]:
    """What a weight file says besides its arrays. Raises CheckpointError if it cannot be read."""
    with reading(path), safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def kinds_of(file: Any, path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{tensor: (shape, type)} of an open file. Raises CheckpointError for too many axes."""
    found = {}
    for name in file.keys():  # noqa: SIM118
        part = file.get_slice(name)
        shape = tuple(part.get_shape())
        if len(shape) > AXES:
            raise CheckpointError(
                f"{path}: {name[:200]} has {len(shape)} axes; weights have at most {AXES}"
            )
        found[name] = shape, part.get_dtype()
    return found


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """A block that reads a safetensors file: what is wrong with it is a CheckpointError."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        # The last ones come of types that NumPy does not know.
        raise CheckpointError(f"{path} cannot be read; is it complete? {error}") from error


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
