import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from htfa_jax.evaluation.metrics import Prediction, is_right, percent, psnr, score_answers, ssim_map
from htfa_jax.models.registration import to_8bit


def pair():
    rng = np.random.default_rng(0)
    a = rng.random((2, 40, 36, 3))
    a = np.cumsum(a, axis=1) / np.arange(1, 41)[None, :, None, None]
    b = np.clip(a + 0.1 * rng.standard_normal(a.shape), 0, 1)
    return np.array(to_8bit(a)), np.array(to_8bit(b))


def test_ssim_agrees_with_scikit_image():
    a, b = pair()
    ours = np.asarray(ssim_map(a, b))
    for i in range(2):
        _, full = structural_similarity(
            a[i],
            b[i],
            full=True,
            data_range=255,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            win_size=11,
        )
        np.testing.assert_allclose(ours[i], full.mean(axis=-1), atol=2e-4)


def test_psnr_agrees_with_scikit_image():
    a, b = pair()
    expected = peak_signal_noise_ratio(a, b, data_range=255)
    assert psnr(float(np.mean((a - b) ** 2))) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "answer,truth,right",
    [
        ("Bottle.", "bottle", True),
        (" the object is red ", "The object is red.", True),
        ("bottle", "bottles", False),
        ("", "yes", False),
    ],
)
def test_exact_match(answer, truth, right):
    assert is_right(answer, truth) == right


def test_percentages_are_found_in_sentences():
    assert percent("About 40 percent of the object is hidden.") == 40
    assert percent("12.5%") == 12.5
    assert percent("forty") is None


def answers(kind, pairs, hidden=None):
    hidden = hidden or [0.5] * len(pairs)
    return [
        Prediction(i, kind, "?", said, truth, h)
        for i, ((said, truth), h) in enumerate(zip(pairs, hidden, strict=True))
    ]


def test_scores_by_kind_and_bucket():
    table = score_answers(
        answers("category", [("cup", "cup"), ("can", "cup"), ("cup", "cup")], [0.1, 0.3, 1.0])
        + answers("color", [("red", "red"), ("red", "red"), ("red", "blue")], [0.1, 0.3, 1.0])
        + answers(
            "occlusion_ratio",
            [("30 percent", "40 percent"), ("many", "20 percent"), ("90 percent", "50 percent")],
            [0.1, 0.3, 1.0],
        )
    )
    assert table["category"]["all"]["accuracy"] == pytest.approx(2 / 3)
    assert table["joint"]["all"]["accuracy"] == pytest.approx(1 / 3)
    assert set(table["category"]) == {"all", "0-25%", "25-50%", "75-100%"}
    assert table["category"]["25-50%"] == {"count": 1, "accuracy": 0.0}
    share = table["occlusion_ratio"]["all"]
    assert share["mean_absolute_error"] == pytest.approx((10 + 100 + 40) / 3)
    assert share["within_10_points"] == pytest.approx(1 / 3)
    assert "mean_absolute_error" not in table["category"]["all"]


def test_bucket_borders_belong_to_the_upper_bucket():
    table = score_answers(answers("category", [("a", "a")] * 4, [0.0, 0.25, 0.75, None]))
    counts = {bucket: row["count"] for bucket, row in table["category"].items()}
    assert counts == {"all": 4, "0-25%": 1, "25-50%": 1, "75-100%": 1}
