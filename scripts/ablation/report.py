"""Tables and plots of `ablations.py`, from what its runs left in their folders.

    python scripts/ablation/report.py OUT

Figures are means over seeds. Of several seeds the interval is Student's 95 percent interval of the
mean over seeds; of one seed, for shares, that over scenes (Wilson's). Differences of
accuracy are paired: each scene's difference, averaged over seeds, in a paired t-test over scenes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablation.one_run import BUDGET, FULL, RESULT, STRESSES, VARIANTS
from scipy import stats

from htfa_jax.common.cli import command
from htfa_jax.evaluation.metrics import OCCLUSION_BUCKETS, calibration_error, is_right

TABLES, PLOTS = "RESULTS.md", "ablations.png"
LEVEL = 0.05  # below which an adjusted p is called significant
# Okabe and Ito's colours, which the colour-blind tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
NONE = "-"
# Variants that see one image.
SINGLE = ("original_only", "reconstruction_only")


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
      scores: {"test" or stress: scores of `htfa_jax.evaluate`}.
      right: {scene: whether category and colour are joint accuracy}, of the test split.
      confidences, rights: of every answer of the test split.
    """

    scores: dict[str, Any]
    right: dict[int, bool]
    confidences: list[float]
    rights: list[bool]


Runs = dict[str, dict[int, Run]]


def read(out: Path, variants: Sequence[str]) -> Runs:
    """The finished runs, by variant and seed; a variant without any is left out."""
    found: Runs = {}
    for variant in variants:
        for path in sorted((out / "runs" / variant).glob(f"seed_*/{RESULT}")):
            lines = (path.parent / "evaluation/test/predictions.jsonl").read_text("utf-8")
            answers = [json.loads(line) for line in lines.splitlines()]
            by_scene: dict[int, dict[str, bool]] = {}
            for a in answers:
                said = is_right(a["answer"], a["truth"])
                by_scene.setdefault(a["scene"], {})[a["kind"]] = said
            run = Run(
                scores=json.loads(path.read_text("utf-8")),
                right={
                    scene: kinds["category"] and kinds["color"]
                    for scene, kinds in by_scene.items()
                    if {"category", "color"} <= set(kinds)
                },
                confidences=[a["confidence"] for a in answers],
                rights=[is_right(a["answer"], a["truth"]) for a in answers],
            )
            found.setdefault(variant, {})[int(path.parent.name.removeprefix("seed_"))] = run
    return found


# What a run is measured by; None where it has no such thing.


def accuracy(kind: str, name: str = "accuracy", rows: str = "all", split: str = "test"):
    """A measure of one kind of question."""

    def measure(run: Run) -> float | None:
        kinds = run.scores[split].get("answers", {})
        return kinds.get(kind, {}).get(rows, {}).get(name)

    return measure


def image(name: str, region: str = "occluded", candidate: str = "completed", split: str = "test"):
    """A measure of one kind of image."""

    def measure(run: Run) -> float | None:
        regions = run.scores[split].get("images", {})
        return regions.get(region, {}).get(candidate, {}).get(name)

    return measure


def gap_closed(run: Run) -> float | None:
    """How far completion comes from the flat fill (0) to the VQ's round trip (1), in dB."""
    completed, flat, ceiling = (
        image("psnr", candidate=c)(run) for c in ("completed", "flat_fill", "vq_round_trip")
    )
    return None if completed is None else (completed - flat) / (ceiling - flat)


def above_flat(split: str):
    """PSNR of the occluded part above that of the flat fill of the same scenes."""

    def measure(run: Run) -> float | None:
        completed, flat = (
            image("psnr", candidate=c, split=split)(run) for c in ("completed", "flat_fill")
        )
        return None if completed is None else completed - flat

    return measure


def first_right(run: Run, scenes: int) -> float | None:
    """Both right, of the first scenes of the test split."""
    found = [right for scene, right in run.right.items() if scene < scenes]
    return float(np.mean(found)) if found else None


def calibration(run: Run) -> float | None:
    """Expected calibration error over all answers."""
    return calibration_error(run.confidences, run.rights) if run.rights else None


# What the full structure is compared in beside joint accuracy: a measure and its unit.
ALSO = {
    "occlusion ratio within 10, points": (accuracy("occlusion_ratio", "within_10_points"), 100.0),
    "PSNR occluded, dB": (image("psnr"), 1.0),
    "PSNR of all pixels, dB": (image("psnr", "all"), 1.0),
}


# Statistics.


def values(runs: dict[int, Run], measure) -> list[float]:
    """A measure of every seed that has it."""
    return [x for x in map(measure, runs.values()) if x is not None]


