"""Runs a training step again whose loss or gradient was not finite, and looks for its cause."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from htfa_jax.checkpoints.manager import open_checkpoints
from htfa_jax.checkpoints.runs import run_config
from htfa_jax.common.cli import use_compilation_cache
from htfa_jax.data.batch import Batch
from htfa_jax.errors import ConfigError
from htfa_jax.models.factory import build_model
from htfa_jax.sharding.layout import Layout
from htfa_jax.training.loss_guard import load_dump
from htfa_jax.training.optim import learning_rate, make_optimizer
from htfa_jax.training.restore import restore_state
from htfa_jax.training.state import progress
from htfa_jax.training.step import compile_train_step, put_update

Metrics = dict[str, float]


def reproduce(folder: Path) -> tuple[Metrics, dict[str, Metrics]]:
    """Metrics of a dumped batch, and of each of its records alone.

    Args:
      folder: RUN/nonfinite/step_STEP, as `train` writes it.

    Returns:
      What the step gives again; by record id, what it gives if all samples are that record
      (empty if the step is finite this time, or if there are several processes).

    Raises:
      DataError: there is no such dump.
      ConfigError: another number of processes.
      CheckpointError: the run no longer has the checkpoint that the step started from.
    """
    batch, facts = load_dump(folder)
    if facts["processes"] != jax.process_count():
        raise ConfigError(
            f"{folder} was written by {facts['processes']} processes; these are "
            f"{jax.process_count()}"
        )
    workdir = folder.absolute().parent.parent
    config = run_config(workdir)
    use_compilation_cache()
    layout, model = Layout(config), build_model(config)
    schedule = learning_rate(config.optim, facts["num_steps"])
    optimizer = make_optimizer(config.optim, schedule)
    with open_checkpoints(workdir, config.train, read_only=True) as checkpoints:
        meta = checkpoints.restore(facts["step"] - 1)["meta"]
        state, frozen = restore_state(config, workdir, model, optimizer, layout, checkpoints, meta)
    step_fn = compile_train_step(config, model, optimizer, schedule, layout, state, frozen)

    def run(batch: Batch) -> Metrics:
        # A copy: the step takes the memory of its state, and every record is tried on the same one.
        fresh = jax.tree.map(jnp.copy, state) | progress(facts["step"] - 1, layout.replicated)
        _, metrics = step_fn(fresh, frozen, put_update(config.train, layout, batch))
        return {name: float(value) for name, value in metrics.items()}

    again, alone = run(batch), {}
    if not again["finite"] and jax.process_count() == 1:
        for row, name in enumerate(facts["ids"]):
            rows = np.full(len(facts["ids"]), row)
            alone[name] = run(jax.tree.map(lambda x, rows=rows: x[rows], batch))
    return again, alone


def metrics_text(metrics: Metrics) -> str:
    """The metrics that tell of the loss, as text."""
    shown = {k: v for k, v in metrics.items() if k.endswith("loss") or k == "grad_norm"}
    return " ".join(f"{k} {v:.6g}{'' if math.isfinite(v) else ' (!)'}" for k, v in shown.items())
