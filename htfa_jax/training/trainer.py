"""The main job: trains HTFA, evaluates it, shows what it does."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview

from htfa_jax.checkpoints.lock import lock
from htfa_jax.checkpoints.manager import Checkpoints, load_frozen, open_checkpoints, save_frozen
from htfa_jax.checkpoints.runs import make_workdir
from htfa_jax.common.logs import MetricWriter, log_to_file
from htfa_jax.common.param_paths import Flat
from htfa_jax.common.signals import Stopped, StopSignal
from htfa_jax.config import Config, leaves, load_config, override
from htfa_jax.config.io import fields_without_value, save_config
from htfa_jax.data.pipeline import num_steps, samples_per_step, training_batches
from htfa_jax.data.records import SPLITS, Split
from htfa_jax.data.splits import open_split, open_tokenizer
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.errors import ConfigError
from htfa_jax.evaluation import report
from htfa_jax.evaluation.evaluator import Evaluator
from htfa_jax.evaluation.panel import panel_png, read_png
from htfa_jax.models.factory import Model, build_model
from htfa_jax.models.flops import training_step
from htfa_jax.sharding.layout import Layout
from htfa_jax.sharding.processes import first_goes_ahead, is_first
from htfa_jax.training import encoder_cache
from htfa_jax.training.example import write_example
from htfa_jax.training.loop import Loop, duration, recorded
from htfa_jax.training.loss_guard import DUMPS, LossGuard
from htfa_jax.training.optim import learning_rate, make_optimizer
from htfa_jax.training.plan import out_of_memory_explained, size_table
from htfa_jax.training.pretrained import load_pretrained
from htfa_jax.training.state import State, new_params, new_state
from htfa_jax.training.step import compile_train_step, compute_copy, put_update
from htfa_jax.training.vq_stage import cached_vq, needs_vq_stage

# Steps between checkpoints or evaluations where the configuration does not say.
DEFAULT_STEPS = 250

log = logging.getLogger(__name__)


def train(config: Config, workdir: Path) -> dict[str, Any] | None:
    """Trains and evaluates; resumes what `workdir` holds.

    Args:
      config: of the run.
      workdir: see `checkpoints` for what it holds.

    Returns:
      Scores on the test split (on the validation split if there is none, empty without
      both); None if a signal stopped the training.
    """
    first = is_first()
    name = "train.log" if first else f"train_process_{jax.process_index()}.log"
    make_workdir(workdir)
    with (
        lock(workdir) if first else contextlib.nullcontext(),
        log_to_file(workdir / "logs" / name) as failed,
        StopSignal() as stop,
    ):
        started = time.time()
        try:
            with out_of_memory_explained(config, workdir):
                scores = _train(config, workdir, stop)
        except Stopped:
            scores = None
        except BaseException as error:
            # For the file alone: the command says the sentence too.
            text = f"failed after {duration(time.time() - started)}: {error}"
            failed.handle(logging.makeLogRecord({"msg": text}))
            raise
        if scores is None:
            log.info("stopped; everything is saved. Go on with --workdir %s", workdir)
        else:
            seconds = time.time() - started
            log.info("finished in %s; everything is in %s", duration(seconds), workdir)
        return scores


def _train(config: Config, workdir: Path, stop: StopSignal) -> dict[str, Any] | None:
    path, layout = workdir / "config.json", Layout(config)
    with first_goes_ahead("config"):
        before = load_config(path) if path.is_file() else None
        new = fields_without_value(path) if path.is_file() else []
        if before is None and is_first():
            save_config(config, path)
    with first_goes_ahead("data"):
        for split in SPLITS:  # what is missing should be missed now, not after hours of training
            if getattr(config.data, split) is not None:
                open_split(config, split)
        records = open_split(config, "train")
        tokenizer = open_tokenizer(config, workdir, records)
    encoder_cache.check(config, len(records))
    model = build_model(config)
    writer = MetricWriter(workdir / "logs", silent=not is_first())
    evaluations = _Evaluations(config, workdir, model, tokenizer, layout, writer)
    with open_checkpoints(workdir, config) as checkpoints:
        latest, meta, first, seen = checkpoints.latest_step(), None, 0, 0
        if latest is not None:
            _refuse_other_weights(before or config, config)
            meta = checkpoints.restore(latest)["meta"]
            first, seen = latest, int(meta["samples"])
        elif before is not None:
            log.warning("%s holds no complete checkpoint yet: starting at step 0", workdir)
        samples = samples_per_step(config, layout.num_shards)
        steps = num_steps(config, len(records), samples, first, seen)
        schedule = learning_rate(config.optim, steps)
        optimizer = make_optimizer(config.optim, schedule)
        if meta is None:
            begun = _begin(config, workdir, model, optimizer, layout, stop)
            if begun is None:
                return None
            state, frozen, names = begun
        else:
            state, frozen = resume(config, workdir, model, optimizer, layout, checkpoints, meta)
            names = meta["frozen"]
        everything = {**state["params"], **frozen}
        if is_first():
            _write_overview(workdir, config, model, everything, layout)
            if before is not None:
                _say_changes(before, config, new)
                save_config(config, path)
        kept = encoder_cache.open_or_make(config, model, everything, names, records, layout)
        step_fn = compile_train_step(config, model, optimizer, schedule, layout, state, frozen)
        copy = jax.jit(lambda params: compute_copy(config, layout, params))
        steps_per_epoch = max(1, len(records) // samples)

        def save(state: State, metrics: dict[str, float] | None = None) -> None:
            so_far = seen + (int(state["step"]) - first) * samples
            facts = {"frozen": names, "samples": so_far, "window": loop.window}
            checkpoints.save(state, facts, metrics)

        def evaluates(step: int) -> bool:
            when = config.eval.during_training
            at_end = step == steps and when != "no"
            return at_end or due(when, config.eval.every, step, steps_per_epoch)

        def saves(step: int) -> bool:
            return due(config.train.save, config.train.save_every, step, steps_per_epoch)

        def after_step(step: int, state: State) -> None:
            metrics = None
            if evaluates(step):
                metrics = evaluations.during(step, {**copy(state["params"]), **frozen})
            # An evaluated step is kept too: it may be the best.
            if saves(step) or (metrics and config.train.save != "no"):
                save(state, metrics)

        loop = Loop(
            name="train",
            step_fn=recorded(
                lambda state, batch: step_fn(state, frozen, batch),
                workdir / "logs",
                config.train.profile_steps,
            ),
            put=lambda batch: put_update(config, layout, batch),
            num_steps=steps,
            log_every=config.train.log_every,
            writer=writer,
            samples_per_step=samples,
            due=lambda step: evaluates(step) or saves(step),
            after_step=after_step,
            save=save,
            max_bad_records=config.data.max_bad_records,
            guard=LossGuard(config.train, workdir / DUMPS, steps),
            stop=stop,
            watchdog_seconds=config.train.watchdog_seconds,
            window=meta.get("window", []) if meta else [],
            flops_per_sample=sum(training_step(config, config.data.text_buckets[0]).values()),
        )
        log.info(
            "training: steps %d to %d of %d samples, %d records",
            first + 1,
            steps,
            samples,
            len(records),
        )
        batches = training_batches(
            config, records, tokenizer, seen, samples, layout.process_share, kept
        )
        with contextlib.closing(batches):
            state, stopped = loop.run(state, batches)
        if stopped:
            return None
        best = checkpoints.best_step() or int(state["step"])
        if best != int(state["step"]):
            log.info("step %d is the best by validation %s", best, config.train.best_metric)
            state["params"] = checkpoints.restore(best, params=state["params"])["params"]
        scores = evaluations.final(best, {**copy(state["params"]), **frozen})
    writer.close()
    if is_first():
        example = next((s for s in reversed(SPLITS) if getattr(config.data, s)), SPLITS[0])
        write_example(workdir, config, open_split(config, example))
    return scores


def _begin(
    config: Config,
    workdir: Path,
    model: Model,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    stop: StopSignal,
) -> tuple[State, Flat, dict[str, str]] | None:
    """State and frozen weights of a new run, and where the frozen ones were stored.

    None if a signal stopped the VQ stage.
    """
    source = config
    if needs_vq_stage(config):
        folder = cached_vq(config, workdir / "vq", stop)
        if folder is None:
            return None
        source = override(config, {"pretrained.vq": str(folder)})
    loaded = load_pretrained(source, model)
    trainable, frozen = new_params(source, model, loaded, layout)
    return (
        new_state(config, trainable, optimizer, layout),
        frozen,
        save_frozen(workdir, config, frozen),
    )


def resume(
    config: Config,
    workdir: Path,
    model: Model,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    checkpoints: Checkpoints,
    meta: dict[str, Any],
) -> tuple[State, Flat]:
    """State and frozen weights of the newest checkpoint, laid out for these devices."""
    frozen = layout.put_parameters(load_frozen(workdir, meta["frozen"]))
    trainable = {path: shape for path, shape in model.shapes.items() if path not in frozen}
    wanted = jax.eval_shape(lambda p: new_state(config, p, optimizer, layout), trainable)
    like = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        wanted,
        layout.state(wanted),
    )
    step = like.pop("step")
    found = checkpoints.restore(meta["step"], **like)
    log.info("going on from step %d", meta["step"])
    return {
        "step": jax.device_put(jnp.int32(meta["step"]), step.sharding),
        **{name: found[name] for name in like},
    }, frozen


def _write_overview(
    workdir: Path, config: Config, model: Model, params: Flat, layout: Layout
) -> None:
    """Parameters by part to the log, one by one to a file."""
    log.info("mesh: %s, %s", dict(layout.mesh.shape), layout.mode)
    for line in size_table(model.shapes, config).splitlines():
        log.info("%s", line)
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    (workdir / "logs" / "parameters.txt").write_text(overview + "\n", encoding="utf-8")


class _Evaluations:
    """Evaluates during and after training, and writes what comes out."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        model: Model,
        tokenizer: ChatTokenizer,
        layout: Layout,
        writer: MetricWriter,
    ):
        self.config, self.workdir, self.writer = config, workdir, writer
        self.evaluator = Evaluator(config, model, tokenizer, layout)

    def during(self, step: int, params: Flat) -> dict[str, float] | None:
        """Scores on the validation split by short names; None if there is none."""
        if self.config.data.validation is None:
            return None
        started = time.time()
        records = open_split(self.config, "validation")
        result = self.evaluator(params, records, self.config.eval.max_samples)
        scalars = report.scalars(result.scores)
        if (best := self.config.train.best_metric) not in scalars:
            raise ConfigError(
                f"train.best_metric={best} is not a validation metric of this run; it has "
                f"{', '.join(scalars)}"
            )
        self.writer.write_scalars(step, {f"validation/{k}": v for k, v in scalars.items()})
        if result.panel and is_first():
            path = self.workdir / "logs" / "panels" / f"step_{step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(panel_png(result.panel))
            self.writer.write_images(step, {"panel": read_png(path)[None]})
        shown = ("loss", "accuracy/", "psnr/hidden")
        log.info(
            "validation at step %d (%s): %s",
            step,
            duration(time.time() - started),
            "  ".join(f"{k} {v:.3f}" for k, v in scalars.items() if k.startswith(shown)),
        )
        return scalars

    def final(self, step: int, params: Flat) -> dict[str, Any]:
        """Scores on the test split, else on the validation split; written and logged."""
        data = self.config.data
        name: Split = "test" if data.test is not None else "validation"
        if getattr(data, name) is None:
            log.info("no test or validation data: nothing to evaluate on")
            return {}
        result = self.evaluator(params, open_split(self.config, name))
        result.scores["step"] = step
        folder = self.workdir / "evaluation" / name
        if is_first():
            report.write(result, folder)
        log.info("step %d on split %s (%s):", step, name, folder / "panel.png")
        for line in report.table(result.scores).splitlines():
            log.info("%s", line)
        return result.scores


