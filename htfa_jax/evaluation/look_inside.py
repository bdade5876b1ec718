"""Figures of what the model did with a pair, from `Result.intermediates`.

result = engine.infer("orig.jpg", "recon.png", query, return_intermediates=True)
level2_figure(result).savefig("level2.png")

Points, boxes and maps are in pixels of the model's square. Colour maps are cividis (weights in
[0, 1]) and magma (attention): both rise in lightness, so that no colour vision is needed.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image

from htfa_jax.data.preprocess import Box
from htfa_jax.errors import DataError
from htfa_jax.evaluation.panel import printable
from htfa_jax.inference.answer_attention import END
from htfa_jax.inference.options import View
from htfa_jax.inference.results import Intermediates, Result

ImageLike = np.ndarray | Image.Image

# The whole of an answer's attention, unless another view is asked for.
ALL = View()
PANEL = 2.1  # inches
MOST_COLUMNS, MOST_TOKENS = 6, 7
MARK = "#f0a500"
RIM = [patheffects.withStroke(linewidth=3, foreground="black")]


def figures(
    *results: Result, truth: ImageLike | None = None, view: View = ALL
) -> dict[str, Figure]:
    """Every figure that there is something for, by name.

    Args:
      *results: of one pair, with intermediates; each has its own "answer", "answer_2" ...
      truth: the whole object as it is, in the original's frame, if it is known.
      view: of the answer's attention.

    Raises:
      DataError: if the results have no intermediates.
      ConfigError: if the decoder has no such layer or head.
    """
    first = results[0]
    found = {
        "images": images_figure(first, truth),
        "alpha": alpha_figure(first),
        "alignment": alignment_figure(first),
        "level2": level2_figure(first),
    }
    if first.intermediates.code_probabilities_MC is not None:
        found["codes"] = codes_figure(first)
    for i, result in enumerate(results):
        if result.attention is not None:
            found["answer" if i == 0 else f"answer_{i + 1}"] = answer_figure(result, view)
    return found


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()


def images_figure(result: Result, truth: ImageLike | None = None) -> Figure:
    """Original, reconstruction, fused, completed and true image side by side."""
    seen = _seen(result)
    shown = [
        ("original", seen.original_HWC, seen.region),
        (_recon_name(result), seen.reconstruction_HWC, seen.region_recon),
        ("fused", seen.fused_HWC, seen.region),
    ]
    # These two have the original's own size: they are laid over its place in the square.
    for name, image in (("completed", result.completed), ("truth", truth)):
        if image is not None:
            shown.append((name, _in_square(image, seen), seen.region))
    figure, axes = _panels(len(shown), scale=False, title_lines=2)
    for ax, (name, image, region) in zip(axes, shown, strict=True):
        _draw(ax, image, name, region)
    return figure


def alpha_figure(result: Result) -> Figure:
    """Level 1: how much of every pixel comes from the original."""
    seen = _seen(result)
    figure, axes = _panels(3)
    _draw(axes[0], seen.original_HWC, "original", seen.region)
    title = f"alpha, mean {seen.alpha_HW.mean():.2f}"
    image = _heat(axes[1], seen.original_HWC, seen.alpha_HW, title, "cividis", (0, 1))
    _crop(axes[1], seen.region)
    _outline(axes[1], seen.occluded_HW, seen.alpha_HW.shape)
    _draw(axes[2], seen.fused_HWC, "fused", seen.region)
    _scale(figure, image, axes, "weight of the original")
    return figure


def alignment_figure(result: Result) -> Figure:
    """The boxes of the object in both images, and the reconstruction moved by them."""
    seen = _seen(result)
    moved = f"aligned by {result.alignment}" if seen.box else f"not moved ({result.alignment})"
    figure, axes = _panels(3, moved, scale=False, title_lines=2)
    for ax, image, name, region, box in (
        (axes[0], seen.original_HWC, "original", seen.region, seen.box),
        (axes[1], seen.reconstruction_HWC, _recon_name(result), seen.region_recon, seen.box_recon),
        (axes[2], seen.aligned_HWC, "aligned", seen.region, seen.box),
    ):
        _draw(ax, image, name, region)
        if box is not None:
            x, y, w, h = box
            ax.add_patch(
                Rectangle((x, y), w, h, fill=False, color=MARK, linewidth=1.5, path_effects=RIM)
            )
    return figure


def level2_figure(result: Result, points: Sequence[tuple[float, float]] | None = None) -> Figure:
    """Level 2: where in the reconstruction some patches of the original look, per head and mean.

    Args:
      result: with intermediates.
      points: (x, y); the patches that hold them ask. By default those of the object's hidden
        part, or where the masks that tell it are missing, the centre of its box, or of the
        image.

    Raises:
      DataError: if a point lies outside of the square.
    """
    seen = _seen(result)
    size = seen.alpha_HW.shape
    heads, num_patches = seen.attention_NTS.shape[:2]
    if points is None and seen.occluded_HW is not None and seen.occluded_HW.any():
        cells, name = cells_of(seen.occluded_HW, num_patches), "queries: occluded part"
    else:
        if points is None:
            x, y, w, h = seen.box or seen.region
            points = [(x + w / 2, y + h / 2)]
        cells = cells_at(points, size, num_patches)
        name = "queries: 1 patch" if len(cells) == 1 else f"queries: {len(cells)} patches"
    rows_NS = seen.attention_NTS[:, cells].mean(axis=1)
    maps = [("mean of heads", rows_NS.mean(axis=0))]
    maps += [(f"head {i}", row_S) for i, row_S in enumerate(rows_NS)]
    figure, axes = _panels(1 + len(maps), title="Level 2: attention over the reconstruction")
    _draw(axes[0], seen.original_HWC, name)
    _outline(axes[0], np.isin(np.arange(num_patches), cells), size)
    limits = (0.0, float(rows_NS.max()))
    for ax, (title, row_S) in zip(axes[1:], maps, strict=True):
        image = _heat(ax, seen.aligned_HWC, row_S, title, "magma", limits)
    _scale(figure, image, axes, "attention weight")
    return figure


def answer_figure(result: Result, view: View = ALL) -> Figure:
    """Where the decoder looked for each token: the patches above, the codes below.

    Raises:
      ConfigError: if the decoder has no such layer or head.
      DataError: if there is no attention.
    """
    seen, attention = _seen(result), result.attention
    if attention is None:
        raise DataError("this result has no answer, so there is no attention behind one")
    over_TS = attention.over_images(view)
    tokens = [_quoted(token) for token in attention.tokens]
    columns = [("mean of tokens" if len(tokens) > 1 else tokens[0], over_TS.mean(axis=0))]
    if len(tokens) > 1:
        columns += list(zip(tokens, over_TS, strict=True))[:MOST_TOKENS]
    branches = [("understanding", seen.original_HWC, slice(0, attention.num_patches))]
    if over_TS.shape[1] > attention.num_patches:
        branches.append(("generation", seen.fused_HWC, slice(attention.num_patches, None)))
    more = (
        f" (the first {MOST_TOKENS} of {len(tokens)} tokens)" if len(tokens) > MOST_TOKENS else ""
    )
    title = f"{printable(result.query)}\n{printable(result.answer) or '(nothing)'}{more}"
    figure, axes = _panels(len(columns) * len(branches), title, len(columns), title_lines=2)
    limits = (0.0, float(max(row_S.max() for _, row_S in columns)))
    for line, (branch, shown, part) in enumerate(branches):
        for column, (token, row_S) in enumerate(columns):
            ax = axes[line * len(columns) + column]
            share = f"{branch} {row_S[part].sum():.0%}"
            heat = _heat(ax, shown, row_S[part], f"{token}\n{share}", "magma", limits)
    _scale(figure, heat, axes, f"attention ({view})")
    return figure


def codes_figure(result: Result) -> Figure:
    """Confidence of the completed image's code in every cell."""
    seen = _seen(result)
    if seen.code_probabilities_MC is None:
        raise DataError("this run has no codes, so there is no confidence in them")
    completed = result.completed
    shown = seen.fused_HWC if completed is None else _in_square(completed, seen)
    confidence_M = seen.code_probabilities_MC.max(axis=-1)
    figure, axes = _panels(2)
    _draw(axes[0], shown, "fused" if completed is None else "completed", seen.region)
    heat = _heat(axes[1], shown, confidence_M, f"mean {confidence_M.mean():.2f}", "cividis", (0, 1))
    _crop(axes[1], seen.region)
    for ax in axes:
        _outline(ax, seen.occluded_HW, seen.alpha_HW.shape)
    _scale(figure, heat, axes, "probability of the best code")
    return figure


