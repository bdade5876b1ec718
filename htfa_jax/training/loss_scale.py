"""Dynamic loss scaling: in float16 small gradients vanish unless the loss is made large.

Micikevicius et al., "Mixed Precision Training" (2018). The scale halves when a gradient
overflows, whose update is left out, and doubles after `PATIENCE` steps without. It is part of the
training state (`loss_scale`: the scale, and the steps since it changed), there in float16 only.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

FIRST, LEAST, MOST, PATIENCE = 2.0**15, 1.0, 2.0**24, 2000

LossScale = dict[str, jax.Array]


def first() -> LossScale:
    """The scale at step 0."""
    return {"scale": jnp.float32(FIRST), "steps": jnp.int32(0)}


def scale(state: dict[str, Any]) -> jax.Array | float:
    """What the loss of this state's step is multiplied by."""
    return state["loss_scale"]["scale"] if "loss_scale" in state else 1.0


def next_scale(
    state: dict[str, Any], metrics: dict[str, jax.Array]
) -> tuple[dict[str, LossScale], dict[str, jax.Array]]:
    """The part of the state that holds the new scale, and metrics that tell of it.

    `finite` stays false only where a smaller scale cannot help: the loss itself is not finite,
    or the scale is the least. Where a smaller one helps, `grad_norm` is NaN: there is none.
    """
    if "loss_scale" not in state:
        return {}, metrics
    old, steps = state["loss_scale"]["scale"], state["loss_scale"]["steps"]
    fits = metrics["finite"]
    grows = fits & (steps + 1 >= PATIENCE)
    new = jnp.where(fits, jnp.where(grows, old * 2, old), old / 2).clip(LEAST, MOST)
    can_shrink = ~fits & ~state["halted"] & jnp.isfinite(metrics["loss"]) & (old > LEAST)
    metrics = metrics | {
        "loss_scale": old,
        "grad_norm": jnp.where(can_shrink, jnp.nan, metrics["grad_norm"]),
        "finite": fits | can_shrink,
    }
    changed = {"scale": new, "steps": jnp.where(fits & ~grows, steps + 1, 0)}
    kept = jax.tree.map(lambda a, b: jnp.where(state["halted"], a, b), state["loss_scale"], changed)
    return {"loss_scale": kept}, metrics
