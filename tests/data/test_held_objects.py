"""HeldObjects: scenes are what their records say, and builds are reproducible and restartable."""

import colorsys
import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from htfa_jax.common import files
from htfa_jax.data.held_objects import (
    CATEGORIES,
    COLORS,
    QUESTIONS,
    SPLITS,
    build_scenes,
    contact_sheet,
    make_scene,
    scene_files,
)
from htfa_jax.data.held_objects import builder as builder_module
from htfa_jax.data.held_objects.questions import answer_sentences, answer_words, conversation
from htfa_jax.data.held_objects.scenes import mask_box, random_streams
from htfa_jax.errors import DataError

ROOT = Path(__file__).parents[2]
SIZE = 96


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(7, "train", index, SIZE) for index in range(40)]


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def run_python(*arguments: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, text=True, **options
    )


@pytest.mark.slow
def test_scene_depends_on_seed_split_and_index_alone(scenes):
    again = make_scene(7, "train", 5, SIZE)
    for field in dataclasses.fields(again):
        value, expected = getattr(again, field.name), getattr(scenes[5], field.name)
        assert np.array_equal(value, expected), field.name
    for other in (make_scene(8, "train", 5, SIZE), make_scene(7, "test", 5, SIZE)):
        assert not np.array_equal(other.target, again.target)


@pytest.mark.slow
def test_composition_does_not_depend_on_image_size(scenes):
    large = make_scene(7, "train", 4, 2 * SIZE)
    assert large.category == scenes[4].category
    assert np.allclose(np.array(large.bbox_orig) / 2, scenes[4].bbox_orig, atol=2)
    assert large.occlusion == pytest.approx(scenes[4].occlusion, abs=0.05)


def test_splits_share_no_random_stream():
    draws = [
        stream.uniform()
        for split in SPLITS
        for index in range(50)
        for stream in random_streams(0, split, index, 7)
    ]
    assert len(set(draws)) == len(SPLITS) * 50 * 7
    with pytest.raises(ValueError, match="train, validation, test"):
        make_scene(0, "training", 0, SIZE)


@pytest.mark.slow
def test_target_is_original_without_the_hand(scenes):
    for scene in scenes:
        outside = ~scene.occluder_mask
        assert np.array_equal(scene.original[outside], scene.target[outside])
        change = np.abs(scene.original.astype(int) - scene.target)[scene.occluder_mask]
        assert change.mean() > 10


def test_boxes_and_occlusion_ratio_are_those_of_the_masks(scenes):
    for scene in scenes:
        x, y, w, h = scene.bbox_orig
        rows, columns = np.nonzero(scene.object_mask)
        assert (x, y, x + w - 1, y + h - 1) == (
            columns.min(),
            rows.min(),
            columns.max(),
            rows.max(),
        )
        x, y, w, h = scene.bbox_recon
        shown = scene.reconstruction.mean(-1) > 0.05 * 255
        assert shown[y : y + h, x : x + w].sum() == shown.sum()
        assert (x, y, w, h) == mask_box(shown)
        hidden = scene.object_mask & scene.occluder_mask
        assert scene.occlusion == hidden.sum() / scene.object_mask.sum()


def test_the_rendered_occlusion_ratio_follows_the_drawn_one(scenes):
    drawn = np.array([scene.drawn_occlusion for scene in scenes])
    error = np.abs(drawn - [scene.occlusion for scene in scenes])
    assert error.mean() <= 0.035 and error.max() <= 0.13
    gaps = np.diff(np.sort(drawn))
    assert drawn.min() < 0.15 and drawn.max() > 0.85 and gaps.max() < 0.05


def test_every_category_lies_inside_the_image(scenes):
    seen = set()
    for scene in scenes:
        border = np.ones((SIZE, SIZE), bool)
        border[1:-1, 1:-1] = False
        assert not (scene.object_mask & border).any(), scene.category
        assert scene.object_mask.mean() > 0.01
        assert scene.target[scene.object_mask].std() > 3
        seen.add(scene.category)
    assert seen == set(CATEGORIES)


def test_object_shows_its_colour_and_the_reconstruction_does_not(scenes):
    def hue(pixels):
        return colorsys.rgb_to_hsv(*pixels.mean(0) / 255)[0]

    hues = {name: hue(np.array([color])) for name, color in COLORS.items()}
    chromatic = [name for name in COLORS if name not in ("white", "black")]

    def nearest(value):
        return min(chromatic, key=lambda name: abs((hues[name] - value + 0.5) % 1 - 0.5))

    kinds = {"grey": 0, "named": 0}
    for scene in scenes:
        x, y, w, h = scene.bbox_recon
        inside = scene.reconstruction[y : y + h, x : x + w].reshape(-1, 3)
        pixels = inside[inside.mean(1) > 30]
        assert scene.reconstruction_color != scene.color
        if scene.reconstruction_color == "grey":
            assert np.ptp(pixels.mean(0)) < 4
        elif scene.reconstruction_color in chromatic:
            assert nearest(hue(pixels)) == scene.reconstruction_color
        kinds["grey" if scene.reconstruction_color == "grey" else "named"] += 1
        if scene.category == "bowl" and scene.color in chromatic:
            assert nearest(hue(scene.target[scene.object_mask])) == scene.color
    assert min(kinds.values()) > 8


