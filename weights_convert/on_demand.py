"""Pretrained weights that a configuration names, brought into the form that a run reads.

`config.pretrained.siglip`, `.vq` and `.decoder` may name a weight folder, or what `weights_convert`
reads: a PyTorch checkpoint, a hub id, or "tiny" for the small components that this package
brings along. Those are converted once, into the cache.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import htfa_jax
from htfa_jax.checkpoints import weights
from htfa_jax.common.files import made_once
from htfa_jax.common.hashing import file_sha256, short_hash
from htfa_jax.config import Config, override
from htfa_jax.errors import CheckpointError
from weights_convert.folder import RULES_VERSION, write_folder
from weights_convert.source import Source

TINY = "tiny"

log = logging.getLogger("htfa_jax.weights_convert")


def with_weights(config: Config, base: Config, *, may_be_gone: bool = False) -> Config:
    """The configuration with weight folders for all components that it names, and with their sizes.

    Args:
      config: names components in `pretrained`.
      base: what it was before the user's flags; see `weights.with_sizes`.
      may_be_gone: leave a name as it is if nothing can be read there.

    Raises:
      CheckpointError: a name that is nothing, or a checkpoint of something else.
    """
    changes: dict[str, Any] = {}
    gone = []
    for component, family in weights.FAMILIES.items():
        name = getattr(config.pretrained, component)
        if name is None or (Path(name).expanduser() / weights.WEIGHTS).is_file():
            continue
        try:
            changes[f"pretrained.{component}"] = str(converted(family, name, config))
        except CheckpointError as error:
            if not may_be_gone:
                raise
            log.info("pretrained.%s=%s is not there, and not needed: %s", component, name, error)
            gone.append(component)
    levels = config.pretrained.htfa
    if may_be_gone and levels is not None and not (Path(levels).expanduser()).is_dir():
        gone.append("htfa")
    return weights.with_sizes(override(config, changes), base, gone)


def converted(family: str, name: str, config: Config) -> Path:
    """The weight folder in the cache that a checkpoint becomes; made on first use.

    Args:
      family: "siglip", "vq" or "internlm2".
      name: of the checkpoint.
      config: tells the size of the images, and where the cache is.

    Of several processes one converts, the others wait. Raises CheckpointError for a checkpoint of
    something else, and if the cache cannot be written.
    """
    # Only here: these load JAX, which `--help` of the commands does without.
    from weights_convert import internlm2, siglip, vq
    from weights_convert.tokenizer import tokenizer_of

    source = Source(str(tiny(family)) if name == TINY else name)
    described = [RULES_VERSION, family, identity(source, name)]
    if family == "siglip":
        described.append(config.image_size)
    key = short_hash(described)
    cache = Path(config.data.cache_dir).expanduser() / "converted"
    folder = cache / f"{family}-{key}"

    def convert() -> None:
        if family == "siglip":
            spec = siglip.conversion_spec(source, config.image_size)
        else:
            spec = {"vq": vq, "internlm2": internlm2}[family].conversion_spec(source)
        write_folder(source, spec, folder, beside=tokenizer_of(source, family))

    try:
        made_once(folder, f"the weights of {source.name}", convert, holds=weights.WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written (data.cache_dir): {error}") from error
    return folder


def tiny(family: str) -> Path:
    """The checkpoint of a small component that this package brings along."""
    return Path(htfa_jax.__file__).parent / TINY / family


def identity(source: Source, name: str) -> list[Any]:
    """What tells a checkpoint from another of the same name, without reading all of a large one."""
    if source.revision is not None:
        return [source.name, source.revision]
    # Not `get`: what only stands for a file is no error where nobody reads it.
    folder = Path(source.name).expanduser()
    folder = folder.parent if source.is_file else folder
    found = [folder / file for file in source.files.names]
    if name == TINY:  # the package may be installed anew, in another place
        return [name, [[path.name, file_sha256(path)] for path in found]]
    return [
        source.name,
        [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in found],
    ]
