"""A run's numbers over its steps, from the lines that it wrote: for where no TensorBoard is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from htfa_jax.common.json_files import read_json_lines
from htfa_jax.config.renamed import METRICS
from htfa_jax.errors import DataError

Curves = dict[str, list[tuple[int, float]]]

# Told apart without colour vision, and by their marks.
COLORS = ("#00618a", "#b04a00", "#5b8c2a", "#7b4ea3", "#8a7a00")


def read_curves(workdir: str | Path) -> Curves:
    """{name: [(step, value), ...]} of a run's `logs/metrics.jsonl`; a later line of a step counts.

    Half a last line, of a run that writes it or was killed, does not count. Raises DataError if
    there are no such lines, or if one is damaged.
    """
    path = Path(workdir) / "logs" / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"no {path}: expected the workdir of a run")
    steps: dict[str, dict[int, float]] = {}
    for values in read_json_lines(path, DataError, allow_nan=True):
        if "step" not in values or not all(map(_is_number, values.values())):
            raise DataError(f"{path} has a line that is not a step's numbers: {str(values)[:80]}")
        for name, value in values.items():
            if name not in ("step", "time"):
                group, _, metric = name.partition("/")
                name = f"{group}/{METRICS.get(metric, metric)}"
                steps.setdefault(name, {})[values["step"]] = value
    return {name: sorted(found.items()) for name, found in steps.items()}


def _is_number(value: Any) -> bool:
    # A whole number of many digits cannot be drawn.
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def curves_figure(workdir: str | Path) -> Figure:
    """Losses in training and validation, and the accuracy of answers by kind of question."""
    curves = read_curves(workdir)
    losses = {
        "loss": "train/loss",
        "text": "train/text_loss",
        "codes": "train/code_loss",
        "loss, validation": "validation/loss",
    }
    start = "validation/accuracy/"
    answers = {n[len(start) :].replace("_", " "): n for n in curves if n.startswith(start)}
    shown = [("loss in nats", losses)] + ([("accuracy", answers)] if answers else [])
    figure = Figure(figsize=(4.6 * len(shown), 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (title, names) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown,
                                  strict=True):  # fmt: skip
        drawn = [(label, curves[name]) for label, name in names.items() if name in curves]
        for color, (label, points) in zip(COLORS * len(drawn), drawn, strict=False):
            mark = "o" if "validation" in names[label] else ""
            ax.plot(*zip(*points, strict=True), color=color, marker=mark, ms=4, lw=1.6, label=label)
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel("step", fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9")
        ax.tick_params(labelsize=8)
        if title == "accuracy":
            ax.set_ylim(0, 1.02)
        ax.legend(fontsize=8, frameon=False)
    return figure