@pytest.mark.slow
def test_builds_agree_byte_for_byte(tmp_path):
    """One process; two unguarded scripts at once, two workers each, in one folder."""
    num, size = 6, 48
    alone = build_scenes(tmp_path / "alone", "test", num, image_size=size, seed=3, num_workers=1)
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from htfa_jax.data.held_objects import build_scenes\n"
        f"print(build_scenes({str(tmp_path / 'shared')!r}, 'test', {num}, image_size={size},"
        " seed=3, num_workers=2))\n"
    )
    runs = [run_python(str(script)) for _ in range(2)]
    for run in runs:
        out, err = run.communicate()
        assert run.returncode == 0, err
        assert Path(out.strip()) == tmp_path / "shared" / alone.name
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "alone")


def test_writers_of_one_file_do_not_share_a_temporary_one(tmp_path, monkeypatch):
    moves = []
    monkeypatch.setattr(files.os, "replace", lambda *paths: moves.append(paths))
    for _ in range(2):
        files.write_whole(tmp_path / "file", b"whole")
    (first, target), (second, _) = moves
    assert first != second and target == tmp_path / "file"
    assert first.parent == target.parent and first.read_bytes() == b"whole"


def test_interrupted_build_makes_exactly_what_is_missing(tmp_path, monkeypatch):
    made, limit = [], [3]

    def counted(seed, split, index, size):
        if len(made) == limit[0]:
            raise KeyboardInterrupt
        made.append(index)
        return make_scene(seed, split, index, size)

    monkeypatch.setattr(builder_module, "make_scene", counted)
    options = {"image_size": 32, "num_workers": 1}
    with pytest.raises(KeyboardInterrupt):
        build_scenes(tmp_path, "train", 5, **options)
    assert not list(tmp_path.glob("*.jsonl"))
    limit[0] = 100
    records = build_scenes(tmp_path, "train", 5, **options)
    assert made == [0, 1, 2, 3, 4]
    (tmp_path / "train" / "mask" / "000001.png").unlink()
    (tmp_path / "train" / "meta" / "000003.json").unlink()
    before = files_of(tmp_path)
    assert build_scenes(tmp_path, "train", 5, **options) == records
    assert made[5:] == [1, 3]
    assert set(files_of(tmp_path)) - set(before) == {
        "train/mask/000001.png",
        "train/meta/000003.json",
    }
    build_scenes(tmp_path, "train", 5, **options)
    assert made[7:] == []


def test_records_follow_the_contract(tmp_path):
    records_file = build_scenes(tmp_path, "validation", 3, image_size=48, seed=1, num_workers=1)
    records = [json.loads(line) for line in records_file.read_text().splitlines()]
    assert records_file.name == "validation-3-word.jsonl"
    assert [record["id"] for record in records] == [f"validation-{i:06d}" for i in range(3)]
    for index, record in enumerate(records):
        scene = make_scene(1, "validation", index, 48)
        for key, mode in (("orig", "RGB"), ("recon", "RGB"), ("target", "RGB")):
            image = Image.open(tmp_path / record[f"image_{key}"])
            assert image.size == (48, 48) and image.mode == mode
        assert np.array_equal(Image.open(tmp_path / record["image_recon"]), scene.reconstruction)
        for key in ("object_mask", "occluder_mask"):
            mask = np.asarray(Image.open(tmp_path / record[key]))
            assert np.array_equal(mask, getattr(scene, key) * np.uint8(255))
        original = Image.open(tmp_path / record["image_orig"])
        error = np.asarray(original, float) - scene.original
        assert original.layer[0][1:3] == (1, 1) and np.abs(error).mean() < 4
        assert record["bbox_orig"] == list(scene.bbox_orig)
        assert record["bbox_recon"] == list(scene.bbox_recon)
        assert record["meta"] == {
            "category": scene.category,
            "color": scene.color,
            "occlusion": round(scene.occlusion, 4),
            "drawn_occlusion": round(scene.drawn_occlusion, 4),
        }
        human, model = record["conversations"][::2], record["conversations"][1::2]
        assert {turn["kind"] for turn in human} == set(QUESTIONS)
        assert all(turn["from"] == "human" for turn in human)
        assert all(turn["from"] == "gpt" for turn in model)
        assert human[0]["value"].startswith("<image>\n")
        replies = answer_words(scene.category, scene.color, scene.occlusion)
        for number, (question, answer) in enumerate(zip(human, model, strict=True)):
            expected = ("" if number else "<image>\n") + QUESTIONS[question["kind"]]
            assert question["value"] == expected
            assert answer["value"] == replies[question["kind"]]
    orders = {tuple(turn["value"] for turn in record["conversations"][::2]) for record in records}
    assert len(orders) > 1


