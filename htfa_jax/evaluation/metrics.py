"""Metrics of answers and of images."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

OCCLUSION_BUCKETS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*(?:percent|%)")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One question of one scene, answered.

    Attributes:
      scene: number of the record.
      kind: sort of question.
      question, answer, truth: texts; no truth outside an evaluation.
      occlusion: occlusion ratio of the object in [0, 1], None if unknown.
      confidence: that the model says it has, in [0, 1]; None if unknown.
    """

    scene: int
    kind: str
    question: str
    answer: str
    truth: str | None
    occlusion: float | None
    confidence: float | None = None


def is_right(answer: str, truth: str) -> bool:
    """Exact match, but for case, outer white space and a final full stop."""
    clean = [text.strip().rstrip(".").strip().lower() for text in (answer, truth)]
    return clean[0] == clean[1]


def percent(text: str) -> float | None:
    """The first percentage in a text, if there is one."""
    match = PERCENT.search(text)
    return float(match[1]) if match else None


def calibration_error(
    confidences: Sequence[float], rights: Sequence[bool], num_bins: int = 10
) -> float:
    """Expected calibration error: how far confidence is from accuracy, over bins of confidence.

    Guo et al., "On Calibration of Modern Neural Networks" (2017): bins of equal width, each with
    the share of the answers in it as its weight. Not a number if a confidence is none, as of
    weights that are not finite.
    """
    confidence, right = np.asarray(confidences, np.float64), np.asarray(rights, np.float64)
    if not np.isfinite(confidence).all():
        return math.nan
    bin_ = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bin_, confidence - right, num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def score_kind(answers: list[Prediction]) -> dict[str, float]:
    """Accuracy of the answers to one kind of question.

    With confidences, also their calibration error. Where every truth is a percentage, also the
    mean absolute error in points (an answer without a number counts as 100 off) and the share
    within 10 points.
    """
    rights = [is_right(a.answer, a.truth) for a in answers]
    scores = {"count": len(answers), "accuracy": float(np.mean(rights))}
    confidences = [a.confidence for a in answers]
    if None not in confidences:
        scores["calibration_error"] = calibration_error(confidences, rights)
    truths = [percent(a.truth) for a in answers]
    if None not in truths:
        said = [percent(a.answer) for a in answers]
        errors = [
            100.0 if s is None else min(abs(s - t), 100.0)
            for s, t in zip(said, truths, strict=True)
        ]
        scores["mean_absolute_error"] = float(np.mean(errors))
        scores["within_10_points"] = float(np.mean([e <= 10.0 for e in errors]))
    return scores


def score_answers(answers: Iterable[Prediction]) -> dict[str, dict[str, dict[str, float]]]:
    """{kind: {"all" or bucket: scores}}, "joint" beside the kinds.

    "joint" counts scenes whose category and colour are joint accuracy: neither image alone
    shows both.
    """
    kinds: dict[str, list[Prediction]] = {}
    for answer in answers:
        kinds.setdefault(answer.kind, []).append(answer)
    table = {kind: _by_bucket(group) for kind, group in kinds.items()}
    colors = {a.scene: a for a in kinds.get("color", [])}
    both = [
        dataclasses.replace(
            a,
            kind="joint",
            answer=f"{a.answer}, {colors[a.scene].answer}",
            truth=f"{a.truth}, {colors[a.scene].truth}",
            confidence=_product(a.confidence, colors[a.scene].confidence),
        )
        for a in kinds.get("category", [])
        if a.scene in colors
    ]
    if both:
        table["joint"] = _by_bucket(both)
    return table


def _product(a: float | None, b: float | None) -> float | None:
    """Confidence that two answers are joint accuracy."""
    return None if a is None or b is None else a * b


def _by_bucket(answers: list[Prediction]) -> dict[str, dict[str, float]]:
    rows = {"all": score_kind(answers)}
    for low, high in OCCLUSION_BUCKETS:
        inside = [
            a
            for a in answers
            if a.occlusion is not None
            and low <= a.occlusion
            and (a.occlusion < high or high == 1.0)
        ]
        if inside:
            rows[f"{100 * low:.0f}-{100 * high:.0f}%"] = score_kind(inside)
    return rows


def squared_error(a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
    """Mean over the channels of the squared difference [B, H, W]."""
    return jnp.mean((a_BHWC - b_BHWC) ** 2, axis=-1)


def psnr(mean_squared_error: float, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(10 * np.log10(peak**2 / max(mean_squared_error, 1e-10)))


def _gaussian_blur(length: int, sigma: float = 1.5, reach: int = 5) -> jax.Array:
    """The matrix [length, length] that blurs a line of pixels, mirrored at its ends."""
    window = jnp.exp(-(jnp.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    mirrored = jnp.pad(jnp.eye(length), [(reach, reach), (0, 0)], mode="symmetric")
    return sum(w * mirrored[i : i + length] for i, w in enumerate(window / window.sum()))


def ssim_map(a_BHWC: jax.Array, b_BHWC: jax.Array, peak: float = 255.0) -> jax.Array:
    """Structural similarity around each pixel [B, H, W], mean over the channels.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity"
    (2004): Gaussian window of sigma 1.5, 11 pixels wide; borders are mirrored.
    """
    _, H, W, _ = a_BHWC.shape
    rows_TH, columns_SW = _gaussian_blur(H), _gaussian_blur(W)

    def blur(x: jax.Array) -> jax.Array:
        # Of sums of shifted images XLA makes one loop on a GPU, which takes it minutes.
        x = jnp.einsum("TH,BHWC->BTWC", rows_TH, x, precision="highest")
        return jnp.einsum("SW,BTWC->BTSC", columns_SW, x, precision="highest")

    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_a, mean_b = blur(a_BHWC), blur(b_BHWC)
    var_a = blur(a_BHWC**2) - mean_a**2
    var_b = blur(b_BHWC**2) - mean_b**2
    covariance = blur(a_BHWC * b_BHWC) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(axis=-1)
