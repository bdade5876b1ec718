"""Checkpoints of a run: Orbax for the training state, weight folders for what is frozen.

A run's workdir holds

    config.json            the resolved configuration
    tokenizer/             what its text went through
    frozen/PART-HASH/      frozen weights, once
    checkpoints/STEP/      step, trainable parameters, optimizer state; names of the frozen parts
    logs/                  metrics.jsonl, train.log, parameters.txt, TensorBoard events, panels
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from htfa_jax import parts, paths
from htfa_jax.config import Config
from htfa_jax.errors import CheckpointError
from htfa_jax.paths import Flat
from htfa_jax.processes import is_first
from htfa_jax.runs import CHECKPOINTS
from htfa_jax.sharding import to_host

log = logging.getLogger(__name__)

FROZEN = "frozen"
# What a training state holds besides its step; `loss_scale` is there in float16 only.
STATE = ("params", "opt_state", "loss_scale")


def new_workdir(name: str) -> Path:
    """runs/NAME_TIME, not there yet."""
    return Path("runs") / f"{name}_{time.strftime('%Y%m%d_%H%M%S')}"


def make_workdir(path: Path) -> Path:
    """Makes the folder if it is not there. Raises CheckpointError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--workdir {path} cannot be a folder: {error}") from error
    return path


class Checkpoints:
    """The checkpoints of one workdir. Writing is asynchronous; `close` waits for it.

    Args:
      workdir: of the run.
      keep: latest checkpoints kept, besides the best.
      metric: name of the validation metric that chooses the best; None keeps no best.
      mode: which end of it is best.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int,
        metric: str | None = None,
        mode: Literal["min", "max"] = "min",
    ):
        self.metric, self.folder = metric, (workdir / CHECKPOINTS).absolute()
        policies: list[checkpoint_managers.PreservationPolicy]
        policies, best = [checkpoint_managers.LatestN(keep)], {}
        if metric is not None:

            def value(metrics: Mapping[str, float]) -> float:
                return metrics[metric]

            best = {"best_fn": value, "best_mode": mode}
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=value,
                    reverse=mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                **best,
            ),
            item_handlers={
                **{name: ocp.StandardCheckpointHandler() for name in STATE},
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def save(
        self,
        state: dict[str, Any],
        meta: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing `state` under its step; without this run's metric it is never best."""
        step = int(state["step"])
        if metrics is not None:
            metrics = {self.metric: metrics[self.metric]} if self.metric in metrics else None
        items = ocp.args.Composite(
            **{name: ocp.args.StandardSave(state[name]) for name in STATE if name in state},
            meta=ocp.args.JsonSave({**meta, "step": step}),
        )
        if step not in self._manager.all_steps() and not self._manager.save(
            step, args=items, metrics=metrics, force=True
        ):
            raise CheckpointError(f"step {step} was not saved to {self.folder}")

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the best checkpoint, or the newest if none was evaluated."""
        return self._manager.best_step() or self._manager.latest_step()

    def restore(self, step: int, **like: Any) -> dict[str, Any]:
        """The named items of a step, and its meta.

        Args:
          step: of a complete checkpoint.
          **like: some of `STATE`; shapes, types and shardings.
        """
        steps = self._manager.all_steps()
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"no checkpoint {step} in {self.folder}; there are: {there}")
        if "params" in like:
            saved = self._manager.item_metadata(step)["params"].tree
            parts.check_shapes(saved, like["params"], f"checkpoint {step} in {self.folder}")

        def target(leaf: Any) -> jax.ShapeDtypeStruct:
            # Named, or Orbax would look for the device that the run was saved on.
            sharding = getattr(leaf, "sharding", None) or here
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        items = {
            name: ocp.args.StandardRestore(jax.tree.map(target, tree))
            for name, tree in like.items()
        }
        try:
            return dict(
                self._manager.restore(
                    step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore())
                )
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} does not fit this model; was the "
                f"configuration changed since? {str(error)[:600]}"
            ) from error

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_checkpoints(workdir: Path, config: Config) -> Checkpoints:
    """The checkpoints of a run of the main job."""
    train = config.train
    return Checkpoints(
        workdir, keep=train.keep_checkpoints, metric=train.best_metric, mode=train.best_mode
    )


def save_frozen(workdir: Path, config: Config, frozen: Flat) -> dict[str, str]:
    """Writes frozen weights that are not there yet; returns their folders' names by part."""
    names = {}
    for part in dict.fromkeys(path.split(".")[0] for path in frozen):
        inside, _ = paths.split(frozen, rf"{part}\..*")
        arrays = {p.removeprefix(part + "."): to_host(v) for p, v in inside.items()}
        names[part] = f"{part}-{parts.digest(arrays)[:12]}"
        folder = workdir / FROZEN / names[part]
        if is_first() and not (folder / parts.WEIGHTS).is_file():
            sizes = getattr(config, part)
            parts.save_part(folder, parts.FAMILIES.get(part, part), sizes, arrays)
    return names


def load_frozen(workdir: Path, names: Mapping[str, str]) -> Flat:
    """The frozen weights of a run, checked against the hashes in their names."""
    frozen: Flat = {}
    for part, name in names.items():
        arrays = parts.read_weights(workdir / FROZEN / name)
        if f"{part}-{parts.digest(arrays)[:12]}" != name:
            raise CheckpointError(f"{workdir / FROZEN / name} was altered: its hash differs")
        frozen |= {f"{part}.{path}": value for path, value in arrays.items()}
    return frozen
