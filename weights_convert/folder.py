"""From a checkpoint to a weight folder: planned, streamed, described, whole or not at all."""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from htfa_jax.checkpoints.weights import (
    CONFIG,
    WEIGHTS,
    WeightWriter,
    description,
    write_json,
)
from htfa_jax.common.files import whole_folder
from htfa_jax.common.logs import progress
from htfa_jax.errors import CheckpointError
from weights_convert.convert import Checkpoint, ConversionSpec, Step, arrays, plan

log = logging.getLogger("htfa_jax.weights_convert")

# Raised when a table changes what it makes of a checkpoint.
RULES_VERSION = 2
CONVERSION = "conversion.json"


def write_folder(
    source: Checkpoint,
    spec: ConversionSpec,
    out: Path,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Converts a checkpoint to a weight folder.

    The folder holds `weights.safetensors` (in the checkpoint's own types), `config.json` (every
    size that the model needs) and `conversion.json` (where it came from).

    Args:
      source: the checkpoint.
      spec: what it is.
      out: the folder; replaced if it exists.
      beside: writes more into the folder before it takes its place.

    Raises:
      CheckpointError: see `plan` and `arrays`; nothing is left at `out` then.
    """
    log.info("%s: %s", source.name, spec.variant)
    steps = plan(spec.shapes, source, spec.rules, spec.ignored, spec.prefix)
    kinds = kinds_of(steps, spec, source)
    with whole_folder(out, CheckpointError) as partial:
        writer = WeightWriter(partial / WEIGHTS, kinds)
        with progress(len(steps), spec.family, unit="tensor") as bar:
            for step, array in arrays(steps, source):
                # Resizing works in float32; everything is written in the checkpoint's type.
                array = array.astype(kinds[step.path][1], copy=False)
                writer.write(step.path, step.layer, array)
                bar.update(1)
        writer.close()
        sizes = description(spec.family, spec.sizes)
        write_json(partial / CONFIG, {**sizes, **spec.notes})
        used = sorted({step.key for step in steps})
        write_json(partial / CONVERSION, describe(source, spec, used))
        if beside is not None:
            beside(partial)


def kinds_of(
    steps: list[Step], spec: ConversionSpec, source: Checkpoint
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{path: (shape, type)} of what will be written; layers of one stack must share a type."""
    kinds: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for step in sorted(steps, key=lambda step: step.path):
        kind = tuple(spec.shapes[step.path].shape), source.dtype(step.key)
        if kinds.setdefault(step.path, kind) != kind:
            raise CheckpointError(
                f"{source.name}: {step.key} is {kind[1]}, other layers of {step.path} are "
                f"{kinds[step.path][1]}"
            )
    return kinds


def describe(source: Checkpoint, spec: ConversionSpec, used: list[str]) -> dict[str, object]:
    """What conversion.json says."""
    ignored: dict[str, int] = {}
    for key in set(source.keys) - set(used):
        reason = next(why for p, why in spec.ignored.items() if re.fullmatch(p, key))
        ignored[reason] = ignored.get(reason, 0) + 1
    return {
        "source": source.name,
        "revision": source.revision,
        "variant": spec.variant,
        "files": source.hashes(used),
        "rules_version": RULES_VERSION,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tensors": len(used),
        "ignored": ignored,
    }
