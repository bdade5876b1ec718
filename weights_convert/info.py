"""What is inside a checkpoint, and what of it can be converted."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable

from htfa_jax.errors import CheckpointError
from weights_convert import htfa, internlm2, siglip, vq
from weights_convert.convert import ConversionSpec
from weights_convert.source import Source

FAMILIES: dict[str, Callable[[Source], ConversionSpec]] = {
    "siglip": siglip.conversion_spec,
    "vq": vq.conversion_spec,
    "internlm2": internlm2.conversion_spec,
    "htfa": htfa.conversion_spec,
}


def describe_source(source: Source) -> str:
    """A table of the tensors by their first names, and each family's sizes or why it is not there.

    Reads names, shapes and types only.
    """
    groups: dict[str, collections.Counter[str]] = {}
    for key in source.keys:
        handle = source.handle(key)
        group = groups.setdefault(key.split(".")[0], collections.Counter())
        group["tensors"] += 1
        group["parameters"] += math.prod(handle.shape)
        group[handle.dtype_name] += 1
    lines = [source.name + (f" at {source.revision}" if source.revision else "")]
    if "model_type" in source.config:
        lines.append(f"config.json says {source.config['model_type']}")
    lines.append(f"{'':24}{'tensors':>10}{'parameters':>18}  types")
    for name, group in groups.items():
        tensors, parameters = group.pop("tensors"), group.pop("parameters")
        lines.append(f"{name:24}{tensors:>10,}{parameters:>18,}  {', '.join(group)}")
    for family, spec_of in FAMILIES.items():
        try:
            found = spec_of(source)
        except CheckpointError as error:
            lines.append(f"{family}: no. {error}")
            continue
        sizes = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(found.sizes).items())
        lines.append(f"{family}: yes, {found.variant} ({sizes})")
    return "\n".join(lines)
