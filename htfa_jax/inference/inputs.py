"""Image pairs that a caller brings: checked, as a batch, and back in their own frame."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from htfa_jax.common.json_files import json_lines, parse_json
from htfa_jax.config import Config
from htfa_jax.data.batch import Array, Batch
from htfa_jax.data.decode import decode_field, decode_original
from htfa_jax.data.forms import meant_by, questions, shown, unread_fields
from htfa_jax.data.image_values import image_of
from htfa_jax.data.masks import load_mask
from htfa_jax.data.preprocess import Placement, load_images, placement_of
from htfa_jax.data.records import ImageFile, Record, checked_box, parse_record, without_markers
from htfa_jax.data.sources import record_cache
from htfa_jax.data.storage import ImageRoot, PackedImage, StoredImage, image_root
from htfa_jax.errors import DataError

log = logging.getLogger(__name__)

# What a pair may have; names and meaning as in a dataset's records.
FIELDS = (
    "image_orig",
    "image_recon",
    "object_mask",
    "occluder_mask",
    "bbox_orig",
    "bbox_recon",
)
PairLike = Record | Mapping[str, Any] | Sequence[Any]


@dataclasses.dataclass(frozen=True)
class LoadedPair:
    """A pair, read.

    Attributes:
      sample: `Batch` fields of the images.
      original: upright RGB, in its own size.
      occluder: its occluder mask, in the mask's own size, if there is one.
      placement: of the original in the model's square.
    """

    sample: dict[str, Any]
    original: Image.Image
    occluder: Image.Image | None
    placement: Placement


def as_record(pair: PairLike, where: str) -> Record:
    """A pair as a record without conversation. Raises DataError that names `where`.

    Args:
      pair: (original, reconstruction or None), a mapping with names of `FIELDS`, or a record;
        images are paths, PIL images, uint8 arrays, or what `image_of` takes.
      where: for messages.
    """
    if isinstance(pair, Record):
        return pair
    if not isinstance(pair, Mapping):
        if isinstance(pair, str | Path) or len(pair) != 2:
            raise DataError(f"{where}: a pair is (original, reconstruction or None) or a mapping")
        pair = dict(zip(FIELDS, pair, strict=False))
    name = str(pair.get("id", "none"))

    def fail(reason: str) -> DataError:
        return DataError(f"{where} (id {name}): {reason}")

    for key in set(pair) - {"id", *FIELDS}:
        near = difflib.get_close_matches(key, FIELDS, n=1)
        raise fail(f"unknown field {key}; " + (f"did you mean {near[0]}?" if near else "valid are "
                   + ", ".join(FIELDS)))  # fmt: skip

    def image(field: str) -> Any:
        value = pair.get(field)
        if isinstance(value, str) and not value.lower().startswith(("data:", "http:", "https:")):
            return Path(value).expanduser()
        if value is None or isinstance(value, Path | StoredImage | Image.Image | np.ndarray):
            return value
        if not isinstance(value, str | Mapping | bytes) and not field.endswith("mask"):
            raise fail(
                f"{field} must be a path, a PIL image or an array, it is {type(value).__name__}"
            )
        original = pair.get("image_orig")
        original = Path(original).expanduser() if isinstance(original, str) else original
        try:
            return image_of(value, field, _local_file, original)
        except ValueError as error:
            raise fail(f"{field} {error}") from error

    if pair.get("image_orig") is None:
        raise fail("image_orig is missing")
    fields: dict[str, Any] = {field: image(field) for field in FIELDS[:4]}
    fields |= {field: checked_box(pair.get(field), field, fail) for field in FIELDS[4:]}
    return Record(where=where, id=name, image_target=None, turns=(), **fields)


def _local_file(name: str) -> Path:
    if "://" in name:
        raise ValueError("is an address of the web, from which images are not fetched: save it")
    return Path(name).expanduser()


def load_pair(record: Record, config: Config) -> LoadedPair:
    """Decodes a pair's images. Raises DataError naming the field and the file."""
    original = decode_original(record)
    record = dataclasses.replace(record, image_orig=original, image_target=None)
    sample = load_images(record, config.image_size, config.data.resize)
    return LoadedPair(
        sample=sample,
        original=original,
        occluder=decode_field(record, "occluder_mask", load_mask),
        placement=placement_of(original.size, config.image_size, config.data.resize),
    )


def stack_pairs(scenes: Sequence[LoadedPair], rows: int) -> Batch:
    """Scenes as a batch without text; rows that are too many repeat the last one."""
    scenes = [*scenes, *[scenes[-1]] * (rows - len(scenes))]
    nothing = np.zeros((rows, 0), np.int32)
    seen: dict[str, Any] = {n: np.stack([s.sample[n] for s in scenes]) for n in scenes[0].sample}
    return Batch(
        **seen,
        tokens=nothing,
        labels=nothing,
        loss_mask=nothing.astype(np.float32),
        weight=np.ones(rows, np.float32),
        index=np.arange(rows, dtype=np.int32),
    )


