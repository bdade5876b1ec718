"""One page about a batch: `predictions.jsonl` and its pictures as a file that needs no network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from htfa_jax.common.files import whole_file

PREDICTIONS, REPORT = "predictions.jsonl", "report.html"

CAPTIONS = {
    "pictures": "What the model was given, and what it made of it.",
    "alpha": "Level 1: how much of every pixel comes from the original. "
    "Outlined: the hidden part of the object, where masks tell it.",
    "alignment": "The object's boxes, and the reconstruction moved from one to the other. "
    "Grey lies beyond its rim.",
    "level2": "Level 2: the outlined patches of the original ask, those of the aligned "
    "reconstruction answer.",
    "codes": "How sure the model is of the completed picture, cell by cell.",
    "answer": "Where the decoder looked when it chose each word: at the patches of the "
    "understanding branch, and at the codes of the generation branch. Each percentage is the "
    "share of a branch; the rest went to words.",
    "completed": "The completed picture.",
}

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80; } }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin: 0; }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; vertical-align: top; }
figure { margin: 1rem 0; }
figcaption { font-size: .9rem; opacity: .8; max-width: 45rem; }
img { display: block; height: auto; max-width: max(100%, 38rem); background: white;
  border-radius: 4px; }
.error { color: var(--bad); }
"""


def write_report(folder: Path, title: str) -> Path:
    """Writes report.html about the predictions in a folder, whole or not at all.

    Args:
      folder: of predictions.jsonl and the pictures that its lines name.
      title: of the page.
    """
    with (folder / PREDICTIONS).open(encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    path = folder / REPORT
    with whole_file(path) as file:
        file.writelines(page(folder, title, entries))
    return path


def page(folder: Path, title: str, entries: list[Mapping[str, Any]]) -> Iterator[str]:
    """The page, piece by piece: all pictures together may be large."""
    failed = sum("error" in entry for entry in entries)
    count = f"{len(entries)} pair" + ("s" if len(entries) != 1 else "")
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{count}{f', {failed} failed' if failed else ''}</p>\n"
    )
    if len(entries) > 1:
        yield _table(
            ("pair", "answers"),
            (
                (f'<a href="#pair-{i}">{escape(str(entry["id"]))}</a>', _summary(entry))
                for i, entry in enumerate(entries)
            ),
        )
    for i, entry in enumerate(entries):
        yield f'<section id="pair-{i}">\n<h2>{escape(str(entry["id"]))}</h2>\n'
        yield _error(entry) if "error" in entry else _findings(entry)
        yield from _figures(folder, entry)
        yield "</section>\n"
    yield "</body>\n</html>\n"


def _summary(entry: Mapping[str, Any]) -> str:
    if "error" in entry:
        return '<span class="error">failed</span>'
    return escape(" · ".join(a["answer"] or "(nothing)" for a in entry["answers"]))


def _error(entry: Mapping[str, Any]) -> str:
    return f'<p class="error">{escape(entry["error"])}</p>\n'


def _findings(entry: Mapping[str, Any]) -> str:
    rows = []
    for said in entry["answers"]:
        sure = said["confidence"]
        confidence = "" if sure is None else f"{sure:.2f}"
        rows.append((escape(said["query"]), escape(said["answer"]) or "(nothing)", confidence))
    facts = f"aligned by {entry['alignment']}; reconstruction: {entry['reconstruction']}"
    return _table(("question", "answer", "confidence"), rows) + f"<p>{escape(facts)}</p>\n"


def _table(names: tuple[str, ...], rows: Any) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def _figures(folder: Path, entry: Mapping[str, Any]) -> Iterator[str]:
    pictures = entry.get("figures")
    if pictures is None:
        pictures = {"completed": entry["completed"]} if "completed" in entry else {}
    for name, path in pictures.items():
        kind = name.partition("_")[0]
        if not (folder / path).is_file():
            yield f"<p>{escape(path)} is not there any more.</p>\n"
            continue
        alt = escape(f"{kind}, {entry['id']}", quote=True)
        yield (
            f'<figure>\n<div class="scroll"><img loading="lazy" alt="{alt}" '
            f'src="{_picture(folder / path)}"></div>\n'
            f"<figcaption>{escape(CAPTIONS[kind])}</figcaption>\n</figure>\n"
        )


def _picture(path: Path) -> str:
    with Image.open(path) as image:
        return data_uri(image.convert("RGB"), 88)


def data_uri(picture: Image.Image, quality: int) -> str:
    """A picture inside of its address, as WebP: a page of PNGs would be five times as large.

    Args:
      picture: RGB.
      quality: as Pillow counts it, up to 100.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