def due(when: str, every: int | None, step: int, steps_per_epoch: int) -> bool:
    """Whether something that happens every so many "steps" or "epoch"s is due at a step."""
    if when == "no":
        return False
    every = every or {"steps": DEFAULT_STEPS, "epoch": 1}[when]
    return step % (every * (steps_per_epoch if when == "epoch" else 1)) == 0


def _refuse_other_weights(before: Config, config: Config) -> None:
    """A run with checkpoints goes on with its weights; asking for others is a mistake."""
    fixed = ("pretrained", "freeze", "level1.learnable", "data.tokenizer")
    old = dict(leaves(before))
    changed = [
        f"{name} was {old[name]} and is now {value}"
        for name, value in leaves(config)
        if name.startswith(fixed) and old[name] != value
    ]
    if changed:
        raise ConfigError(
            "this workdir's run has checkpoints, which decide these: " + "; ".join(changed) + ". "
            "Use another --workdir (--init_from starts from this run's weights)"
        )


def _say_changes(before: Config, config: Config, new: Sequence[str]) -> None:
    old = dict(leaves(before))
    for name, value in leaves(config):
        if name in new:
            log.warning("%s is new since this workdir was made; it is %s", name, value)
        elif old[name] != value:
            log.warning("%s was %s in this workdir and is now %s", name, old[name], value)
