"""Fields of the configuration that name places on this machine.

The command line and a configuration that the user passes name places. The `config.json` of a run
does not: it comes with the run, and may be somebody else's.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from htfa_jax.config.config import Config
from htfa_jax.config.fields import get
from htfa_jax.config.io import override
from htfa_jax.config.sections import DataConfig

WEIGHTS = tuple(f"pretrained.{name}" for name in ("siglip", "vq", "decoder", "htfa", "run"))
SPLITS = ("data.train", "data.validation", "data.test")
# The embedded dataset: it is drawn, so that its name is no place.
EMBEDDED = DataConfig.train
OTHERS = {
    "data.sources": (),
    "data.image_root": None,
    "data.tokenizer": None,
    "data.cache_dir": DataConfig.cache_dir,
}


def with_last_names(config: Config) -> Config:
    """The configuration with names instead of places, to tell what a run was made from."""
    return override(config, OTHERS | {name: _last(config, name) for name in (*WEIGHTS, *SPLITS)})


def without_places(config: Config) -> Config:
    """What may be taken from a run: all but the places that it names.

    Of data only the embedded dataset stays. The last names of pretrained weights stay, because
    whether a component has them decides what is frozen; nothing reads them. A split whose source
    is left out is None, `data.train` is empty.
    """
    data = config.data
    splits = {name: get(config, name) for name in SPLITS}
    kept = {name: value if value == EMBEDDED else None for name, value in splits.items()}
    kept["data.train"] = EMBEDDED if data.train == EMBEDDED and not data.sources else ""
    return override(config, OTHERS | kept | {name: _last(config, name) for name in WEIGHTS})


def _last(config: Config, name: str) -> Any:
    value = get(config, name)
    return value and (PurePath(value).name or "unnamed")