def test_answers_in_both_styles(tmp_path):
    assert answer_words("jar", "red", 0.4499) == {
        "category": "jar",
        "clear": "yes",
        "color": "red",
        "occlusion_ratio": "40 percent",
    }
    assert answer_sentences("jar", "red", 0.5) == {
        "category": "The object is jar.",
        "clear": "No.",
        "color": "The object is red.",
        "occlusion_ratio": "About 50 percent of the object is hidden.",
    }
    assert answer_words("jar", "red", 0.85)["occlusion_ratio"] == "90 percent"
    turns = conversation(np.random.default_rng(0), "can", "blue", 0.2, "sentence")
    assert {turn["value"] for turn in turns[1::2]} == set(
        answer_sentences("can", "blue", 0.2).values()
    )
    with pytest.raises(ValueError, match="word, sentence"):
        build_scenes(tmp_path, "train", 1, image_size=32, answers="words")
    options = {"image_size": 32, "num_workers": 1}
    build_scenes(tmp_path, "train", 1, answers="word", **options)
    records = build_scenes(tmp_path, "train", 1, answers="sentence", **options)
    assert json.loads(records.read_text())["conversations"][1]["value"].endswith(".")


def test_of_builds_at_once_one_draws_and_writes(tmp_path, monkeypatch):
    made, written = [], []

    def counted(seed, split, index, size):
        made.append(index)
        time.sleep(0.05)
        return make_scene(seed, split, index, size)

    def noted(path, content):
        written.append(path.name)
        files.write_whole(path, content)

    monkeypatch.setattr(builder_module, "make_scene", counted)
    monkeypatch.setattr(scene_files, "write_whole", noted)
    options = {"image_size": 32, "num_workers": 1}
    with ThreadPoolExecutor(3) as pool:
        builds = [pool.submit(build_scenes, tmp_path, "train", num, **options) for num in (4, 4, 6)]
    assert sorted(made) == [0, 1, 2, 3, 4, 5]
    lines = [len(b.result().read_text().splitlines()) for b in builds]
    assert lines == [4, 4, 6]
    assert sorted(x for x in written if x.endswith("word.jsonl")) == [
        "train-4-word.jsonl",
        "train-6-word.jsonl",
    ]


def test_folder_problems_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the scenes to .*file"):
        build_scenes(tmp_path / "file", "train", 1, image_size=32)
    build_scenes(tmp_path / "scenes", "train", 1, image_size=32, num_workers=1)
    with pytest.raises(DataError, match="another folder"):
        build_scenes(tmp_path / "scenes", "train", 1, image_size=48)
    with pytest.raises(DataError, match="at least 1 scene"):
        build_scenes(tmp_path / "scenes", "train", 0, image_size=32)


def test_dead_worker_is_an_error(tmp_path):
    job = {"folder": str(tmp_path / "nowhere"), "split": "train", "seed": 0, "image_size": 32}
    with pytest.raises(DataError, match="FileNotFoundError"):
        list(builder_module.run_workers(job, [0, 1], 2))


def test_command_line_writes_a_contact_sheet(tmp_path):
    options = ["--num", "3", "--size", "48", "--out", str(tmp_path), "--sheet", "2"]
    run = run_python("-m", "htfa_jax.data.held_objects", *options, "--workers", "1")
    out, err = run.communicate()
    assert run.returncode == 0, err
    sheet = tmp_path / "contact_sheet.png"
    assert str(sheet) in out and str(tmp_path / "train-3-word.jsonl") in out
    image = np.asarray(Image.open(sheet))
    column = image.shape[1] // 2
    assert image.shape[0] > 4 * 48 and column >= 48
    scene = make_scene(0, "train", 1, 48)
    shown = image[:48, column : column + 48].astype(float)
    assert np.abs(shown - scene.original).mean() < 6


@pytest.mark.parametrize(
    "changes",
    [
        {"image_orig": 3},
        {"image_target": None},
        {"bbox_orig": [1, 2, 3, "x"]},
        {"bbox_orig": [1, 2, 1e308, 4]},
        {"meta": {}},
        {"meta": {"color": "red", "category": "jar", "occlusion": "x"}},
    ],
    ids=str,
)
def test_a_scene_that_is_none_is_named(tmp_path, changes):
    path = build_scenes(tmp_path, "test", 1, image_size=32, num_workers=1)
    contact_sheet(path, tmp_path / "sheet.png")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes) + "\n")
    with pytest.raises(DataError):
        contact_sheet(path, tmp_path / "sheet.png")
