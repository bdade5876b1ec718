"""Evaluation, by its parts and from the command line on a run that was trained there."""

import json

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity
from support import random_batch, random_weights, tiny

from htfa_jax import evaluate, train
from htfa_jax.config import override
from htfa_jax.config.io import save_config
from htfa_jax.data.records import Turn
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.data.splits import open_tokenizer
from htfa_jax.evaluation import report
from htfa_jax.evaluation.evaluator import (
    Evaluator,
    occlusion_ratios,
    questions,
    stated_ratio,
    system_prompts,
)
from htfa_jax.evaluation.image_metrics import CANDIDATES, flat_fill, region_masks
from htfa_jax.models.factory import build_model
from htfa_jax.models.registration import to_8bit
from htfa_jax.sharding.layout import Layout


@pytest.fixture(scope="module")
def evaluated(model, dataset, tmp_path_factory):
    """(records, evaluation in batches of 3, evaluation in one batch)."""
    config, structure, weights = model
    records = RecordFile(dataset)
    tokenizer = open_tokenizer(config, tmp_path_factory.mktemp("workdir"), records)
    reports = [
        Evaluator(
            override(config, {"eval.batch_size": size}), structure, tokenizer, Layout(config)
        )(weights, records)
        for size in (3, 7)
    ]
    return records, *reports


