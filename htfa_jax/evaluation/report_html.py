"""One page about a batch: `predictions.jsonl` and its images as a file that needs no network."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from htfa_jax.common.files import whole_file
from htfa_jax.common.json_files import read_json_lines
from htfa_jax.common.names import inside
from htfa_jax.data.decode import decoded
from htfa_jax.errors import DataError

PREDICTIONS, REPORT, TEMPLATE = "predictions.jsonl", "report.html", "report.html.jinja"

CAPTIONS = {
    "images": "What the model was given, and what it made of it.",
    "alpha": "Level 1: how much of every pixel comes from the original. "
    "Outlined: the occluded part of the object, where masks tell it.",
    "alignment": "The object's boxes, and the reconstruction moved from one to the other. "
    "Grey lies beyond its rim.",
    "level2": "Level 2: the outlined patches of the original are the queries, those of the aligned "
    "reconstruction the keys.",
    "codes": "Confidence of the completed image, cell by cell.",
    "answer": "Where the decoder looked when it chose each token: at the patches of the "
    "understanding branch, and at the codes of the generation branch. Each percentage is the "
    "share of a branch; the rest went to text tokens.",
    "completed": "The completed image.",
}


def write_report(folder: Path, title: str) -> Path:
    """Writes report.html about the predictions in a folder, whole or not at all.

    Args:
      folder: of predictions.jsonl and the images that its lines name.
      title: of the page.

    Raises DataError if there are no predictions, or if a line of them is damaged.
    """
    entries = list(read_json_lines(folder / PREDICTIONS, DataError, allow_nan=True))
    for number, entry in enumerate(entries):
        _check(entry, f"{folder / PREDICTIONS}, prediction {number}")
    path = folder / REPORT
    with whole_file(path) as file:
        file.writelines(page(folder, title, entries))
    return path


def page(folder: Path, title: str, entries: list[Mapping[str, Any]]) -> Iterator[str]:
    """The page, piece by piece: all images together may be large.

    What a prediction says is text to the template, which escapes it.
    """
    template = _template()
    return template.generate(title=title, entries=entries, figures=lambda e: _figures(folder, e))


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # not by --help

    environment = Environment(
        loader=PackageLoader("htfa_jax.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE)


def _check(entry: Mapping[str, Any], where: str) -> None:
    """Raises DataError that names the field of a prediction that is not as `infer` writes it."""

    def refuse(field: str, expected: str) -> DataError:
        return DataError(f"{where}: {field} must be {expected}; run `infer` again")

    texts = ["id", "error"] if "error" in entry else ["id", "alignment", "reconstruction"]
    for field in [*texts, *(["completed"] if "completed" in entry else [])]:
        if not isinstance(entry.get(field), str):
            raise refuse(field, "a text")
    answers = entry.get("answers", [] if "error" in entry else None)
    if not isinstance(answers, list) or not all(map(_is_answer, answers)):
        raise refuse("answers", "a list of objects with query, answer and confidence")
    figures = entry.get("figures")
    if figures is not None and not (
        isinstance(figures, dict) and all(isinstance(path, str) for path in figures.values())
    ):
        raise refuse("figures", "an object of paths")


def _is_answer(said: Any) -> bool:
    return (
        isinstance(said, dict)
        and isinstance(said.get("query"), str)
        and isinstance(said.get("answer"), str)
        and "confidence" in said
        and _is_confidence(said["confidence"])
    )


def _is_confidence(value: Any) -> bool:
    # A whole number of many digits cannot be printed as a fraction.
    return isinstance(value, float | None) or (isinstance(value, int) and abs(value) < 2**53)


def _figures(folder: Path, entry: Mapping[str, Any]) -> Iterator[dict[str, str | None]]:
    """What a pair shows; no source where a file is gone. Each is read when it is asked for.

    Raises DataError for a name that is none of a file in the folder.
    """
    images = entry.get("figures")
    if images is None:
        images = {"completed": entry["completed"]} if "completed" in entry else {}
    for name, path in images.items():
        kind = name.partition("_")[0]
        if kind not in CAPTIONS:
            raise _damaged(folder, entry, f"{name!r:.80} is no figure that is drawn here")
        try:
            place = inside(folder, path, str(folder))
            source = data_uri(decoded(place), 88) if place.is_file() else None
        except (OSError, ValueError, DataError) as error:
            raise _damaged(folder, entry, f"{path!r:.80} {error!s:.200}") from error
        yield {"kind": kind, "path": path, "source": source, "caption": CAPTIONS[kind]}


def _damaged(folder: Path, entry: Mapping[str, Any], reason: str) -> DataError:
    return DataError(
        f"{folder / PREDICTIONS}, id {entry['id']:.80}: {reason}. Delete the line, and it is made "
        "again"
    )


def data_uri(image: Image.Image, quality: int) -> str:
    """An image inside of its address, as WebP: a page of PNGs would be five times as large.

    Args:
      image: RGB.
      quality: as Pillow counts it, up to 100.
    """
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
