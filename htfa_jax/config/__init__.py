"""The configuration of a run: sections and their fields, and reading them from files and flags."""

import importlib
from typing import TYPE_CHECKING, Any

from htfa_jax.config.config import Config
from htfa_jax.config.fields import get, leaves
from htfa_jax.config.sections import (
    AugmentConfig,
    DataConfig,
    DecoderConfig,
    DType,
    EvalConfig,
    FreezeConfig,
    Fusion,
    HeldObjectsConfig,
    Level1Config,
    Level2Config,
    Level3Config,
    LossConfig,
    OptimConfig,
    PretrainedConfig,
    ShardingConfig,
    SigLIPConfig,
    TrainConfig,
    VQConfig,
    VQTrainConfig,
)

if TYPE_CHECKING:
    from htfa_jax.config.io import load_config, override

__all__ = [
    "AugmentConfig",
    "Config",
    "DType",
    "DataConfig",
    "DecoderConfig",
    "EvalConfig",
    "FreezeConfig",
    "Fusion",
    "HeldObjectsConfig",
    "Level1Config",
    "Level2Config",
    "Level3Config",
    "LossConfig",
    "OptimConfig",
    "PretrainedConfig",
    "ShardingConfig",
    "SigLIPConfig",
    "TrainConfig",
    "VQConfig",
    "VQTrainConfig",
    "get",
    "leaves",
    "load_config",
    "override",
]


def __getattr__(name: str) -> Any:
    # What reads files and flags loads tyro, which workers that draw scenes do without.
    if name in ("load_config", "override"):
        return getattr(importlib.import_module("htfa_jax.config.io"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
