"""What a run does about evaluation: during training, and at its end."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any

from htfa_jax.common.files import write_whole
from htfa_jax.common.logs import MetricWriter
from htfa_jax.common.param_paths import Flat
from htfa_jax.common.signals import Interrupted, StopSignal
from htfa_jax.config import Config
from htfa_jax.data.records import Dataset, Split
from htfa_jax.data.splits import open_split
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.errors import ConfigError, DataError
from htfa_jax.evaluation import report
from htfa_jax.evaluation.evaluator import Evaluator, questions
from htfa_jax.evaluation.panel import panel_png, read_png
from htfa_jax.models.factory import Model
from htfa_jax.sharding.layout import Layout
from htfa_jax.sharding.processes import is_first
from htfa_jax.training.loop import duration

log = logging.getLogger(__name__)
# Records in which a kind of question is looked for before training.
LOOKED_AT = 512


def check_best_metric(config: Config, validation: Dataset) -> None:
    """Raises ConfigError if no record asks the kind of question that chooses the best checkpoint.

    The configuration cannot tell: kinds are the records' own. An evaluation comes hours later.
    """
    name = config.train.best_metric
    if not name.startswith("accuracy/") or len(validation) > LOOKED_AT:
        return
    kinds: set[str] = set()
    for i in range(len(validation)):
        with contextlib.suppress(DataError):
            kinds |= {question.kind or "answer" for question, _ in questions(validation[i])}
    kinds |= {"joint"} if {"category", "color"} <= kinds else set()
    if name.removeprefix("accuracy/") not in kinds:
        raise ConfigError(
            f"train.best_metric={name} is not a validation metric of this run; its questions are "
            f"of the kinds {', '.join(sorted(kinds)) or 'none'}"
        )


class Evaluations:
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

    def during(self, step: int, params: Flat, stop: StopSignal) -> dict[str, float] | None:
        """Scores on the validation split by short names; None if there is none.

        Raises `Interrupted` soon after `stop` was asked for; nothing is written then.
        """
        if self.config.data.validation is None:
            return None
        started = time.time()
        records = open_split(self.config, "validation")
        try:
            limit, interrupt = self.config.eval.max_samples, stop.interrupt
            result = self.evaluator(params, records, limit, interrupt)
        except Interrupted:
            log.warning("step %d is saved now and evaluated when the run goes on", step)
            raise
        scalars = report.scalars(result.scores)
        if (best := self.config.train.best_metric) not in scalars:
            raise ConfigError(
                f"train.best_metric={best} is not a validation metric of this run; it has "
                f"{', '.join(scalars)}"
            )
        if not math.isfinite(scalars[best]):
            log.warning(
                "validation %s is %s at step %d, which counts as the worst: have the weights "
                "blown up?",
                best,
                scalars[best],
                step,
            )
        self.writer.write_scalars(step, {f"validation/{k}": v for k, v in scalars.items()})
        if result.panel and is_first():
            path = self.workdir / "logs" / "panels" / f"step_{step:07d}.png"
            content = panel_png(result.panel)
            try:
                path.parent.mkdir(exist_ok=True)
                write_whole(path, content)
            except OSError as error:  # a full disk; a panel is no reason to end a run
                log.warning("%s cannot be written: %s", path, error)
            self.writer.write_images(step, {"panel": read_png(content)[None]})
        shown = ("loss", "accuracy/", "psnr/occluded")
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
        for line in report.score_table(result.scores).splitlines():
            log.info("%s", line)
        return result.scores
