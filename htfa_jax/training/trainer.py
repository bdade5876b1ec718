"""The main job: trains HTFA, evaluates it, shows what it does."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from clu import parameter_overview

from htfa_jax.checkpoints import integrity
from htfa_jax.checkpoints.lock import lock
from htfa_jax.checkpoints.manager import Checkpoints, open_checkpoints, save_frozen
from htfa_jax.checkpoints.runs import make_workdir
from htfa_jax.checkpoints.tokenizer_files import KEY, check_tokenizer, tokenizer_hashes
from htfa_jax.common.files import write_whole
from htfa_jax.common.logs import MetricWriter, log_to_file
from htfa_jax.common.param_paths import Flat
from htfa_jax.common.signals import Interrupted, Stopped, StopSignal
from htfa_jax.config import Config, load_config, override
from htfa_jax.config.io import fields_without_value, save_config
from htfa_jax.data.pipeline import num_steps, samples_per_step, training_batches
from htfa_jax.data.records import SPLITS, Dataset
from htfa_jax.data.splits import open_split, open_tokenizer
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.errors import Damaged
from htfa_jax.models.factory import Model, build_model
from htfa_jax.models.flops import training_step
from htfa_jax.sharding.layout import Layout
from htfa_jax.sharding.processes import first_goes_ahead, is_first
from htfa_jax.training import encoder_cache, origins
from htfa_jax.training.evaluations import Evaluations, check_best_metric
from htfa_jax.training.example import write_example
from htfa_jax.training.loop import Loop, duration, recorded
from htfa_jax.training.loss_guard import DUMPS, LossGuard
from htfa_jax.training.optim import learning_rate, make_optimizer
from htfa_jax.training.plan import out_of_memory_explained, size_table
from htfa_jax.training.pretrained import load_pretrained
from htfa_jax.training.restore import restore_state
from htfa_jax.training.resuming import DATA, STEPS, Start, compare, data_facts, say_changes
from htfa_jax.training.state import TrainState, new_params, new_state
from htfa_jax.training.step import compile_train_step, compute_dtype_params, put_update
from htfa_jax.training.vq_stage import cached_vq, needs_vq_stage

# Steps between checkpoints or evaluations where the configuration does not say.
DEFAULT_STEPS = 250

log = logging.getLogger(__name__)


def train(config: Config, workdir: Path, resume_step: int | None = None) -> dict[str, Any] | None:
    """Trains and evaluates; resumes what `workdir` holds.

    Args:
      config: of the run.
      workdir: see `checkpoints.manager` for what it holds.
      resume_step: checkpoint to go on at, instead of the newest; later ones move to `later/`.

    Returns:
      Scores on the test split (on the validation split if there is none, empty without
      both); None if a signal stopped the training.
    """
    first = is_first()
    name = "train.log" if first else f"train_process_{jax.process_index()}.log"
    make_workdir(workdir)
    with (
        lock(workdir) if first else contextlib.nullcontext() as held,
        log_to_file(workdir / "logs" / name) as failed,
        StopSignal() as stop,
    ):
        started = time.time()
        try:
            if resume_step is not None:
                with first_goes_ahead("go back"):
                    if first:
                        integrity.go_back(workdir, resume_step)
            with out_of_memory_explained(config, workdir):
                scores = _train(config, workdir, stop, held.check if held else lambda: None)
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


def _train(
    config: Config, workdir: Path, stop: StopSignal, check_held: Callable[[], None]
) -> dict[str, Any] | None:
    path, layout = workdir / "config.json", Layout(config)
    with first_goes_ahead("config"):
        before = load_config(path) if path.is_file() else None
        new = fields_without_value(path) if path.is_file() else []
        if before is None and is_first():
            save_config(config, path)
    with first_goes_ahead("data"):
        for split in SPLITS:  # what is missing should be missed now, not after hours of training
            if getattr(config.data, split) is not None:
                opened = open_split(config, split)
                if split == "validation":
                    check_best_metric(config, opened)
        records = open_split(config, "train")
        tokenizer = open_tokenizer(config, workdir, records)
    encoder_cache.check(config, len(records))
    writer = MetricWriter(workdir / "logs", silent=not is_first())
    with open_checkpoints(workdir, config.train, check=check_held) as checkpoints:
        run = Run(
            config=config,
            workdir=workdir,
            layout=layout,
            model=build_model(config),
            records=records,
            tokenizer=tokenizer,
            checkpoints=checkpoints,
            writer=writer,
            stop=stop,
            check_held=check_held,
        )
        start = run.start(before)
        if start is None:
            return None
        if before is not None and is_first():
            say_changes(before, config, new)
            save_config(config, path)
        scores = run.train(start)
    writer.close()
    check_held()
    if scores is not None and is_first():
        example = next((s for s in reversed(SPLITS) if getattr(config.data, s)), SPLITS[0])
        write_example(workdir, config.data, open_split(config, example))
    return scores


@dataclasses.dataclass
class Run:
    """A run of the main job: what it trains on and with, and when it saves and evaluates.

    Attributes:
      config: all options.
      workdir: its folder.
      layout: its devices.
      model: structure.
      records: training data.
      tokenizer: of its text.
      checkpoints: of the workdir.
      writer: takes metrics.
      stop: asked for after every step.
      check_held: raises if the workdir is another run's; called before anything is written there.
    """

    config: Config
    workdir: Path
    layout: Layout
    model: Model
    records: Dataset
    tokenizer: ChatTokenizer
    checkpoints: Checkpoints
    writer: MetricWriter
    stop: StopSignal
    check_held: Callable[[], None]

    def __post_init__(self) -> None:
        self.samples_per_step = samples_per_step(self.config.train, self.layout.num_shards)
        self.tokenizer_hashes = tokenizer_hashes(self.workdir)
        self.evaluations = Evaluations(
            self.config, self.workdir, self.model, self.tokenizer, self.layout, self.writer
        )
        self._compute_params = jax.jit(
            lambda params: compute_dtype_params(self.config, self.layout, params)
        )

    def start(self, before: Config | None) -> Start | None:
        """The newest checkpoint, or new weights without one.

        Args:
          before: configuration that the workdir was made with; None if it is new.

        Returns None if a signal stopped the VQ stage. Raises ConfigError if the checkpoints are of
        other pretrained or frozen weights, CheckpointError if none can be read.
        """
        self.before, self.data_facts = before, data_facts(self.records)
        while (latest := self.checkpoints.latest_step()) is not None:
            origins.refuse_others(self.workdir, before or self.config, self.config)
            try:
                meta = self.checkpoints.restore(latest)["meta"]
                check_tokenizer(self.workdir, meta)
                self.writer.check(meta.get("metrics_file"))
                return self._start(latest, meta)
            except Damaged as error:
                self.checkpoints.set_aside(latest, error)
        if before is not None:
            log.warning("%s holds no complete checkpoint yet: starting at step 0", self.workdir)
        return self._start(0, {})

    def _start(self, latest: int, meta: dict[str, Any]) -> Start | None:
        config, samples = self.config, int(meta.get("samples", 0))
        steps = num_steps(config.train, len(self.records), self.samples_per_step, latest, samples)
        schedule = learning_rate(config.optim, steps)
        optimizer = make_optimizer(config.optim, schedule)
        if not meta:
            begun = self.begin(optimizer)
            if begun is None:
                return None
            state, frozen, names = begun
        else:
            state, frozen = restore_state(
                config, self.workdir, self.model, optimizer, self.layout, self.checkpoints, meta
            )
            if self.before is not None:
                compare(self.before, config, meta, self.data_facts, schedule, steps)
            names = meta["frozen"]
            log.info("resuming from step %d", meta["step"])
        return Start(
            state=state,
            frozen=frozen,
            frozen_names=names,
            samples=samples,
            window=meta.get("window", []),
            late=meta.get("late", False) is True,
            num_steps=steps,
            schedule=schedule,
            optimizer=optimizer,
        )

    def begin(
        self, optimizer: optax.GradientTransformation
    ) -> tuple[TrainState, Flat, dict[str, str]] | None:
        """State and frozen weights of a new run, and where the frozen ones were stored.

        None if a signal stopped the VQ stage.
        """
        source = self.config
        if needs_vq_stage(source):
            folder = cached_vq(source, self.workdir / "vq", self.stop, self.check_held)
            if folder is None:
                return None
            source = override(source, {"pretrained.vq": str(folder)})
        loaded = load_pretrained(source, self.model)
        trainable, frozen = new_params(source, self.model, loaded, self.layout)
        state = new_state(self.config.train, trainable, optimizer, self.layout)
        if is_first():
            origins.remember(self.workdir, self.config)
        return state, frozen, save_frozen(self.workdir, self.config, frozen)

    def train(self, start: Start) -> dict[str, Any] | None:
        """Takes the steps, then evaluates the best checkpoint; None if a signal stopped it."""
        config, layout = self.config, self.layout
        self.first_step, self.begun = int(start.state["step"]), start
        self.late_step = self.first_step if start.late else None
        self.epochs_per_step = self.samples_per_step / len(self.records)
        everything = {**start.state["params"], **start.frozen}
        if is_first():
            self._write_overview(everything)
        cached = encoder_cache.open_or_make(
            config, self.model, everything, start.frozen_names, self.records, layout
        )
        step_fn = compile_train_step(
            config, self.model, start.optimizer, start.schedule, layout, start.state, start.frozen
        )
        self.loop = Loop(
            name="train",
            step_fn=recorded(
                lambda state, batch: step_fn(state, start.frozen, batch),
                self.workdir / "logs",
                config.train.profile_steps,
            ),
            put=lambda batch: put_update(config.train, layout, batch),
            num_steps=start.num_steps,
            log_every=config.train.log_every,
            writer=self.writer,
            samples_per_step=self.samples_per_step,
            due=lambda step: self.evaluates(step) or self.saves(step),
            after_step=self.after_step,
            save=self.save,
            max_bad_records=config.data.max_bad_records,
            guard=LossGuard(config.train, self.workdir / DUMPS, start.num_steps),
            stop=self.stop,
            check_held=self.check_held,
            watchdog_seconds=config.train.watchdog_seconds,
            window=start.window,
            flops_per_sample=sum(training_step(config, config.data.text_buckets[0]).values()),
        )
        if start.late:
            self.make_up_for_evaluation(start.state)
        span = f"steps {self.first_step + 1} to {start.num_steps}"
        if self.first_step >= start.num_steps:
            span = f"all {start.num_steps} steps are done, no more are taken;"
        log.info(
            "training: %s of %d samples, %d records", span, self.samples_per_step, len(self.records)
        )
        batches = training_batches(
            config,
            self.records,
            self.tokenizer,
            start.samples,
            self.samples_per_step,
            layout.process_share,
            cached,
        )
        with contextlib.closing(batches):
            state, stopped = self.loop.run(start.state, batches)
        return None if stopped else self.evaluate_best(state)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after a step."""
        when = self.config.eval.during_training
        at_end = step == self.begun.num_steps and when != "no"
        return at_end or due(when, self.config.eval.every, step, self.epochs_per_step)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""
        train = self.config.train
        return due(train.save, train.save_every, step, self.epochs_per_step)

    def after_step(self, step: int, state: TrainState) -> None:
        """Evaluates and saves, whichever is due; saves at once if a signal comes meanwhile."""
        metrics = None
        if self.evaluates(step):
            try:
                metrics = self.evaluations.during(step, self.weights(state), self.stop)
            except Interrupted:
                self.late_step = step
        # An evaluated step is kept too: it may be the best.
        kept = (metrics or self.late_step == step) and self.config.train.save != "no"
        if self.saves(step) or kept:
            self.save(state, metrics)

    def make_up_for_evaluation(self, state: TrainState) -> None:
        """Evaluates the checkpoint that the run goes on from, as if no signal had come."""
        step = int(state["step"])
        metrics = self.evaluations.during(step, self.weights(state), self.stop)
        if is_first() and metrics:
            self.checkpoints.add_metrics(step, metrics)

    def save(self, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Writes a checkpoint."""
        step = int(state["step"])
        meta = {
            "frozen": self.begun.frozen_names,
            KEY: self.tokenizer_hashes,
            "samples": self.begun.samples + (step - self.first_step) * self.samples_per_step,
            "window": self.loop.window,
            "late": step == self.late_step,
            DATA: self.data_facts,
            STEPS: self.begun.num_steps,
        }
        self.writer.flush()
        meta["metrics_file"] = self.writer.digest()
        self.checkpoints.save(state, meta, metrics)

    def evaluate_best(self, state: TrainState) -> dict[str, Any]:
        """Scores of the best checkpoint, or of the newest without evaluations."""
        self.check_held()
        best, found = self.checkpoints.restore_best(int(state["step"]), params=state["params"])
        if found:
            log.info("step %d is the best by validation %s", best, self.config.train.best_metric)
            state["params"] = found["params"]
        return self.evaluations.final(best, self.weights(state))

    def weights(self, state: TrainState) -> Flat:
        """All weights as the forward pass reads them."""
        return {**self._compute_params(state["params"]), **self.begun.frozen}

    def _write_overview(self, params: Flat) -> None:
        """Parameters by component to the log, one by one to a file."""
        log.info("mesh: %s, %s", dict(self.layout.mesh.shape), self.layout.mode)
        for line in size_table(self.model.shapes, self.config).splitlines():
            log.info("%s", line)
        overview = parameter_overview.get_parameter_overview(params, include_stats=False)
        path = self.workdir / "logs" / "parameters.txt"
        write_whole(path, overview + "\n")


def due(when: str, every: int | None, step: int, epochs_per_step: float) -> bool:
    """Whether something that happens every so many "steps" or "epoch"s is due at a step.

    Of epochs it is the first step at whose end so many have passed.
    """
    if when == "no":
        return False
    if when == "steps":
        return step % (every or DEFAULT_STEPS) == 0
    share = epochs_per_step / (every or 1)
    # What rounding takes from a whole number of epochs must not cost a step.
    before, now = (math.floor((step - i) * share + 1e-9) for i in (1, 0))
    return now > before
