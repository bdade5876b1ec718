"""An evaluation as text, as files, and as numbers for a log."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htfa_jax.common.files import whole_file, write_whole
from htfa_jax.evaluation.image_metrics import REGIONS
from htfa_jax.evaluation.panel import panel_png

if TYPE_CHECKING:
    from htfa_jax.evaluation.evaluator import Report


def score_table(scores: dict[str, Any]) -> str:
    """The scores as text tables."""
    blocks = [_losses(scores)]
    if "answers" in scores:
        blocks.append(_answers(scores["answers"]))
    if "images" in scores:
        blocks.append(_images(scores["images"]))
    aligned = {name: n for name, n in scores["alignment"].items() if n}
    blocks.append("aligned by " + ", ".join(f"{name}: {n}" for name, n in aligned.items()))
    alpha = scores["fusion"].get("alpha_mean")
    if alpha is not None:
        blocks[-1] += f"; alpha {alpha:.3f} on average (1: the fused image is the original)"
    return "\n\n".join(blocks)


def _losses(scores: dict[str, Any]) -> str:
    losses = "  ".join(f"{name} {value:.4f}" for name, value in scores["losses"].items())
    return f"{scores['samples']} scenes  {losses}"


def _answers(kinds: dict[str, dict[str, dict[str, float]]]) -> str:
    buckets = list(dict.fromkeys(bucket for rows in kinds.values() for bucket in rows))
    lines = [["accuracy by occlusion ratio", *buckets]]
    for kind, rows in kinds.items():
        lines.append([kind, *(_cell(rows, b, "accuracy") for b in buckets)])
        if "mean_absolute_error" in rows["all"]:
            lines.append(
                ["  within 10 points", *(_cell(rows, b, "within_10_points") for b in buckets)]
            )
            lines.append(
                [
                    "  mean absolute error (points)",
                    *(_cell(rows, b, "mean_absolute_error", ".1f") for b in buckets),
                ]
            )
    first = next(iter(kinds.values()))
    lines.append(["scenes", *(_cell(first, b, "count", ".0f") for b in buckets)])
    return columns(lines)


def _cell(rows: dict[str, dict[str, float]], bucket: str, name: str, form: str = ".3f") -> str:
    return format(rows[bucket][name], form) if bucket in rows else "-"


def _images(regions: dict[str, dict[str, dict[str, float]]]) -> str:
    present = [region for region in REGIONS if region in regions]
    titles = {"all": "all pixels", "occluder": "occluder region", "occluded": "occluded region"}
    lines = [["PSNR in dB (SSIM)", *(titles[r] for r in present)]]
    for name in regions[present[0]]:
        cells = (regions[r][name] for r in present)
        lines.append(
            [name.replace("_", " "), *(f"{c['psnr']:.2f} ({c['ssim']:.3f})" for c in cells)]
        )
    return columns(lines)


def columns(lines: list[list[str]]) -> str:
    """Cells as text; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def scalars(scores: dict[str, Any]) -> dict[str, float]:
    """The main numbers by short names, such as `loss`, `accuracy/color`, `psnr/occluded`."""
    flat = dict(scores["losses"]) | scores["fusion"]
    for kind, rows in scores.get("answers", {}).items():
        flat[f"accuracy/{kind}"] = rows["all"]["accuracy"]
    for region, candidates in scores.get("images", {}).items():
        flat[f"psnr/{region}"] = candidates["completed"]["psnr"]
        flat[f"ssim/{region}"] = candidates["completed"]["ssim"]
    return flat


def write(result: Report, folder: Path) -> None:
    """Writes metrics.json, table.txt, predictions.jsonl and panel.png, each whole.

    A link of that name is replaced, not followed: the folder may be in somebody else's run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "metrics.json", json.dumps(result.scores, indent=2) + "\n")
    write_whole(folder / "table.txt", score_table(result.scores) + "\n")
    _write_lines(folder / "predictions.jsonl", map(dataclasses.asdict, result.answers))
    if result.panel:
        write_whole(folder / "panel.png", panel_png(result.panel))
    else:
        (folder / "panel.png").unlink(missing_ok=True)  # of another evaluation


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with whole_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
