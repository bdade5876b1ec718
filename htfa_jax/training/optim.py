"""Optimizer, learning-rate schedule, and the tables of what applies to which parameter."""

import re
from collections.abc import Callable

import jax
import optax

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, OptimConfig
from htfa_jax.training.adam_8bit import scale_by_adam_8bit


def frozen_pattern(config: Config) -> str:
    """Regex of the paths that no optimizer touches."""
    freeze = config.freeze
    # The tokenizer never moves: what trains in its place is `vq_encoder`.
    patterns = [r"vq\..*"]
    patterns += [
        rf"{component}\..*" for component in ("siglip", "decoder") if config.is_frozen(component)
    ]
    patterns += [r"level1\..*"] if freeze.level1 else []
    patterns += [r"level2\..*"] if freeze.level2 else []
    patterns += [r"level3\..*"] if freeze.adapters else []
    return "|".join(patterns)


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then the schedule down to `min_ratio` of it."""
    peak, floor = config.learning_rate, config.learning_rate * config.min_ratio
    warmup = config.warmup_steps or round(config.warmup_ratio * num_steps)
    warmup = min(warmup, max(num_steps - 1, 0))
    rest = max(num_steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.min_ratio)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, floor, rest)
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        length = max(rest // config.num_cycles, 1)
        cycle = optax.cosine_decay_schedule(peak, length, alpha=config.min_ratio)
        after = optax.join_schedules(
            [cycle] * config.num_cycles, [length * i for i in range(1, config.num_cycles)]
        )
    if not warmup:
        return after
    # Step 0 already moves: the first of n warm-up steps has 1 / n of the peak.
    before = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([before, after], [warmup])


def scale_by_factors(table: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Multiplies each parameter's update by the factor of the first regex that matches it."""

    def update(updates: Flat, state, params=None):
        del params
        factors = {path: param_paths.first_match(table, path, 1.0) for path in updates}
        return {path: u * factors[path] for path, u in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: OptimConfig, schedule: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """Clipping, the optimizer, decoupled weight decay, factors, learning rate; in this order.

    It works on flat dictionaries `{path: array}`.
    """
    if config.name == "adamw":
        direction = optax.scale_by_adam(config.b1, config.b2, config.eps)
    elif config.name == "adamw_8bit":
        direction = scale_by_adam_8bit(config.b1, config.b2, config.eps)
    elif config.name == "lion":
        direction = optax.scale_by_lion(config.b1, config.b2)
    else:
        direction = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))

    def decays(params: Flat) -> dict[str, bool]:
        return {path: not re.fullmatch(config.no_decay, path) for path in params}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        scale_by_factors(config.learning_rate_factors),
        optax.scale_by_learning_rate(schedule),
    )


def updates_applied(opt_state: optax.OptState) -> jax.Array:
    """How many updates an optimizer of `make_optimizer` has applied: what its schedule goes by."""
    return opt_state[-1].count