def with_own_completion(batch: Batch, missing_B: np.ndarray, completed_BHWC: np.ndarray) -> Batch:
    """The batch with completed images as reconstructions where there is none.

    They show the original's frame: the same box in both images moves nothing.

    Args:
      batch: of `stack`.
      missing_B: rows to fill.
      completed_BHWC: uint8.
    """

    def fill(old: Array, new: Any) -> np.ndarray:
        return np.where(missing_B.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    region = batch.region_orig
    return dataclasses.replace(
        batch,
        image_recon=fill(batch.image_recon, completed_BHWC),
        region_recon=fill(batch.region_recon, region),
        bbox_orig=fill(batch.bbox_orig, region),
        bbox_recon=fill(batch.bbox_recon, region),
        has_bbox_orig=batch.has_bbox_orig | missing_B,
        has_bbox_recon=batch.has_bbox_recon | missing_B,
        has_recon=batch.has_recon | missing_B,
    )


def to_original_frame(
    completed_HWC: np.ndarray, scene: LoadedPair, paste_back: bool
) -> Image.Image:
    """An image of the model's square in the original's frame and size.

    Args:
      completed_HWC: uint8.
      scene: what it completes.
      paste_back: take only what the occluder mask covers from it: every other pixel stays the
        original's own. Raises DataError without such a mask.
    """
    x, y, w, h = scene.placement.region
    square = Image.fromarray(completed_HWC).crop((x, y, x + w, y + h))
    completed = square.resize(scene.placement.size, Image.Resampling.BICUBIC)
    if not paste_back:
        return completed
    if scene.occluder is None:
        raise DataError(
            "paste_back needs occluder_mask, which says what is hidden; this pair has none"
        )
    mask = scene.occluder.resize(scene.original.size).point(lambda v: 255 * (v > 127))
    return Image.composite(completed, scene.original, mask)


@dataclasses.dataclass(frozen=True)
class PredictionJob:
    """A pair to look at, and what to ask.

    Attributes:
      number: of its line.
      id: its name in the predictions.
      record: the pair, or why it cannot be one.
      queries: questions; None for the default.
    """

    number: int
    id: str
    record: Record | DataError
    queries: tuple[str, ...] | None


def read_jobs(
    path: Path, queries: tuple[str, ...], images: Path | None = None
) -> list[PredictionJob]:
    """The pairs of a file.

    Args:
      path: in any form that a dataset may have: JSON lines, an array, a table, ...
      queries: those of the command line.
      images: where the images lie, if not in the file's folder.

    A pair has the fields of a dataset's record. Its questions are `query` (a text or a list), else
    the user turns of its `conversations` or `messages`, else `queries`.

    A pair that is none spoils only its own result. Raises DataError if there is no file, if it
    is not UTF-8, or if an id comes twice.
    """
    if not path.is_file():
        raise DataError(f"--input: no file at {path}; expected JSON lines, one pair in each")
    place = image_root(images, str(path), "--image_root")
    jobs: list[PredictionJob] = []
    unread: set[str] = set()
    for number, where, line, packed in _lines(path):
        name = str(number)
        try:
            if isinstance(line, DataError):
                raise line
            raw = parse_json(line, where, DataError, object, allow_nan=True)
            if isinstance(raw, Mapping):
                name = str(raw.get("id", number))
                unread.update(unread_fields(raw))
            record = parse_record(raw, where, functools.partial(_placed, place, packed),
                                  with_turns=False)  # fmt: skip
            job = PredictionJob(number, name, record, _queries(raw, record) or queries or None)
        except DataError as error:
            job = PredictionJob(number, name, error, None)
        jobs.append(job)
    for field in sorted(unread):
        if meant := meant_by(field):
            log.warning("%s: the field %s is not read; did you mean %s?", path, field, meant)
    named = {job.id for job in jobs if isinstance(job.record, Record)}
    jobs = [
        dataclasses.replace(job, id=f"line {job.number + 1}")
        if isinstance(job.record, DataError) and job.id == str(job.number) and job.id in named
        else job
        for job in jobs
    ]
    first: dict[str, int] = {}
    for job in jobs:
        if first.setdefault(job.id, job.number) != job.number:
            raise DataError(
                f"{path}: lines {first[job.id] + 1} and {job.number + 1} have the same id "
                f"{job.id}; a restart could not tell them apart"
            )
    return jobs


def _lines(
    path: Path,
) -> Iterator[tuple[int, str, bytes | DataError, Mapping[str, bytes]]]:
    """Number, name for messages, text, and images of each pair of a file.

    Raises DataError if nothing of it can be read; what is wrong later stands in a text's place.
    """
    if record_cache.is_random_access(str(path)):
        for line_number, line in json_lines(path, DataError):
            yield line_number - 1, f"{path}, line {line_number}", line, {}
        return
    number = 0
    try:
        for text, images in record_cache.records_of(str(path)):
            yield number, f"{path}, record {number}", text, images
            number += 1
    except (OSError, ValueError, DataError) as problem:
        error = DataError(f"{path}: {problem}")
        if not number:
            raise error from problem
        yield number, "", error, {}


def _placed(place: ImageRoot, packed: Mapping[str, bytes], name: str) -> ImageFile:
    content = packed.get(name)
    return place(name) if content is None else PackedImage(name, content)


def _queries(raw: Mapping[str, Any], record: Record) -> tuple[str, ...]:
    query = raw.get("query")
    if isinstance(query, str):
        query = [query]
    if query is None:
        query = [without_markers(q) if isinstance(q, str) else q
                 for q in questions(raw, record.error)]  # fmt: skip
    if not isinstance(query, list) or not all(isinstance(q, str) and q.strip() for q in query):
        raise record.error(f"query must be a text or a list of texts, it is {shown(query)}")
    return tuple(q.replace("<image>", "").strip() for q in query)
