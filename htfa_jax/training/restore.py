"""From a checkpoint to a training state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import optax

from htfa_jax.checkpoints.manager import SAVED, Checkpoints, load_frozen
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config
from htfa_jax.models.factory import Model
from htfa_jax.sharding.layout import Layout
from htfa_jax.training.state import TrainState, new_state, progress


def restore_state(
    config: Config,
    workdir: Path,
    model: Model,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    checkpoints: Checkpoints,
    meta: dict[str, Any],
) -> tuple[TrainState, Flat]:
    """State and frozen weights of a checkpoint, laid out for these devices.

    Args:
      config, workdir, model, optimizer, layout, checkpoints: of the run.
      meta: of the checkpoint.
    """
    frozen = layout.put_parameters(load_frozen(workdir, meta["frozen"]))
    trainable = {path: shape for path, shape in model.shapes.items() if path not in frozen}
    wanted = jax.eval_shape(lambda p: new_state(config.train, p, optimizer, layout), trainable)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        wanted,
        layout.state(wanted),
    )
    found = checkpoints.restore(
        meta["step"], **{name: like[name] for name in SAVED if name in like}
    )
    saved = {name: found[name] for name in SAVED if name in like}
    return progress(meta["step"], layout.replicated) | saved, frozen
