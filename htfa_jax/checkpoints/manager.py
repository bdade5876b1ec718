"""Checkpoints of a run: Orbax for the training state, weight folders for what is frozen.

A run's workdir holds

    config.json            the resolved configuration
    tokenizer/             what its text went through
    frozen/COMPONENT-HASH/ frozen weights, once
    pretrained.json        hashes of the weights and the tokenizer that it was made from
    checkpoints/STEP/      step, trainable parameters, optimizer state; names of the frozen weights;
                           hashes.json, the hashes of these files
    damaged/STEP-TIME/     checkpoints whose files no longer have these hashes
    lock.json              which process trains here
    logs/                  metrics.jsonl, train.log, parameters.txt, TensorBoard events, panels
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from htfa_jax.checkpoints import integrity, weights
from htfa_jax.checkpoints.meta import read_meta
from htfa_jax.checkpoints.orbax_errors import explained, no_pages
from htfa_jax.checkpoints.runs import CHECKPOINTS
from htfa_jax.common import param_paths
from htfa_jax.common.files import drop_partials, write_whole
from htfa_jax.common.names import inside
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, TrainConfig
from htfa_jax.config.renamed import METRICS, with_current_names
from htfa_jax.errors import CheckpointError, ConfigError, Damaged, HTFAError, TrainingError
from htfa_jax.sharding.layout import to_host
from htfa_jax.sharding.processes import first_goes_ahead, is_first

FROZEN = "frozen"
# What is saved of a training state besides its step; `loss_scale` is there in float16 only.
SAVED = ("params", "opt_state", "loss_scale")


class _Hashed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint that is hashed before it takes its name, in the thread that writes it."""

    async def finalize(self) -> None:
        if self.get_final().name.isdigit():  # a checkpoint, not one of its items before it
            await asyncio.to_thread(integrity.write_hashes, Path(self.get()))
        await super().finalize()


# Where a checkpoint goes that is kept no longer, before its files are deleted. A process that is
# killed while it deletes them leaves half a checkpoint, which would look damaged beside the others.
DELETED = ".deleted"


