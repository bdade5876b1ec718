"""Pieces of HTML for the page; everything is inside of them, nothing is loaded."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from html import escape

from PIL import Image

from htfa_jax.data.decode import decoded
from htfa_jax.data.records import Record
from htfa_jax.evaluation.look_inside import (
    alignment_figure,
    alpha_figure,
    codes_figure,
    level2_figure,
    png,
)
from htfa_jax.evaluation.report_html import CAPTIONS, data_uri
from htfa_jax.inference.results import Result

# On the page no image is wider; the download has its own size.
WIDEST = 1024
# The longer side of the image that can be clicked.
ASKED = 640
# Matplotlib's figures share caches of fonts and texts.
drawing = threading.Lock()


def compare(before: Image.Image, after: Image.Image) -> str:
    """Two images of one frame, the second one right of a divider that mouse and keys move."""
    return (
        '<div class="compare" style="--at: 50%">'
        f'<img src="{_data_uri(before)}" alt="the original">'
        f'<img class="after" src="{_data_uri(after)}" alt="the completed image">'
        '<div class="divider" aria-hidden="true"></div>'
        '<span class="tag left" aria-hidden="true">original</span>'
        '<span class="tag right" aria-hidden="true">completed</span>'
        '<input type="range" min="0" max="100" value="50" '
        'aria-label="divider between the original and the completed image" '
        "oninput=\"this.parentElement.style.setProperty('--at', this.value + '%')\"></div>"
    )


def thumbnails(examples: Sequence[Record]) -> str:
    """CSS that shows every example above the name on its button."""
    rules = []
    for i, record in enumerate(examples):
        source = _data_uri(decoded(record.image_orig), widest=112)
        rules.append(f'#example-{i}::before {{ background-image: url("{source}"); }}')
    return "\n".join(rules)


def enlarged(image: Image.Image) -> Image.Image:
    """An image as large as it is shown: Gradio finds the place of a click only then."""
    return image.resize(size_shown(image))


def size_shown(image: Image.Image) -> tuple[int, int]:
    """How large the image is that can be clicked."""
    scale = ASKED / max(image.size)
    width, height = (max(1, round(n * scale)) for n in image.size)
    return width, height


def placeholder(sentence: str) -> str:
    """Where something will be."""
    return f'<div class="placeholder"><p>{escape(sentence)}</p></div>'


def facts(result: Result) -> str:
    """How the pair was read, in a line."""
    items = [f"aligned by {result.alignment}", f"reconstruction: {result.recon_source}"]
    seen = result.intermediates
    items.append(f"alpha {seen.alpha_HW.mean():.2f} on average")
    if seen.code_probabilities_MC is not None:
        confidence = seen.code_probabilities_MC.max(axis=-1).mean()
        items.append(f"completed with confidence {confidence:.2f}")
    return '<p class="facts" role="status">' + " · ".join(map(escape, items)) + "</p>"


def attention(result: Result, point: tuple[float, float] | None) -> str:
    """Level 2's attention from a point of the original.

    Args:
      result: with intermediates.
      point: in parts of the original's sides; None for the occluded part of the object.
    """
    points = None
    if point is not None:
        (x, y, w, h), (across, down) = result.intermediates.region, point
        # The last pixel still lies inside.
        points = [(x + min(across * w, w - 1e-3), y + min(down * h, h - 1e-3))]
    with drawing:
        drawn = png(level2_figure(result, points))
    return _figure(drawn, "level2", "Level 2's attention over the aligned reconstruction")


def inside(result: Result) -> str:
    """Alpha, alignment and the confidence of the codes."""
    with drawing:
        drawn = {"alpha": png(alpha_figure(result)), "alignment": png(alignment_figure(result))}
        if result.intermediates.code_probabilities_MC is not None:
            drawn["codes"] = png(codes_figure(result))
    names = {
        "alpha": "Alpha: the weight of the original",
        "alignment": "The reconstruction, aligned",
        "codes": "Confidence of every token of the completed image",
    }
    return "".join(_figure(content, kind, names[kind]) for kind, content in drawn.items())


def said(text: str, confidence: float | None) -> str:
    """An answer for the chat: the model's words are text, not mark-up."""
    if confidence is None:
        return escape(text)
    return f'{escape(text)}<br><span class="confidence">confidence {confidence:.2f}</span>'


def _figure(content: bytes, kind: str, name: str) -> str:
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        source = _data_uri(image.convert("RGB"), widest=4096)
    return (
        f'<figure class="inside"><div class="scroll" tabindex="0" role="group" '
        f'aria-label="{escape(name)}"><img src="{source}" alt="{escape(name)}"></div>'
        f"<figcaption>{escape(CAPTIONS[kind])}</figcaption></figure>"
    )


def _data_uri(image: Image.Image, widest: int = WIDEST) -> str:
    """An image inside of its address."""
    if max(image.size) > widest:
        image = image.copy()
        image.thumbnail((widest, widest))
    return data_uri(image, 90)