@pytest.mark.slow
def test_rows_that_fill_a_batch_count_for_nothing(evaluated):
    _, in_parts, whole = evaluated
    assert in_parts.scores["samples"] == whole.scores["samples"] == 7
    flat, expected = (report.scalars(r.scores) for r in (in_parts, whole))
    assert flat.keys() == expected.keys() and len(flat) > 12
    for name, value in expected.items():
        assert flat[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert [a.answer for a in in_parts.answers] == [a.answer for a in whole.answers]


@pytest.mark.slow
def test_every_question_is_answered_once(evaluated):
    records, _, whole = evaluated
    expected = [
        (i, turn.kind, turn.text, truth.text)
        for i in range(len(records))
        for turn, truth in questions(records[i])
    ]
    assert [(a.scene, a.kind, a.question, a.truth) for a in whole.answers] == expected
    counts = {k: rows["all"]["count"] for k, rows in whole.scores["answers"].items()}
    assert counts == {"color": 7, "occlusion_ratio": 7}


@pytest.mark.slow
def test_image_scores_are_those_of_the_images_shown(evaluated):
    """All pixels of the split together, computed again from the panel with NumPy."""
    records, _, whole = evaluated
    assert len(whole.panel) == 7
    target = np.stack([row.images["target"] for row in whole.panel])
    for i in range(7):
        shown = np.asarray(Image.open(records[i].image_target))
        np.testing.assert_array_equal(np.asarray(to_8bit(target[i])), shown)
    hand = np.stack([np.asarray(Image.open(records[i].occluder_mask)) > 0 for i in range(7)])
    item = np.stack([np.asarray(Image.open(records[i].object_mask)) > 0 for i in range(7)])
    regions = {"all": np.ones_like(hand), "occluder": hand, "occluded": hand & item}
    for name, column in (("completed", "completion"), ("original", "original")):
        image = np.stack([row.images[column] for row in whole.panel])
        a, b = (np.asarray(to_8bit(x), np.float64) for x in (image, target))
        similarity = np.stack(
            [
                structural_similarity(
                    x, y, full=True, data_range=255, channel_axis=-1, gaussian_weights=True,
                    sigma=1.5, use_sample_covariance=False, win_size=11,
                )[1].mean(axis=-1)
                for x, y in zip(a, b, strict=True)
            ]
        )  # fmt: skip
        for region, mask in regions.items():
            scores = whole.scores["images"][region][name]
            error = ((a - b) ** 2).mean(axis=-1)[mask].mean()
            assert scores["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
            assert scores["ssim"] == pytest.approx(similarity[mask].mean(), abs=1e-3)
    assert tuple(whole.scores["images"]["occluded"]) == CANDIDATES


@pytest.mark.slow
def test_a_tokenizer_without_decoder_is_scored_on_codes(dataset, tmp_path):
    config = tiny(vq__has_decoder=False, eval__max_new_tokens=1, eval__batch_size=7)
    structure = build_model(config)
    records = RecordFile(dataset)
    tokenizer = open_tokenizer(config, tmp_path, records)
    result = Evaluator(config, structure, tokenizer, Layout(config))(
        random_weights(structure), records
    )
    assert "images" not in result.scores and "completion" not in result.panel[0].images
    assert result.scores["losses"]["code_accuracy"] >= 0
    report.write(result, tmp_path / "out")
    assert (tmp_path / "out" / "panel.png").is_file()


def test_flat_fill_is_the_mean_of_what_is_visible():
    batch = random_batch(tiny())
    rgb = batch.image_orig / np.float32(255)
    batch.region_orig[1] = [0, 8, 48, 32]  # a letterboxed image
    filled = np.asarray(flat_fill(rgb, batch))
    for i, inside in enumerate((slice(0, 48), slice(8, 40), slice(0, 48))):
        visible = np.zeros((48, 48), bool)
        visible[inside] = True
        visible &= ~batch.occluder_mask[i]
        expected = rgb[i].copy()
        expected[batch.occluder_mask[i]] = rgb[i][visible].mean(axis=0)
        np.testing.assert_allclose(filled[i], expected, atol=1e-5)


def test_regions_leave_out_padding_and_what_has_no_mask():
    batch = random_batch(tiny())
    batch.region_orig[0] = [0, 8, 48, 32]
    batch.has_object_mask[1] = False
    batch.has_target[2] = False
    masks = {name: np.asarray(mask) for name, mask in region_masks(batch).items()}
    assert masks["all"].sum(axis=(1, 2)).tolist() == [48 * 32, 48 * 48, 0]
    assert not masks["all"][0, :8].any() and masks["all"][0, 8:40].all()
    np.testing.assert_array_equal(masks["occluder"][1], batch.occluder_mask[1])
    assert not masks["occluded"][1].any()
    hidden = batch.object_mask[0] & batch.occluder_mask[0]
    np.testing.assert_array_equal(masks["occluded"][0, 8:40], hidden[8:40])


def test_the_occlusion_ratio_comes_from_masks_or_from_the_record(dataset):
    record, batch = RecordFile(dataset)[0], random_batch(tiny())
    mask = batch.object_mask[1]
    share = (mask & batch.occluder_mask[1]).sum() / mask.sum()
    batch.has_object_mask[0] = False
    shares = occlusion_ratios(batch)
    assert np.isnan(shares[0]) and shares[1] == pytest.approx(share)
    assert stated_ratio(record) == record.meta["occlusion"]
    record.meta.clear()
    assert stated_ratio(record) is None


def test_questions_are_user_turns_with_an_answer(dataset):
    record = RecordFile(dataset)[0]
    roles = ["system", "user", "user", "assistant", "assistant", "user"]
    object.__setattr__(record, "turns", tuple(Turn(r, str(i)) for i, r in enumerate(roles)))
    assert [(q.text, a.text) for q, a in questions(record)] == [("2", "3")]
    assert [turn.text for turn in system_prompts(record)] == ["0"]


def test_table_shows_kinds_buckets_and_candidates(evaluated):
    _, _, whole = evaluated
    text = report.score_table(whole.scores)
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    color = whole.scores["answers"]["color"]["all"]["accuracy"]
    assert f"{color:.3f}" in rows["color"]
    hidden = whole.scores["images"]["occluded"]["flat_fill"]["psnr"]
    assert f"{hidden:.2f}" in rows["flat fill"]
    assert "boxes: 7" in text


@pytest.mark.slow
def test_the_main_job_from_nothing_to_its_panel(dataset, tmp_path, capsys):
    """VQ stage, training, evaluation during and after it; then evaluation by itself."""
    config = tiny(
        data__train=str(dataset),
        data__validation=str(dataset),
        data__test=str(dataset),
        data__cache_dir=str(tmp_path / "cache"),
        train__max_steps=2,
        eval__max_samples=3,
    )
    save_config(config, tmp_path / "config.json")
    run = tmp_path / "run"
    arguments = ["--config", str(tmp_path / "config.json"), "--workdir", str(run)]
    train.main(arguments)
    assert "finished" in capsys.readouterr().out
    log = (run / "logs" / "train.log").read_text()
    for said in ("vq step 3/3", "validation targets:", "train step 2/2", "completed", "finished"):
        assert said in log, said
    for name in ("logs/parameters.txt", "tokenizer/tokenizer.json", "config.json", "infer.sh"):
        assert (run / name).is_file(), name
    (events,) = (run / "logs").glob("events*")
    for name in ("loss", "text_loss", "code_loss", "learning_rate", "alpha_mean", "alpha_std"):
        assert f"train/{name}".encode() in events.read_bytes(), name
    assert b"validation/attention_entropy" in events.read_bytes()
    assert (run / "logs/panels/step_0000002.png").is_file()
    panel = np.asarray(Image.open(run / "evaluation/test/panel.png"))
    assert panel.shape[1] > 1000 and panel.std() > 20
    scores = json.loads((run / "evaluation/test/metrics.json").read_text())
    assert scores["samples"] == 7

    newest = max((run / "checkpoints").iterdir(), key=lambda p: int(p.name))
    assert int(newest.name) == scores["step"] == 2
    evaluate.main(
        [
            "--checkpoint",
            str(newest),
            "--split",
            "validation",
            "--output_dir",
            str(tmp_path / "e"),
            f"--config.data.validation={dataset}",
        ]
    )
    assert "accuracy by occlusion ratio" in capsys.readouterr().out
    again = json.loads((tmp_path / "e/metrics.json").read_text())
    assert again["step"] == 2
    assert report.scalars(again) == pytest.approx(report.scalars(scores), rel=1e-4, abs=1e-5)
    lines = (tmp_path / "e/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 14 and json.loads(lines[0])["kind"] == "color"
