"""Writes scenes to a folder: images, masks, and a JSON-lines file of records.

Layout: <folder>/<split>/{orig,target,recon,mask,hand}/000123.*, a sidecar meta/000123.json written
after the images of its scene, and <folder>/<split>-<num>-<answers>.jsonl written last. Every file
appears by renaming, so a reader never sees half of one, and two builds of one folder write the same
bytes to the same names.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from htfa_jax.common.cli import available_processors
from htfa_jax.common.files import one_at_a_time, write_whole
from htfa_jax.common.json_files import parse_json, read_json
from htfa_jax.config import HeldObjectsConfig
from htfa_jax.data.held_objects.questions import ANSWERS, conversation
from htfa_jax.data.held_objects.scene_files import (
    SceneRecords,
    are_sound,
    sealed,
    sound_sidecar,
    write_records,
)
from htfa_jax.data.held_objects.scenes import RECIPE, SPLITS, Scene, make_scene, random_streams
from htfa_jax.data.records import EMBEDDED, Split
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.errors import DataError

logger = logging.getLogger(__name__)
SIDECAR = ("meta", ".json")
FILES = {
    "image_orig": ("orig", ".jpg"),
    "image_target": ("target", ".jpg"),
    "image_recon": ("recon", ".png"),
    "object_mask": ("mask", ".png"),
    "occluder_mask": ("hand", ".png"),
}
LOG_SECONDS = 5
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def build_scenes(
    folder: str | os.PathLike,
    split: str,
    num: int,
    *,
    image_size: int,
    seed: int = 0,
    answers: str = "word",
    num_workers: int | None = None,
) -> Path:
    """Makes the first `num` scenes of a split and returns the path of their JSON-lines file.

    image_size is in pixels of a side; `answers` is "word" or "sentence"; num_workers defaults to
    the processors there are. Scenes that exist are kept, so a stopped build resumes,
    and a complete one returns at once. Raises DataError for a folder that holds scenes of another
    seed or size or cannot be written, and when a worker process dies.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    if answers not in ANSWERS:
        raise ValueError(f"unknown answers {answers!r}: one of {', '.join(ANSWERS)}")
    if num < 1 or image_size < 32:
        raise DataError(f"at least 1 scene and 32 pixels are needed, not {num} and {image_size}")
    folder = Path(folder).absolute()
    prepare(folder, split, {"recipe": RECIPE, "seed": seed, "image_size": image_size})
    records = folder / f"{split}-{num}-{answers}.jsonl"
    if are_sound(records) and not missing_scenes(folder / split, num):
        return records
    if not all(os.access(x, os.W_OK) for x in (folder, folder / split / "meta")):
        raise DataError(f"cannot write the scenes to {folder}: no permission")
    what = f"{split} scenes of {image_size} px"
    job = {"folder": str(folder), "split": split, "seed": seed, "image_size": image_size}
    with one_at_a_time(folder / split, what):
        # Another process may have made them, all or so many as it needs.
        if missing := missing_scenes(folder / split, num):
            workers = min(num_workers or available_processors(), len(missing))
            made = run_workers(job, missing, workers) if workers > 1 else write_scenes(job, missing)
            with contextlib.closing(made):
                show_progress(made, len(missing), what)
        # Nor written again: another process may be reading what is there.
        if missing or not are_sound(records):
            lines = (json.dumps(record(job, i, answers)) + "\n" for i in range(num))
            write_records(records, "".join(lines))
    return records


def prepare(folder: Path, split: str, settings: dict[str, int]) -> None:
    """Makes the folders where they are missing and checks that no other scenes are in them."""
    settings_file = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not settings_file.exists():
            write_whole(settings_file, json.dumps(settings).encode())
        found = read_json(settings_file, DataError)
        if found != settings:
            raise DataError(f"{folder} holds scenes of {found}, not {settings}: use another folder")
        for name, _ in [*FILES.values(), SIDECAR]:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write the scenes to {folder}: {error}") from error


def missing_scenes(folder: Path, num: int) -> list[int]:
    """Numbers below `num` of which a file is not there."""
    complete = set(range(num))
    for name, ending in [*FILES.values(), SIDECAR]:
        there = {entry.name for entry in os.scandir(folder / name)}
        complete = {i for i in complete if f"{i:06d}{ending}" in there}
    return sorted(set(range(num)) - complete)


def write_scenes(job: dict, indices: Iterable[int]) -> Generator[int, None, None]:
    """Makes and writes scenes one by one; yields each number when its files are there."""
    folder = Path(job["folder"], job["split"])
    for index in indices:
        scene = make_scene(job["seed"], job["split"], index, job["image_size"])
        contents = {
            "image_orig": encode(scene.original, "JPEG"),
            "image_target": encode(scene.target, "JPEG"),
            "image_recon": encode(scene.reconstruction, "PNG"),
            "object_mask": encode(scene.object_mask, "PNG"),
            "occluder_mask": encode(scene.occluder_mask, "PNG"),
        }
        for key, (name, ending) in FILES.items():
            write_whole(folder / name / f"{index:06d}{ending}", contents[key])
        sidecar = folder / "meta" / f"{index:06d}.json"
        by_folder = {FILES[key][0]: content for key, content in contents.items()}
        write_whole(sidecar, sealed(sidecar_of(scene), by_folder).encode())
        yield index