def cells_of(mask_HW: np.ndarray, num_cells: int) -> np.ndarray:
    """Cells of a square grid, of which a mask covers at least half; else the most covered one."""
    side = math.isqrt(num_cells)
    H, W = mask_HW.shape
    share = mask_HW.reshape(side, H // side, side, W // side).mean(axis=(1, 3)).ravel()
    return np.flatnonzero(share >= min(0.5, share.max()))


def cells_at(
    points: Sequence[tuple[float, float]], size: tuple[int, int], num_cells: int
) -> np.ndarray:
    """Cells of a square grid over `size` (H, W) that hold some points (x, y), each cell once.

    Raises DataError if there are none, or for a point outside.
    """
    side, (H, W) = math.isqrt(num_cells), size
    outside = [p for p in points if not (0 <= p[0] < W and 0 <= p[1] < H)]
    if outside or not len(points):
        raise DataError(
            f"points={list(points)}: expected at least one (x, y) with 0 <= x < {W} and "
            f"0 <= y < {H}, in pixels of the model's square"
        )
    return np.unique([int(y * side / H) * side + int(x * side / W) for x, y in points])


def _seen(result: Result) -> Intermediates:
    if result.intermediates is None:
        raise DataError(
            "this result has no intermediates: ask for them with return_intermediates=True"
        )
    return result.intermediates


def _recon_name(result: Result) -> str:
    return {
        "given": "reconstruction",
        "own completion": "own completion\nas reconstruction",
        "none": "(no reconstruction:\nthe original again)",
    }[result.recon_source]


def _quoted(token: str) -> str:
    return token if token == END else f"“{printable(token.strip())}”"


def _panels(
    number: int,
    title: str = "",
    columns: int = MOST_COLUMNS,
    scale: bool = True,
    title_lines: int = 1,
) -> tuple[Figure, list[Axes]]:
    """A figure with room for square images, for titles over them and a scale beside them."""
    columns = min(columns, number)
    rows = -(-number // columns)
    width = PANEL * columns + (0.9 if scale else 0.0)
    lines = [line for text in title.splitlines() for line in textwrap.wrap(text, int(13 * width))]
    height = (PANEL + 0.12 + 0.18 * title_lines) * rows + 0.2 * len(lines)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for ax in axes:
        ax.set_axis_off()
    if title:
        figure.suptitle("\n".join(lines), fontsize=10, parse_math=False)
    return figure, axes[:number]


def _draw(ax: Axes, image: np.ndarray, title: str, region: Box | None = None) -> None:
    """An image of the square, or of a region of it."""
    H, W = image.shape[:2]
    ax.imshow(image, extent=(0, W, H, 0))
    ax.set_title(title, fontsize=9, parse_math=False)
    if region is not None:
        _crop(ax, region)


def _crop(ax: Axes, region: Box) -> None:
    x, y, w, h = region
    ax.set_xlim(x, x + w)
    ax.set_ylim(y + h, y)


def _heat(
    ax: Axes,
    image: np.ndarray,
    values: np.ndarray,
    title: str,
    colors: str,
    limits: tuple[float, float],
) -> AxesImage:
    """Values of pixels [H, W] or of the cells of a square grid [S], over the image in grey."""
    # Lighter than it is: what lies under a low value would be black on black.
    grey = 0.25 + 0.75 * image.mean(axis=-1, keepdims=True)
    _draw(ax, grey.repeat(3, axis=-1), title)
    if values.ndim == 1:
        values = values.reshape(math.isqrt(len(values)), -1)
    H, W = image.shape[:2]
    return ax.imshow(
        values,
        cmap=colors,
        vmin=limits[0],
        vmax=limits[1],
        alpha=0.55,
        extent=(0, W, H, 0),
        interpolation="nearest",
    )


def _outline(ax: Axes, mask: np.ndarray | None, size: tuple[int, int]) -> None:
    """The edge of a mask, of pixels [H, W] or of the cells of a square grid [S]."""
    if mask is None or not mask.any():
        return
    if mask.ndim == 1:
        side = math.isqrt(len(mask))
        mask = mask.reshape(side, side)
        mask = mask.repeat(size[0] // side, axis=0).repeat(size[1] // side, axis=1)
    # A rim of zeros closes the line at the image's edge.
    H, W = size
    ax.contour(
        np.arange(-1, W + 1) + 0.5,
        np.arange(-1, H + 1) + 0.5,
        np.pad(mask.astype(float), 1),
        levels=[0.5],
        colors=MARK,
        linewidths=1.5,
    ).set_path_effects(RIM)


def _scale(figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8, aspect=15, pad=0.02)
    bar.ax.set_facecolor("0.6")  # the maps lie over grey too
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _in_square(image: ImageLike, seen: Intermediates) -> np.ndarray:
    """An image of the original's frame, in [0, 1], at its place in the model's square."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    x, y, w, h = map(int, seen.region)
    square = Image.new("RGB", seen.alpha_HW.shape[::-1])
    square.paste(image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC), (x, y))
    return np.asarray(square) / 255
