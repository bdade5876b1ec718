"""The ablation script: its statistics against closed forms, its variants, and all of it, tiny."""

import dataclasses
import json
import math
import subprocess

import ablations
import jax
import numpy as np
import pytest
from ablation import one_run, report
from ablation.report import Run, holm, paired, scene_interval, seed_interval
from scipy import stats
from support import random_batch, random_weights, tiny

from htfa_jax.config import override
from htfa_jax.errors import ConfigError
from htfa_jax.evaluation.metrics import calibration_error
from htfa_jax.inference.generate import read_images
from htfa_jax.models.factory import build_model
from htfa_jax.models.losses import count, loss_and_metrics


def run_of(right):
    """A run that answered some scenes right."""
    return Run({"test": {}}, dict(enumerate(right)), [], [])


def test_intervals_are_those_of_the_textbook():
    # 95 percent quantiles of Student's t with 2 degrees of freedom, and of the normal.
    t, z = 4.30265, 1.95996
    assert seed_interval([1.0, 2.0, 3.0]) == pytest.approx(t * 1.0 / math.sqrt(3), rel=1e-5)
    assert seed_interval([1.0]) is None
    p, n = 0.8, 500
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert scene_interval(p, n) == pytest.approx((center - half, center + half), rel=1e-5)


def test_differences_are_paired_by_scene():
    """Against the t statistic written out."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 2, 60)) < np.array([0.8, 0.5])[:, None, None]
    found = paired({s: run_of(a[s]) for s in (0, 1)}, {s: run_of(b[s]) for s in (0, 1)})
    difference = a.mean(axis=0) - b.mean(axis=0)
    error = difference.std(ddof=1) / math.sqrt(60)
    assert found.mean == pytest.approx(difference.mean())
    assert found.p == pytest.approx(2 * stats.t.sf(abs(difference.mean() / error), 59))
    half = stats.t.ppf(0.975, 59) * error
    assert (found.low, found.high) == pytest.approx(
        (found.mean - half, found.mean + half), abs=1e-9
    )
    # Only what both have counts.
    less = paired({0: run_of(a[0]), 7: run_of(a[1])}, {0: run_of(b[0][:30])})
    assert less.mean == pytest.approx(a[0][:30].mean() - b[0][:30].mean())
    assert paired({0: run_of(a[0])}, {1: run_of(b[1])}) is None
    same = paired({0: run_of(a[0])}, {0: run_of(a[0])})
    assert (same.mean, same.p) == (0.0, 1.0)


def test_many_comparisons_need_smaller_p():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def test_calibration_error_is_the_mean_gap_of_the_bins():
    # Two bins: .95 sure and half right, .25 sure and all right.
    assert calibration_error([0.95] * 4 + [0.25] * 4, [1, 1, 0, 0] + [1] * 4) == pytest.approx(
        0.5 * 0.45 + 0.5 * 0.75
    )
    assert calibration_error([1.0, 1.0], [True, True]) == 0.0
    rng = np.random.default_rng(1)
    sure = rng.random(20_000)
    assert calibration_error(sure, rng.random(20_000) < sure) < 0.02


RAW = [
    {
        "id": str(i),
        "image_orig": f"o{i}",
        "image_recon": f"r{i}",
        "bbox_orig": [1, 2, 3, 4],
        "bbox_recon": [i, 10, 8, 6],
        "meta": {"category": category},
    }
    for i, category in enumerate(("can", "can", "jar"))
]


def test_wrong_reconstructions():
    missing = one_run.stressed(RAW, "missing")
    assert all(set(r) == {"id", "image_orig", "bbox_orig", "meta"} for r in missing)
    other = one_run.stressed(RAW, "other_object")
    assert [r["image_recon"] for r in other] == ["r2", "r2", "r0"]
    assert [r["bbox_recon"][0] for r in other] == [2, 2, 0]
    assert [r["id"] for r in other] == ["0", "1", "2"]
    moved = one_run.stressed(RAW, "misaligned")
    assert moved[1]["bbox_recon"] == [5, 13, 8, 6] and RAW[1]["bbox_recon"][0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["original", "reconstruction", "tokens"])
def test_a_baseline_has_no_levels_and_sees_its_images_only(fusion):
    config = tiny(fusion=fusion)
    model = build_model(config)
    full = build_model(tiny())
    gone = set(full.shapes) - set(model.shapes)
    assert gone and {p.split(".")[0] for p in gone} == {"level1", "level2"}
    assert set(model.shapes) < set(full.shapes)
    weights, batch = random_weights(model), random_batch(config)

    @jax.jit
    def seen(weights, batch):
        module = model.merge(weights)
        total, _ = loss_and_metrics(module, batch, count(batch, config), None)
        logits = read_images(module, batch).code_logits_BMC, module(batch).code_logits_BMC
        return total, *logits

    first, cached, joint = seen(weights, batch)
    for field, counts in (
        ("image_orig", fusion != "reconstruction"),
        ("image_recon", fusion != "original"),
    ):
        other = dataclasses.replace(batch, **{field: getattr(batch, field)[::-1].copy()})
        assert (seen(weights, other)[0] != first) == counts, field
    # The cells to be completed stand last among the image tokens, whichever way they are read.
    np.testing.assert_allclose(cached, joint, rtol=1e-3, atol=1e-4)
    read = 2 if fusion == "tokens" else 1
    assert (config.num_patches, config.num_codes) == (16 * read, 36 * read)


def test_variants_differ_from_the_base_by_their_changes_only():
    for name, changes in one_run.VARIANTS.items():
        config = one_run.configuration("debug:tiny", name, 3, 5)
        base = one_run.configuration("debug:tiny", one_run.FULL, 3, 5)
        codes = {"data.cache_codes": config.loss.code_weight > 0}
        assert config == override(base, changes | codes), name
        assert config.seed == 3 and config.train.max_steps == 5
    with pytest.raises(ConfigError, match="no variant nothing; there are full"):
        one_run.configuration("debug:tiny", "nothing", 0, None)


@pytest.mark.slow
def test_the_script_from_nothing_to_its_tables_and_again(tmp_path, monkeypatch, capsys):
    """Two variants of two steps; a second call has nothing left to do."""
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "out"
    variants = ["full", "concatenation"]
    argv = ["--out", str(out), "--base", "debug:tiny", "--steps", "2", "--seeds", "1"]
    argv += ["--stress_scenes", "2", "--variants", *variants]
    ablations.main(argv)
    said = capsys.readouterr()
    tables = (out / "RESULTS.md").read_text()
    assert tables in said.out and "1 left" in said.err
    rows = {line.split(" | ")[0].strip("| "): line for line in tables.splitlines()}
    assert set(variants) <= set(rows)
    assert (out / "ablations.png").stat().st_size > 10_000
    result = json.loads((out / "runs/full/seed_0/result.json").read_text())
    assert set(result) == {"test", "missing", "other_object", "misaligned"}
    assert result["missing"]["alignment"]["identity: no reconstruction"] == 2
    before = (out / "runs/full/seed_0/result.json").stat().st_mtime_ns

    ablations.main(argv)
    assert "2 runs, 2 of them done" in capsys.readouterr().err
    assert (out / "runs/full/seed_0/result.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        ablations.main([*argv, "--steps", "3"])
    assert "was begun with" in capsys.readouterr().err


def test_tables_of_made_up_runs(tmp_path):
    """Two seeds: means, intervals over seeds and verdicts stand in the tables."""

    def scores(share, seed):
        return {
            "fusion": {"alpha_mean": 0.7, "attention_entropy": 3.5},
            "answers": {
                k: {"all": {"accuracy": 0.8, "within_10_points": share - 0.01 * seed}}
                for k in ("category", "color", "joint", "occlusion_ratio")
            },
            "images": {
                "occluded": {
                    c: {"psnr": x, "ssim": 0.5}
                    for c, x in (("completed", 12.0), ("flat_fill", 10.0), ("vq_round_trip", 18.0))
                }
            },
        }

    runs = {
        variant: {
            seed: Run(
                {s: scores(share, sign * seed) for s in ("test", *one_run.STRESSES)},
                {i: i % 10 < good for i in range(100)},
                [0.9],
                [True],
            )
            for seed in (0, 1)
        }
        for variant, good, share, sign in (
            ("full", 9, 0.9, 1),
            ("no_level1", 5, 0.9, 1),
            ("no_level2_affine", 9, 0.8, -1),
            ("original_only", 9, 0.9, 1),
        )
    }
    assert report.gap_closed(runs["full"][0]) == pytest.approx(0.25)
    assert "0.800 ± 0.000" in report.main_table(runs)
    lines = report.difference_table(runs).splitlines()
    assert "+40.0 (+30.2 to +49.8)" in lines[2] and "| significant |" in lines[2]
    assert "+0.0" in lines[3] and "not significant" in lines[3]
    # Of two seeds 10 and 8 points, whose standard error is 1: 12.706 is the quantile.
    assert "| +9.00 ± 12.71 | +0.00 ± 0.00 | - |" in lines[3]
    claims = report.claims_table(runs).splitlines()[2:]
    verdicts = [line.split(" | ")[-1].rstrip(" |") for line in claims]
    assert verdicts == ["missed", "met", "missed", "missed", "missed", "missed"]
    assert "(original_only)" in claims[0] and "+9.00 ± 12.71" in claims[4]
    assert "0.250 ± 0.000" in claims[5]
    inside = report.inside_table(runs)
    assert "| full | 0.700 ± 0.000 | - | 3.500 ± 0.000 |" in inside
    stress = report.stress_table(runs, 10).splitlines()
    assert stress[2] == "| full | 0.900 ± 0.000 |" + " 0.800 ± 0.000 |" * 3
    painted = report.stress_image_table(runs).splitlines()
    assert painted[2] == "| full |" + " +2.00 ± 0.00 |" * 4
    report.plot(runs, 10, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_runs_share_the_gpus_that_are_there(monkeypatch):
    def found(*arguments, **options):
        return subprocess.CompletedProcess(arguments, 0, "gpu 2\n", "")

    monkeypatch.setattr(ablations.subprocess, "run", found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    alone, shared = ablations.places(1), ablations.places(3)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in alone] == ["3", "5"]
    assert all("XLA_PYTHON_CLIENT_PREALLOCATE" not in place for place in alone)
    assert sorted(place["CUDA_VISIBLE_DEVICES"] for place in shared) == ["3"] * 3 + ["5"] * 3
    for place in shared:
        assert float(place["XLA_PYTHON_CLIENT_MEM_FRACTION"]) * 3 <= 0.9
        assert place["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