def sidecar_of(scene: Scene) -> dict:
    """What a record needs to know of a scene beside its images."""
    return {
        "bbox_orig": scene.bbox_orig,
        "bbox_recon": scene.bbox_recon,
        "meta": {
            "category": scene.category,
            "color": scene.color,
            "occlusion": round(scene.occlusion, 4),
            "drawn_occlusion": round(scene.drawn_occlusion, 4),
        },
    }


def encode(image: np.ndarray, file_format: str) -> bytes:
    """File contents of an image uint8 [H, W, 3] or a mask bool [H, W] (0 and 255)."""
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {"compress_level": 3}
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, file_format, **options)
    return stream.getvalue()


def run_workers(job: dict, indices: list[int], num_workers: int) -> Generator[int, None, None]:
    """Like write_scenes, in several processes.

    The processes are plain interpreters that report on one shared pipe: unlike multiprocessing's,
    they never import the caller's main module, which may be a notebook or an unguarded script.
    """
    command = [sys.executable, "-c", f"from {__name__} import work; work()"]
    paths = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | dict.fromkeys(ONE_THREAD, "1") | {"PYTHONPATH": paths}
    receiver, sender = os.pipe()
    workers = []
    try:
        for part in range(num_workers):
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=sender, env=environment, text=True
            )
            workers.append(worker)
            with worker.stdin as stdin:
                json.dump({"job": job, "indices": indices[part::num_workers]}, stdin)
        os.close(sender)
        failure = "see its output on standard error"
        with os.fdopen(receiver) as reports:
            for line in reports:
                if line.startswith("error"):
                    failure = line.strip()
                else:
                    yield int(line)
        codes = [worker.wait() for worker in workers]
        if any(codes):
            raise DataError(f"a worker process ended with code {max(codes, key=abs)}: {failure}")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def work() -> None:
    """A worker process: reads its job on standard input, prints the number of each scene done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    task = parse_json(sys.stdin.read(), "the job of a worker", DataError)
    try:
        for index in write_scenes(task["job"], task["indices"]):
            report(str(index))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone: nobody is left to tell
    except Exception as error:
        report(f"error: {type(error).__name__}: {error}")
        raise


def report(line: str) -> None:
    """Sends a line to the parent in one write, or the lines of several workers would mix."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def show_progress(made: Iterable[int], total: int, what: str) -> None:
    """Runs through `made`, with a bar on a terminal and a line every few seconds elsewhere."""
    if sys.stderr.isatty():
        for _ in tqdm(made, total=total, desc=what, unit="scene"):
            pass
        return
    logger.info("%s: %d to make", what, total)
    start = last = time.monotonic()
    for count, _ in enumerate(made, 1):
        now = time.monotonic()
        if now - last > LOG_SECONDS or count == total:
            last, rate = now, count / (now - start)
            left = (total - count) / rate
            logger.info("%s: %d/%d, %.1f/s, %.0f s left", what, count, total, rate, left)


def record(job: dict, index: int, answers: str) -> dict:
    """One line of the JSON-lines file; paths are relative to it."""
    name, split = f"{index:06d}", job["split"]
    draw = functools.partial(write_scenes, job)
    known = sound_sidecar(Path(job["folder"], split), index, draw)
    meta = known["meta"]
    rng = random_streams(job["seed"], split, index, 7)[6]
    turns = conversation(rng, meta["category"], meta["color"], meta["occlusion"], answers)
    paths = {key: f"{split}/{place}/{name}{ending}" for key, (place, ending) in FILES.items()}
    boxes = {key: known[key] for key in ("bbox_orig", "bbox_recon")}
    return {"id": f"{split}-{name}", **paths, **boxes, "conversations": turns, "meta": meta}


def drawn_scenes(
    held: HeldObjectsConfig, image_size: int, split: Split, cache_dir: Path
) -> RecordFile:
    """The embedded dataset's records of a split, drawn where they are missing or damaged."""
    folder = (cache_dir / EMBEDDED / f"{image_size}px-seed{held.seed}").absolute()
    records = build_scenes(
        folder,
        split,
        getattr(held, f"num_{split}"),
        image_size=image_size,
        seed=held.seed,
        answers=held.answers,
    )
    job = {"folder": str(folder), "split": split, "seed": held.seed, "image_size": image_size}
    return SceneRecords(records, functools.partial(write_scenes, job))
