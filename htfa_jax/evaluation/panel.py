"""Images to look at: the evaluation panel."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from PIL import Image

from htfa_jax.data.decode import decoded
from htfa_jax.evaluation.metrics import Prediction, is_right

COLUMNS = {
    "original": "original",
    "reconstruction": "reconstruction",
    "fused": "fused",
    "alpha": "alpha (weight of original)",
    "completion": "completion",
    "target": "target",
}


@dataclasses.dataclass
class PanelRow:
    """One scene.

    Attributes:
      name: of the record.
      images: by the names of `COLUMNS`, RGB [H, W, 3] in [0, 1] or PIL; "alpha" is [H, W].
      answers: its questions, answered.
    """

    name: str
    images: dict[str, np.ndarray | Image.Image]
    answers: list[Prediction]


def panel_png(rows: list[PanelRow]) -> bytes:
    """A PNG with a row per scene: images, then questions, answers and truths."""
    # Not pyplot: it would choose a display and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in COLUMNS if name in rows[0].images]
    figure = Figure(figsize=(1.9 * len(names) + 3.2, 1.95 * len(rows) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    *axes, last = figure.subplots(
        len(rows) + 1,
        len(names) + 1,
        squeeze=False,
        width_ratios=[1.0] * len(names) + [1.7],
        height_ratios=[1.0] * len(rows) + [0.06],
    )
    for row, line in zip(rows, axes, strict=True):
        for name, ax in zip(names, line, strict=False):
            if name == "alpha":
                alpha_image = ax.imshow(row.images[name], cmap="cividis", vmin=0, vmax=1)
            else:
                ax.imshow(row.images[name])
            ax.set_axis_off()
        _write_answers(line[-1], row)
    for name, ax in zip(names, axes[0], strict=False):
        ax.set_title(COLUMNS[name], fontsize=9)
    axes[0][-1].set_title("question: answer (truth)", fontsize=9, loc="left")
    for name, ax in zip([*names, "answers"], last, strict=True):
        if name == "alpha":
            figure.colorbar(alpha_image, cax=ax, orientation="horizontal", ticks=[0, 0.5, 1])
        else:
            ax.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def printable(text: str) -> str:
    """The text without what a font cannot draw."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def read_png(content: bytes) -> np.ndarray:
    """A file's content as uint8 [H, W, 3]."""
    return np.asarray(decoded(content))


def _write_answers(ax, row: PanelRow) -> None:
    ax.set_axis_off()
    ax.text(
        0.0,
        0.97,
        row.name,
        fontsize=8,
        va="top",
        color="0.4",
        transform=ax.transAxes,
        parse_math=False,
    )
    for i, answer in enumerate(row.answers[:5]):
        known = answer.truth is not None
        right = known and is_right(answer.answer, answer.truth)
        # Sign and colour: either alone tells right from wrong.
        sign, color = ("✓", "#00618a") if right else ("✗", "#b04a00")
        if not known:
            sign, color = "·", "0.2"
        ax.text(
            0.0,
            0.80 - 0.19 * i,
            f"{sign} {answer.kind}: {printable(answer.answer) or '(nothing)'}"
            + ("" if right or not known else f"  ({printable(answer.truth)})"),
            fontsize=9,
            va="top",
            color=color,
            transform=ax.transAxes,
            parse_math=False,
        )
