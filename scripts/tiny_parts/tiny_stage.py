"""How a tiny part is trained: AdamW on a loss, resumable from its own checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from htfa_jax.checkpoints.manager import Checkpoints
from htfa_jax.common.logs import MetricWriter
from htfa_jax.common.param_paths import Flat
from htfa_jax.common.signals import StopSignal
from htfa_jax.config import TrainConfig
from htfa_jax.data.pipeline import Loaded
from htfa_jax.training.loop import Loop
from htfa_jax.training.loss_guard import LossGuard, guarded_update, is_usable
from htfa_jax.training.state import progress

Loss = Callable[[Flat, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
SAVE_EVERY, LOG_EVERY, WARMUP = 250, 25, 100


def train(
    name: str,
    workdir: Path,
    loss: Loss,
    params: Flat,
    batches: Callable[[int], Iterator[Loaded]],
    *,
    num_steps: int,
    learning_rate: float,
    weight_decay: float,
    samples: int,
    key: str,
    seed: int = 0,
) -> Flat | None:
    """Trains, going on from what `workdir` holds.

    Args:
      name: of the part, in log lines.
      workdir: checkpoints and logs go here.
      loss: (params, batch, random key) -> (loss, metrics).
      params: to start from.
      batches: from a step number to the batches that follow it.
      num_steps: updates.
      learning_rate: peak of a cosine schedule with a warm-up.
      weight_decay: on everything of more than one axis.
      samples: of a batch, for the rate.
      key: what the training depends on; a workdir of another is refused.
      seed: of the random keys.

    Returns:
      The weights; None if a signal stopped the training.

    Raises:
      ConfigError: if the workdir holds a training of other settings.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(WARMUP, num_steps // 2), num_steps, 0.02 * learning_rate
    )

    def decays(params: Flat) -> dict[str, bool]:
        return {path: x.ndim > 1 and "embed" not in path for path, x in params.items()}

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=weight_decay, mask=decays),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: dict[str, Any], batch: Any):
        random = jax.random.fold_in(jax.random.key(seed), state["step"])
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            state["params"], batch, random
        )

        def update(params: Flat, opt_state: Any) -> tuple[Flat, Any]:
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        norm = optax.tree.norm(grads)
        usable = is_usable(state, value, norm)
        metrics |= {"loss": value, "grad_norm": norm, "finite": usable}
        return guarded_update(state, update, usable, TrainConfig()), metrics

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    state = {**progress(0, here), "params": params, "opt_state": optimizer.init(params)}
    with Checkpoints(workdir, keep=1) as checkpoints:
        state, _ = checkpoints.resume(state, key, "training")
        state = jax.device_put(state, jax.local_devices()[0])

        def save(state: dict[str, Any]) -> None:
            checkpoints.save(state, {"key": key})

        writer, stop = MetricWriter(workdir / "logs"), StopSignal()
        loop = Loop(
            name=name,
            step_fn=step,
            put=lambda batch: jax.device_put(batch, jax.local_devices()[0]),
            num_steps=num_steps,
            log_every=LOG_EVERY,
            writer=writer,
            samples_per_step=samples,
            due=lambda step: step % SAVE_EVERY == 0,
            after_step=lambda step, state: save(state),
            save=save,
            max_bad_records=0,
            guard=LossGuard(TrainConfig()),
            stop=stop,
        )
        with stop:
            state, stopped = loop.run(state, batches(int(state["step"])))
        writer.close()
    return None if stopped else {path: np.asarray(x) for path, x in state["params"].items()}