class Checkpoints:
    """The checkpoints of one workdir. Writing is asynchronous; `close` waits for it.

    Args:
      workdir: of the run.
      keep: latest checkpoints kept, besides the best.
      metric: name of the validation metric that chooses the best; None keeps no best. One that is
        not finite is worse than any number.
      mode: which end of it is best.
      read_only: for all but the process that trains there, whose unfinished checkpoints must
        stay. Without it damaged checkpoints are set aside.
      check: called before anything is written; raises if the workdir is another run's.

    Raises:
      CheckpointError: there are checkpoints, and none is sound.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int,
        metric: str | None = None,
        mode: Literal["min", "max"] = "min",
        read_only: bool = False,
        check: Callable[[], None] = lambda: None,
    ):
        self.metric, self.folder = metric, (workdir / CHECKPOINTS).absolute()
        self._check_held = check
        self._sound: set[int] = set()
        self._read_only = read_only
        self._drop_deleted()
        if not read_only:
            with first_goes_ahead("checkpoints"):
                if is_first():
                    integrity.set_damaged_aside(workdir)
            self._sound.update(integrity.steps(workdir)[-1:])
        elif wrong := integrity.misnamed(workdir):
            raise CheckpointError(
                f"{self.folder} holds {', '.join(wrong)}, which is not how a step is written: "
                "rename it (8, not 0008) or move it away"
            )
        policies: list[checkpoint_managers.PreservationPolicy]
        policies, best = [checkpoint_managers.LatestN(keep)], {}
        if metric is not None:

            def value(metrics: Mapping[str, float]) -> float:
                # NaN compares with nothing: sorting would leave it anywhere, at the best end too.
                found = with_current_names(METRICS, metrics)[metric]
                worst = math.inf if mode == "min" else -math.inf
                return found if math.isfinite(found) else worst

            best = {"best_fn": value, "best_mode": mode}
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=value,
                    reverse=mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        with self._failing("cannot be opened", CheckpointError):
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                    todelete_subdir=None if read_only else DELETED,
                    temporary_path_class=_Hashed,
                    **(best | ({"save_interval_steps": 0, "create": False} if read_only else {})),
                ),
                item_handlers={
                    **{name: ocp.StandardCheckpointHandler() for name in SAVED},
                    "meta": ocp.JsonCheckpointHandler(),
                },
            )

    def _drop_deleted(self) -> None:
        """Deletes what Orbax moved away to be deleted; never more than one save leaves there."""
        if not self._read_only and is_first():
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    @contextlib.contextmanager
    def _failing(self, what: str, kind: type[HTFAError]) -> Iterator[None]:
        """Turns what Orbax raises, also of a save that was begun before, into one sentence."""
        try:
            yield
        except HTFAError:
            raise
        except Exception as error:  # of TensorStore, of files, of Orbax itself
            self._check_held()  # or the disk is blamed for what another run did
            there = ", ".join(map(str, integrity.steps(self.folder.parent))) or "none"
            raise kind(
                f"{self.folder} {what}: {str(error)[:600]}. Complete checkpoints there: {there}"
            ) from error

    def save(
        self,
        state: dict[str, Any],
        meta: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing `state` under its step; without this run's metric it is never best.

        Raises TrainingError if it, or what was begun before, cannot be written, or if the workdir
        is another run's.
        """
        self._check_held()
        step = int(state["step"])
        if metrics is not None:
            found = {name: value for name, value in metrics.items() if name == self.metric}
            metrics = found or None
        items = ocp.args.Composite(
            **{name: ocp.args.StandardSave(state[name]) for name in SAVED if name in state},
            meta=ocp.args.JsonSave({**meta, "step": step}),
        )
        if step in self._manager.all_steps():
            return
        self._drop_deleted()
        with self._failing("cannot be written; is the disk full?", TrainingError):
            if not self._manager.save(step, args=items, metrics=metrics, force=True):
                raise CheckpointError(f"step {step} was not saved to {self.folder}")

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the best checkpoint, or the newest if none has a metric that is finite."""
        best = self._manager.best_step()
        if best is not None and self.metric is not None:
            metrics = with_current_names(METRICS, self._manager.metrics(best) or {})
            if not math.isfinite(metrics.get(self.metric, math.nan)):
                best = None
        return self._manager.latest_step() if best is None else best

    def restore(self, step: int, **like: Any) -> dict[str, Any]:
        """The named items of a step, and its meta.

        Args:
          step: of a complete checkpoint.
          **like: some of `SAVED`; shapes, types and shardings.

        Raises:
          Damaged: its files are not what was written.
          CheckpointError: no such checkpoint, or one of another model.
        """
        steps = self._manager.all_steps()
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"no checkpoint {step} in {self.folder}; there are: {there}")
        self._check(step)

        def target(leaf: Any) -> jax.ShapeDtypeStruct:
            # Named, or Orbax would look for the device that the run was saved on.
            sharding = getattr(leaf, "sharding", None) or here
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        items = {
            name: ocp.args.StandardRestore(jax.tree.map(target, tree))
            for name, tree in like.items()
        }
        folder = self.folder / str(step)
        try:
            meta = read_meta(folder)
        except CheckpointError as error:
            if (folder / integrity.HASHES).exists():
                raise
            raise Damaged(str(error), str(error)) from error
        if not items:
            return {"meta": meta}
        with no_pages():
            try:
                if "params" in like:
                    saved = self._manager.item_metadata(step)["params"].tree
                    where = f"checkpoint {step} in {self.folder}"
                    weights.check_shapes(saved, like["params"], where)
                found = self._manager.restore(step, args=ocp.args.Composite(**items))
                return {**found, "meta": meta}
            except HTFAError:
                raise
            except Exception as error:  # TensorStore has no class of its own
                problem = explained(folder, error)
                if problem is error:
                    raise
        raise problem  # not from what Orbax raised, which holds on to what `no_pages` drops

    def restore_best(self, newest: int, **like: Any) -> tuple[int, dict[str, Any]]:
        """Step and items of the best checkpoint; damaged ones are set aside for the next best.

        Args:
          newest: step that the caller has in memory; nothing is read if it is the best.
          **like: as in `restore`.
        """
        while (best := self.best_step() or newest) != newest:
            try:
                return best, self.restore(best, **like)
            except Damaged as error:
                self.set_aside(best, error)
        return newest, {}

    def set_aside(self, step: int, damaged: Damaged) -> None:
        """Moves a checkpoint away from the others. Raises `damaged` if there are no others."""
        self._check_held()
        with self._failing("cannot be written", CheckpointError):
            self._manager.wait_until_finished()
            if self._manager.all_steps() == [step]:
                raise damaged
            with first_goes_ahead(f"set aside {step}"):
                if is_first():
                    integrity.set_aside(self.folder.parent, str(step), damaged.reason)
            self._manager.reload()

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of an evaluation to a checkpoint that was saved without."""
        value = metrics.get(self.metric) if self.metric else None
        if value is None or step not in self._manager.all_steps():
            return
        self._check_held()
        folder = self.folder / str(step)
        with self._failing("cannot be written; is the disk full?", TrainingError):
            (folder / integrity.LATE).parent.mkdir(exist_ok=True)
            write_whole(folder / integrity.LATE, json.dumps({self.metric: value}), durable=True)
            integrity.add_hash(folder, integrity.LATE)
            self._manager.reload()

    def resume(self, state: dict[str, Any], key: str, what: str) -> tuple[dict[str, Any], Any]:
        """The state of the newest checkpoint and its meta; the state given and {} without one.

        Args:
          state: step, params and opt_state to start from.
          key: names what the training depends on, as the meta of its checkpoints does.
          what: is trained, for the message.

        Raises:
          ConfigError: the workdir holds a training of another key.
        """
        latest = self.latest_step()
        if latest is None:
            return state, {}
        meta = self.restore(latest)["meta"]
        if meta.get("key") != key:
            raise ConfigError(
                f"{self.folder.parent} holds a {what} of other settings or data: use another folder"
            )
        like = {name: state[name] for name in ("params", "opt_state")}
        found = self.restore(latest, **like)
        return state | {"step": jnp.int32(latest), **{name: found[name] for name in like}}, meta

    def _check(self, step: int) -> None:
        """Raises Damaged if a checkpoint's files are not what was written."""
        if step in self._sound:
            return
        # Every process looks for itself: one that raised alone would leave the others waiting.
        problem = integrity.damage(self.folder / str(step))
        if problem is not None:
            others = [str(s) for s in self._manager.all_steps() if s != step]
            raise Damaged(
                f"checkpoint {step} in {self.folder} is damaged: {problem}. Other checkpoints of "
                f"this run: {', '.join(others) or 'none'}",
                problem,
            )
        self._sound.add(step)

    def close(self) -> None:
        """Waits until everything is written. Raises TrainingError if that failed."""
        with self._failing("cannot be written; is the disk full?", TrainingError):
            self._manager.close()
        self._drop_deleted()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_checkpoints(
    workdir: Path,
    train: TrainConfig,
    read_only: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Checkpoints:
    """The checkpoints of a run of the main job; arguments as of `Checkpoints`."""
    return Checkpoints(
        workdir,
        keep=train.keep_checkpoints,
        metric=train.best_metric,
        mode=train.best_mode,
        read_only=read_only,
        check=check,
    )


def save_frozen(workdir: Path, config: Config, frozen: Flat) -> dict[str, str]:
    """Writes frozen weights that are not there yet; returns their folders' names by component.

    For the process that trains in the workdir: what one that was killed left half written goes.
    """
    names = {}
    if is_first() and (workdir / FROZEN).is_dir():
        drop_partials(workdir / FROZEN)
    for component in dict.fromkeys(path.split(".")[0] for path in frozen):
        inside, _ = param_paths.split(frozen, rf"{component}\..*")
        arrays = {p.removeprefix(component + "."): to_host(v) for p, v in inside.items()}
        names[component] = f"{component}-{weights.digest(arrays)[:12]}"
        folder = workdir / FROZEN / names[component]
        if is_first() and not (folder / weights.WEIGHTS).is_file():
            sizes = getattr(config, component)
            weights.save_component(
                folder, weights.FAMILIES.get(component, component), sizes, arrays
            )
    return names


def load_frozen(workdir: Path, names: Mapping[str, str]) -> Flat:
    """The frozen weights of a run, checked against the hashes in their names."""
    frozen: Flat = {}
    for component, name in names.items():
        if not re.fullmatch(rf"{re.escape(component)}-[0-9a-f]{{12}}", str(name)):
            raise CheckpointError(
                f"a checkpoint of {workdir} names {name!r} as its frozen {component}: expected "
                f"{component}-HASH, a folder of {workdir / FROZEN}"
            )
        try:
            folder = inside(workdir, f"{FROZEN}/{name}", str(workdir))
        except ValueError as error:
            raise CheckpointError(f"{workdir / FROZEN / name} {error}") from error
        arrays = weights.read_weights(folder)
        if f"{component}-{weights.digest(arrays)[:12]}" != name:
            raise CheckpointError(f"{folder} was altered: its hash differs")
        frozen |= {f"{component}.{path}": value for path, value in arrays.items()}
    return frozen