def seed_interval(numbers: Sequence[float]) -> float | None:
    """Half of Student's 95 percent interval of the mean; None of fewer than two numbers."""
    if len(numbers) < 2:
        return None
    return float(stats.t.ppf(0.975, len(numbers) - 1) * stats.sem(numbers))


def scene_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 percent interval of a share of so many scenes."""
    found = stats.binomtest(round(share * count), count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired difference of shares.

    Attributes:
      mean: of the first minus the second.
      low, high: 95 percent interval over scenes.
      p: of no difference.
    """

    mean: float
    low: float
    high: float
    p: float


def paired(first: dict[int, Run], second: dict[int, Run]) -> Difference | None:
    """Both right of one variant minus that of another, on the seeds and scenes that both have."""
    seeds = sorted(set(first) & set(second))
    scenes = [set(runs[s].right) for runs in (first, second) for s in seeds]
    shared = sorted(set.intersection(*scenes)) if scenes else []
    if not shared:
        return None
    a, b = (
        np.mean([[runs[s].right[i] for i in shared] for s in seeds], axis=0)
        for runs in (first, second)
    )
    if np.all(a == b):
        return Difference(0.0, 0.0, 0.0, 1.0)
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval()
    return Difference(float(np.mean(a - b)), float(interval.low), float(interval.high), test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: how probable the smallest of so many would be by chance, one by one."""
    order, adjusted, highest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = float(highest)
    return adjusted


# Tables.


def cell(runs: dict[int, Run], measure, form: str = ".3f", scenes: bool = False) -> str:
    """Mean and interval of a measure as text."""
    numbers = values(runs, measure)
    if not numbers:
        return NONE
    mean, half = float(np.mean(numbers)), seed_interval(numbers)
    if half is not None:
        return f"{mean:{form}} ± {half:{form.lstrip('+')}}"
    if scenes:
        low, high = scene_interval(mean, len(next(iter(runs.values())).right))
        return f"{mean:{form}} ({low:{form}} to {high:{form}})"
    return f"{mean:{form}}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main_table(runs: Runs) -> str:
    """What each variant reaches."""
    columns = {
        "category": (accuracy("category"), True),
        "colour": (accuracy("color"), True),
        "joint accuracy": (accuracy("joint"), True),
        "occlusion ratio within 10 points": (accuracy("occlusion_ratio", "within_10_points"), True),
        "calibration error": (calibration, False),
        "PSNR occluded": (image("psnr"), False),
        "SSIM occluded": (image("ssim"), False),
        "gap closed": (gap_closed, False),
    }
    forms = {"PSNR occluded": ".2f"}
    return markdown(
        ["variant", "seeds", *columns],
        [
            [v, str(len(r))] + [cell(r, m, forms.get(n, ".3f"), s) for n, (m, s) in columns.items()]
            for v, r in runs.items()
        ],
    )


def bucket_table(runs: Runs) -> str:
    """Both right by occlusion ratio."""
    names = [f"{100 * low:.0f}-{100 * high:.0f}%" for low, high in OCCLUSION_BUCKETS]
    rows = []
    for variant, found in runs.items():
        cells = [cell(found, accuracy("joint", rows=name)) for name in names]
        if cells[0] != NONE:
            rows.append([variant, *cells])
    return markdown(["joint accuracy where occluded", *names], rows)


def differences(runs: Runs) -> dict[str, tuple[Difference, float]]:
    """Both right of the full structure against every other variant: paired, with adjusted p."""
    found = {v: paired(runs.get(FULL, {}), r) for v, r in runs.items() if v != FULL}
    found = {v: d for v, d in found.items() if d is not None}
    adjusted = holm([d.p for d in found.values()])
    return {v: (d, p) for (v, d), p in zip(found.items(), adjusted, strict=True)}


def difference_table(runs: Runs) -> str:
    """The full structure against every other variant."""
    found, rows = differences(runs), []
    for variant in runs:
        row = [_signed(gains(runs, variant, *how)) for how in ALSO.values()]
        if variant in found:
            d, p = found[variant]
            verdict = "significant" if p < LEVEL else "not significant"
            rows.append([variant, _points(d), f"{p:.2g}", verdict, *row])
        elif variant != FULL and set(row) != {NONE}:
            rows.append([variant, NONE, NONE, NONE, *row])
    return markdown(
        ["full minus", "joint accuracy, points", "p (Holm)", f"at {LEVEL}", *ALSO], rows
    )


def _points(d: Difference) -> str:
    return f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})"


def gains(runs: Runs, variant: str, measure, unit: float) -> list[float]:
    """What the full structure is better by in a measure, of each seed that both have."""
    full, other = runs.get(FULL, {}), runs.get(variant, {})
    pairs = [(measure(full[s]), measure(other[s])) for s in sorted(set(full) & set(other))]
    return [unit * (a - b) for a, b in pairs if a is not None and b is not None]


def _signed(numbers: Sequence[float]) -> str:
    """Mean, and of several its interval."""
    if not numbers:
        return NONE
    half = seed_interval(numbers)
    return f"{np.mean(numbers):+.2f}" + (f" ± {half:.2f}" if half is not None else "")


def claims_table(runs: Runs) -> str:
    """What the levels are to be worth, and what was measured."""
    rows, found = [], differences(runs)

    def claim(text: str, other: str, least: float | None) -> None:
        if other not in found:
            return
        d, p = found[other]
        met = p < LEVEL and d.mean > 0 if least is None else d.mean >= least
        rows.append([text, _points(d), "met" if met else "missed"])

    both = {v: values(runs.get(v, {}), accuracy("joint")) for v in SINGLE}
    singles = [v for v in SINGLE if both[v]]
    if singles:
        best = max(singles, key=lambda v: np.mean(both[v]))
        claim(f"joint accuracy: 10 points above the better single image ({best})", best, 0.10)
    claim("joint accuracy: 3 points above concatenation", "concatenation", 0.03)
    claim("joint accuracy: Level 1 is worth something", "no_level1", None)
    claim("joint accuracy: Level 2's affine is worth something", "no_level2_affine", None)
    for level, other, name in (
        ("Level 1", "no_level1", "PSNR of all pixels, dB"),
        ("Level 2's affine", "no_level2_affine", "PSNR occluded, dB"),
        ("Level 2's affine", "no_level2_affine", "occlusion ratio within 10, points"),
    ):
        if gained := gains(runs, other, *ALSO[name]):
            half = seed_interval(gained)
            met = "one seed" if half is None else "met" if np.mean(gained) > half else "missed"
            rows.append([f"{name}: {level} is worth something", _signed(gained), met])
    closed = values(runs.get(FULL, {}), gap_closed)
    if closed:
        met = "met" if np.mean(closed) >= 0.5 else "missed"
        shown = cell(runs[FULL], gap_closed)
        rows.append(["occluded part: half of the way from flat fill to VQ round trip", shown, met])
    return markdown(["claim", "measured", ""], rows)


def inside_table(runs: Runs) -> str:
    """What the levels settled on."""
    names = ("alpha_mean", "alpha_std", "attention_entropy")
    rows = [
        [v, *(cell(r, lambda run, n=n: run.scores["test"]["fusion"].get(n)) for n in names)]
        for v, r in runs.items()
    ]
    head = ["variant", "alpha, mean", "alpha, deviation", "entropy of Level 2's attention, nats"]
    return markdown(head, [row for row in rows if set(row[1:]) != {NONE}])


def stress_table(runs: Runs, scenes: int) -> str:
    """What a wrong reconstruction does, on the same first scenes of the test split."""
    head, rows = ["joint accuracy", "right reconstruction"], []
    for variant, found in runs.items():
        cells = [cell(found, lambda run: first_right(run, scenes))]
        cells += [cell(found, accuracy("joint", split=stress)) for stress in STRESSES]
        if cells[0] != NONE:
            rows.append([variant, *cells])
    return markdown([*head, *(stress.replace("_", " ") for stress in STRESSES)], rows)


def stress_image_table(runs: Runs) -> str:
    """The same for what is completed."""
    splits = ("test", *STRESSES)
    rows = [[v, *(cell(r, above_flat(s), "+.2f") for s in splits)] for v, r in runs.items()]
    names = ("right reconstruction", *(stress.replace("_", " ") for stress in STRESSES))
    head = ["PSNR occluded above flat fill, dB", *names]
    return markdown(head, [row for row in rows if row[1] != NONE])


def reference_table(runs: Runs) -> str:
    """What no model makes: the same for all variants whose reconstruction is aligned."""
    first = next((r for r in (runs.get(FULL), *runs.values()) if r and values(r, gap_closed)), None)
    if first is None:
        return "No variant completes images."
    names = {
        "original": "the original as it is",
        "aligned_reconstruction": "the aligned reconstruction",
        "flat_fill": "occluder region filled with the mean colour",
        "vq_round_trip": "VQ round trip of the target",
    }
    regions = ("all", "occluder", "occluded")
    rows = [
        [text]
        + [
            f"{values(first, image('psnr', r, c))[0]:.2f} "
            f"({values(first, image('ssim', r, c))[0]:.3f})"
            for r in regions
        ]
        for c, text in names.items()
    ]
    return markdown(["PSNR in dB (SSIM)", *regions], rows)


def plot(runs: Runs, scenes: int, path: Path) -> None:
    """Four panels: joint accuracy, by occlusion ratio, completion, wrong reconstructions."""
    # Not pyplot: it would choose a display and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 0.35 * len(runs) + 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _bars(axes[0][0], runs, accuracy("joint"), "category and colour joint accuracy", True)
    ax = axes[0][1]
    names = [f"{100 * low:.0f}-{100 * high:.0f}%" for low, high in OCCLUSION_BUCKETS]
    marks = zip(runs.items(), [c for c in COLORS for _ in range(2)], strict=False)
    for i, ((variant, found), color) in enumerate(marks):
        means = [np.mean(values(found, accuracy("joint", rows=n)) or np.nan) for n in names]
        style = "-" if i % 2 == 0 else "--"
        ax.plot(names, means, style, marker="os^Dv<>"[i % 7], color=color, label=variant)
    ax.set_title("joint accuracy, by occlusion ratio")
    _legend(ax)
    ax = axes[1][0]
    _bars(ax, runs, image("psnr"), "PSNR of the occluded part, dB")
    for candidate, style in (("flat_fill", ":"), ("vq_round_trip", "--")):
        found = [x for r in runs.values() for x in values(r, image("psnr", candidate=candidate))]
        if found:
            ax.axvline(found[0], color="0.3", ls=style, label=candidate.replace("_", " "))
            _legend(ax)
    ax = axes[1][1]
    measures = {"right": lambda run: first_right(run, scenes)}
    measures |= {stress: accuracy("joint", split=stress) for stress in STRESSES}
    for k, (name, measure) in enumerate(measures.items()):
        found = [values(r, measure) for r in runs.values()]
        means = [float(np.mean(x)) if x else 0.0 for x in found]
        label = name.replace("_", " ")
        ax.barh(np.arange(len(runs)) + 0.2 * k, means, 0.2, color=COLORS[k], label=label)
    ax.set_yticks(np.arange(len(runs)) + 0.3, list(runs))
    ax.invert_yaxis()
    ax.set_title(f"joint accuracy of {scenes} scenes, by reconstruction")
    _legend(ax)
    figure.savefig(path, format="png", dpi=110)


def _bars(ax: Any, runs: Runs, measure, title: str, scenes: bool = False) -> None:
    """Means, intervals over seeds (of a share and one seed, over scenes); each seed a dot."""
    for i, found in enumerate(runs.values()):
        numbers = values(found, measure)
        if not numbers:
            continue
        mean = float(np.mean(numbers))
        error = seed_interval(numbers)
        if error is None and scenes:
            low, high = scene_interval(mean, len(next(iter(found.values())).right))
            error = [[mean - low], [high - mean]]
        ax.barh(i, mean, xerr=error, color=COLORS[0], alpha=0.6, capsize=3)
        ax.plot(numbers, [i] * len(numbers), "o", color=COLORS[7], ms=3)
    ax.set_yticks(range(len(runs)), list(runs))
    ax.invert_yaxis()
    ax.set_title(title)


def _legend(ax: Any) -> None:
    """Below the panel, where it hides nothing."""
    ax.legend(fontsize=7, ncol=5, loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False)


def write(out: Path, variants: Sequence[str], budget: dict[str, Any]) -> None:
    """Writes tables and plots of what is finished."""
    runs = read(out, variants)
    if not runs:
        (out / TABLES).write_text("No run is finished.\n", encoding="utf-8")
        return
    steps = budget["steps"] or "all"
    blocks = [
        f"`{budget['base']}` structure, {steps} steps of each run, "
        f"{budget['stress_scenes']} scenes with each wrong reconstruction.",
        __doc__.split("\n\n")[-1].strip().replace("\n", " "),
        main_table(runs),
        bucket_table(runs),
        difference_table(runs),
        claims_table(runs),
        inside_table(runs),
        stress_table(runs, budget["stress_scenes"]),
        stress_image_table(runs),
        reference_table(runs),
    ]
    (out / TABLES).write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    plot(runs, budget["stress_scenes"], out / PLOTS)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    (out,) = argv
    budget = json.loads((Path(out) / BUDGET).read_text(encoding="utf-8"))
    write(Path(out), tuple(VARIANTS), budget)
    print((Path(out) / TABLES).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
