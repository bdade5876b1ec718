"""The main job: trains HTFA, evaluates it, shows what it does.

python -m htfa_jax.train --config configs/debug.py
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview

from htfa_jax import parts, report
from htfa_jax.batch import Batch
from htfa_jax.checkpoint import (
    Checkpoints,
    load_frozen,
    make_workdir,
    new_workdir,
    open_checkpoints,
    save_frozen,
)
from htfa_jax.commands import command, use_compilation_cache
from htfa_jax.config import Config, leaves
from htfa_jax.config_io import (
    ConfigFlags,
    load_config,
    override,
    parse_args,
    save_config,
    source_name,
)
from htfa_jax.data.pipeline import num_steps, samples_per_step, training_batches
from htfa_jax.data.splits import SPLITS, open_split, open_tokenizer
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.errors import ConfigError, HTFAError
from htfa_jax.evaluate import Evaluator
from htfa_jax.flops import training_step
from htfa_jax.infer import write_example
from htfa_jax.logs import MetricWriter, log_to_file
from htfa_jax.loop import Loop, State, duration
from htfa_jax.losses import count, loss_and_metrics
from htfa_jax.optim import learning_rate, make_optimizer
from htfa_jax.paths import Flat
from htfa_jax.plan import plan, size_table
from htfa_jax.train_state import Model, build, load_pretrained, new_params, new_state
from htfa_jax.train_vq import cached_vq
from htfa_jax.visualize import panel_png, read_png

# Steps between checkpoints or evaluations where the configuration does not say.
DEFAULT_STEPS = 250

log = logging.getLogger("htfa_jax.train")  # by name: this module is run as __main__ too


def make_train_step(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
) -> Callable[[State, Flat, Batch], tuple[State, dict[str, jax.Array]]]:
    """(state, frozen weights, samples of one update) -> (state, metrics); pure.

    The samples are cut into `train.accumulation_steps` micro-steps. If the loss or the gradient
    is not finite, parameters and moments stay as they were, and `metrics["finite"]` is false.
    """
    steps = config.train.accumulation_steps

    def train_step(state: State, frozen: Flat, batch: Batch):
        counts = count(batch, config)
        step_key = jax.random.fold_in(jax.random.key(config.seed), state["step"])

        def loss_fn(params: Flat, micro: Batch, key: jax.Array):
            return loss_and_metrics(model.merge(params, frozen), micro, counts, key)

        def micro_step(micro: Batch, key: jax.Array) -> tuple[Flat, dict[str, jax.Array]]:
            (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state["params"], micro, key
            )
            return grads, metrics

        grads, metrics = sum_over(micro_step, steps, batch, step_key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state["params"], state["opt_state"]),
        )
        metrics |= {
            "grad_norm": norm,
            "learning_rate": schedule(state["step"]),
            "finite": finite,
        }
        return {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    return train_step


def sum_over(
    micro_step: Callable[[Batch, jax.Array], Any], steps: int, batch: Batch, key: jax.Array
) -> Any:
    """The sum of `micro_step`'s results over equal parts of a batch, each with its own key."""
    if steps == 1:
        # Not a loop of one: XLA's convolutions are several times slower in loops on CPUs.
        return micro_step(batch, key)
    inputs = (
        jax.tree.map(lambda x: x.reshape(steps, -1, *x.shape[1:]), batch),
        jax.random.split(key, steps),
    )
    shapes = jax.eval_shape(micro_step, *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(
        lambda total, x: (jax.tree.map(jnp.add, total, micro_step(*x)), None), zeros, inputs
    )[0]


def train(config: Config, workdir: Path) -> dict[str, Any] | None:
    """Trains and evaluates; resumes what `workdir` holds.

    Args:
      config: of the run.
      workdir: see `checkpoint` for what it holds.

    Returns:
      Scores on the test split (on the validation split if there is none, empty without
      both); None if a signal stopped the training.
    """
    with log_to_file(workdir / "logs" / "train.log") as failed:
        started = time.time()
        try:
            scores = _train(config, workdir)
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


def _train(config: Config, workdir: Path) -> dict[str, Any] | None:
    path = workdir / "config.json"
    before = load_config(path) if path.is_file() else None
    if before is None:
        save_config(config, path)
    for split in SPLITS:  # what is missing should be missed now, not after hours of training
        if getattr(config.data, split) is not None:
            open_split(config, split)
    records = open_split(config, "train")
    tokenizer = open_tokenizer(config, workdir, records)
    model = build(config)
    samples = samples_per_step(config)
    steps, steps_per_epoch = num_steps(config, len(records)), max(1, len(records) // samples)
    schedule = learning_rate(config.optim, steps)
    optimizer = make_optimizer(config.optim, schedule)
    step_fn = jax.jit(make_train_step(config, model, optimizer, schedule), donate_argnums=0)
    writer = MetricWriter(workdir / "logs")
    evaluations = _Evaluations(config, workdir, model, tokenizer, writer)
    with open_checkpoints(workdir, config) as checkpoints:
        if before is not None and checkpoints.latest_step() is not None:
            _refuse_other_weights(before, config)
        start = _start(config, workdir, model, optimizer, checkpoints)
        if start is None:
            return None
        if before is not None:
            _say_changes(before, config)
            save_config(config, path)
        state, frozen, meta = start
        # Fresh and restored arrays alike, so that both run the same compiled step.
        state, frozen = jax.device_put((state, frozen), jax.devices()[0])
        for line in size_table(model.shapes, config).splitlines():
            log.info("%s", line)
        overview = parameter_overview.get_parameter_overview(
            {**state["params"], **frozen}, include_stats=False
        )
        (workdir / "logs" / "parameters.txt").write_text(overview + "\n", encoding="utf-8")

        def after_step(step: int, state: State) -> None:
            train, evaluation, metrics = config.train, config.eval, None
            evaluates = due(evaluation.during_training, evaluation.every, step, steps_per_epoch)
            if evaluates or (step == steps and evaluation.during_training != "no"):
                metrics = evaluations.during(step, {**state["params"], **frozen})
            # An evaluated step is kept too: it may be the best.
            saves = due(train.save, train.save_every, step, steps_per_epoch)
            if saves or (metrics and train.save != "no"):
                checkpoints.save(state, meta, metrics)

        loop = Loop(
            name="train",
            step_fn=lambda state, batch: step_fn(state, frozen, batch),
            num_steps=steps,
            log_every=config.train.log_every,
            writer=writer,
            samples_per_step=samples,
            after_step=after_step,
            max_bad_records=config.data.max_bad_records,
            flops_per_sample=sum(training_step(config, config.data.text_buckets[0]).values()),
        )
        first = int(state["step"])
        log.info(
            "training: steps %d to %d of %d samples, %d records",
            first + 1,
            steps,
            samples,
            len(records),
        )
        batches = training_batches(config, records, tokenizer, first, samples)
        try:
            state, stopped = loop.run(state, batches)
        except HTFAError:
            # What was learned so far is finite, whatever went wrong.
            checkpoints.save(loop.state, meta)
            raise
        finally:
            batches.close()
        checkpoints.save(state, meta)
        if stopped:
            return None
        best = checkpoints.best_step()
        if best != int(state["step"]):
            log.info("step %d is the best by validation %s", best, config.train.best_metric)
            state["params"] = checkpoints.restore(best, params=state["params"])["params"]
    scores = evaluations.final(best, {**state["params"], **frozen})
    writer.close()
    example = next((s for s in ("test", "validation") if getattr(config.data, s)), "train")
    write_example(workdir, config, open_split(config, example))
    return scores


def _start(
    config: Config,
    workdir: Path,
    model: Model,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
) -> tuple[State, Flat, dict[str, Any]] | None:
    """State, frozen weights and checkpoint meta, of the newest checkpoint or of a new run.

    None if a signal stopped the VQ stage.
    """
    latest = checkpoints.latest_step()
    if latest is not None:
        meta = checkpoints.restore(latest)["meta"]
        frozen = jax.device_put(load_frozen(workdir, meta["frozen"]))
        trainable = {path: v for path, v in model.shapes.items() if path not in frozen}
        opt_state = jax.eval_shape(optimizer.init, trainable)
        found = checkpoints.restore(latest, params=trainable, opt_state=opt_state)
        log.info("going on from step %d", latest)
        state = {
            "step": jnp.int32(latest),
            "params": found["params"],
            "opt_state": found["opt_state"],
        }
        return state, frozen, meta
    source, pretrained = config, config.pretrained
    needs_vq = config.level3.generation and not (pretrained.vq or pretrained.run)
    if needs_vq and pretrained.random_parts == "train":
        folder = cached_vq(config, workdir / "vq")
        if folder is None:
            return None
        source = override(config, {"pretrained.vq": str(folder)})
    trainable, frozen = new_params(source, model, load_pretrained(source, model))
    meta = {"frozen": save_frozen(workdir, config, frozen)}
    return new_state(trainable, optimizer), frozen, meta


class _Evaluations:
    """Evaluates during and after training, and writes what comes out."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        model: Model,
        tokenizer: ChatTokenizer,
        writer: MetricWriter,
    ):
        self.config, self.workdir, self.writer = config, workdir, writer
        self.evaluator = Evaluator(config, model, tokenizer)

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
        if result.panel:
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
        name = "test" if data.test is not None else "validation"
        if getattr(data, name) is None:
            log.info("no test or validation data: nothing to evaluate on")
            return {}
        result = self.evaluator(params, open_split(self.config, name))
        result.scores["step"] = step
        folder = self.workdir / "evaluation" / name
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


def _say_changes(before: Config, config: Config) -> None:
    old = dict(leaves(before))
    for name, value in leaves(config):
        if old[name] != value:
            log.warning("%s was %s in this workdir and is now %s", name, old[name], value)


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Trains HTFA and evaluates it. --config FILE says how (default: the preset `standard`)."""

    config: ConfigFlags
    workdir: Path | None = None  # where it goes; what it holds is resumed (default: runs/...)
    init_from: str | None = None  # start at step 0 with the weights of this run (or checkpoint)
    dry_run: bool = False  # print devices, parameters, memory and FLOPs, and stop


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(TrainArgs, argv, resolve=parts.with_sizes)
    config = args.config
    if args.init_from is not None:
        config = override(config, {"pretrained.run": args.init_from})
    if args.dry_run:
        print(plan(config))
        return
    use_compilation_cache(config)
    workdir = make_workdir(args.workdir or new_workdir(source_name(argv)))
    scores = train(config, workdir)
    print(f"{'stopped' if scores is None else 'finished'}: {workdir}")


if __name__ == "__main__":
    main()
