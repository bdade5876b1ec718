"""Which results of an earlier call still hold: those of the same pair, model, question and options.

Each line of predictions.jsonl says, by hashes, what it was made from (`made_from`). A folder so
never shows one input's or one model's answers as another's.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from htfa_jax.checkpoints.loading import content_of
from htfa_jax.common.files import write_whole
from htfa_jax.common.hashing import bytes_sha256, file_sha256, short_hash
from htfa_jax.common.json_files import json_lines, parse_json
from htfa_jax.common.names import inside
from htfa_jax.data.records import Record
from htfa_jax.errors import DataError
from htfa_jax.inference.inputs import FIELDS, PredictionJob

MADE_FROM = "made_from"
# What a line's hashes are of, and how a message calls it.
SORTS = {
    "pair": "another pair",
    "questions": "other questions",
    "model": "another model",
    "options": "other options",
}
# Folders beside the file that its lines name images in.
IMAGES = ("completed", "figures")

log = logging.getLogger("htfa_jax.infer")

Hashes = dict[str, str]


def model_hash(checkpoint: str | Path, revision: str | None = None) -> str:
    """Tells a model from others by content: weights of its step, configuration, tokenizer.

    Args:
      checkpoint, revision: as `load_run` takes them.

    Raises CheckpointError if there is no such model.
    """
    return short_hash(content_of(checkpoint, revision))


def made_from(job: PredictionJob, model: str, options: Sequence[Any]) -> Hashes:
    """What the result of a pair depends on, by `SORTS`; images count by their content.

    Args:
      job: the pair and its questions.
      model: its `model_hash`.
      options: JSON values.
    """
    return {
        "pair": short_hash(_pair(job)),
        "questions": short_hash(list(job.queries or [])),
        "model": model,
        "options": short_hash(options),
    }


def _pair(job: PredictionJob) -> list[Any]:
    record = job.record
    if not isinstance(record, Record):
        return [str(record)]
    return [_content(getattr(record, field)) for field in (*FIELDS, "image_target")]


def _content(value: Any) -> Any:
    """An image by the hash of its bytes, wherever it lies; a box as it is."""
    try:
        if isinstance(value, Path):
            return file_sha256(value)
        if hasattr(value, "read_bytes"):
            return bytes_sha256(value.read_bytes())
    except OSError:
        return "cannot be read"
    return value if value is None else list(value)


def keep_finished(
    path: Path, jobs: Mapping[str, Callable[[], Hashes]] | None = None, folder: Path | None = None
) -> set[str]:
    """Ids of the pairs that a file of predictions answers; all other lines go, with their images.

    What is no answer goes, and a new start tries it again: errors, a last line that was cut off
    while it was written, lines that something else wrote. So does what was made of something
    else, which one line of the log says.

    Args:
      path: of the predictions.
      jobs: what each pair of this call depends on, by id (`made_from`); None keeps all answers.
      folder: that holds the images; the file's own by default.
    """
    if not path.is_file():
        return set()
    kept, ids = [], set[str]()
    stale: collections.Counter[str] = collections.Counter()
    dropped: list[Mapping[str, Any]] = []
    for number, line in json_lines(path, DataError):
        try:
            entry = parse_json(line, f"{path}, line {number}", DataError, allow_nan=True)
        except DataError:
            continue
        if "id" not in entry or "error" in entry:
            continue
        name = str(entry["id"])
        reason = None if jobs is None else _difference(entry, jobs.get(name))
        if reason is None:
            kept.append(line.rstrip(b"\r\n") + b"\n")
            ids.add(name)
        else:
            stale[reason] += 1
            dropped.append(entry)
    write_whole(path, b"".join(kept), durable=True)
    for entry in dropped:
        _delete_images(entry, folder or path.parent)
    if stale:
        reasons = ", ".join(f"{n} of {reason}" for reason, n in stale.items())
        log.info("%d results in %s are dropped or made again: %s", stale.total(), path, reasons)
    return ids


def _difference(entry: Mapping[str, Any], job: Callable[[], Hashes] | None) -> str | None:
    """What an answer was made of that a pair is not; None if it is this pair's."""
    if job is None:
        return "pairs that are not in this input"
    before, now = entry.get(MADE_FROM), job()
    if not isinstance(before, Mapping):
        return "an earlier version, which did not say of what"
    return next((said for sort, said in SORTS.items() if before.get(sort) != now[sort]), None)


def _delete_images(entry: Mapping[str, Any], folder: Path) -> None:
    figures = entry.get("figures")
    names = [entry.get("completed"), *(figures.values() if isinstance(figures, Mapping) else [])]
    for name in names:
        # A line may name anything: only what this command writes is deleted.
        if not isinstance(name, str) or name.split("/")[0] not in IMAGES or name.count("/") != 1:
            continue
        try:
            inside(folder, name).unlink(missing_ok=True)
        except (ValueError, OSError) as error:
            log.warning("%s is not deleted: %s", folder / name, error)
