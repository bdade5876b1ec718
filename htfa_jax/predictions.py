"""Pairs that a command names, one after the other into `predictions.jsonl`, pictures beside it."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from htfa_jax.data.decode import decode_field, load_image
from htfa_jax.data.records import ROLES, Record, parse_record
from htfa_jax.errors import DataError
from htfa_jax.files import write_whole
from htfa_jax.inference import HTFAInference
from htfa_jax.pairs import FIELDS, as_record
from htfa_jax.report_html import PREDICTIONS
from htfa_jax.results import Result

if TYPE_CHECKING:
    from htfa_jax.infer import InferArgs

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
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


def predict(args: InferArgs, checkpoint: str | Path, folder: Path) -> tuple[int, int]:
    """Answers what is not answered yet. Returns how many pairs failed, of how many.

    Args:
      args: options of the command.
      checkpoint: as `HTFAInference` takes it.
      folder: for the predictions and their pictures.
    """
    path, done = folder / PREDICTIONS, set[str]()
    if args.input is None:
        jobs = [one_pair(args)]
    else:
        jobs, done = read_jobs(args.input, args.query), keep_finished(path)
    todo = [job for job in jobs if job.id not in done]
    if len(todo) < len(jobs):
        log.info("%d of %d pairs are in %s already", len(jobs) - len(todo), len(jobs), path)
    if not todo:
        return 0, 0
    engine = HTFAInference(checkpoint, device=args.device, quantize=args.quantize)
    failed = run(engine, todo, folder, args, fresh=args.input is None)
    if failed:
        print(f"{failed} of {len(todo)} pairs failed: see `error` in {path}", file=sys.stderr)
    return failed, len(todo)


def one_pair(args: InferArgs) -> Job:
    """The pair of the command line."""
    pair = {field: getattr(args, field) for field in FIELDS}
    record = as_record({"id": Path(str(args.image_orig)).stem, **pair}, "the command line")
    return Job(0, record.id, record, args.query or None)


def read_jobs(path: Path, queries: tuple[str, ...]) -> list[Job]:
    """The lines of a file of pairs.

    A line has the fields of a dataset's record. Its questions are `query` (a text or a list),
    else the user turns of its `conversations`, else those of the command line.

    Raises DataError if there is no file, or an id comes twice.
    """
    if not path.is_file():
        raise DataError(f"--input: no file at {path}; expected JSON lines, one pair in each")
    jobs: list[Job] = []
    # Not splitlines(): it also cuts at characters that JSON may hold in a text, such as U+2028.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")):
        if not line.strip():
            continue
        where, name = f"{path}, line {number + 1}", str(number)
        try:
            raw = json.loads(line)
            if isinstance(raw, Mapping):
                name = str(raw.get("id", number))
            record = parse_record(raw, where, path.parent.joinpath, with_turns=False)
            job = Job(number, name, record, _queries(raw, record) or queries or None)
        except json.JSONDecodeError as error:
            job = Job(number, name, DataError(f"{where}: not valid JSON: {error}"), None)
        except DataError as error:
            job = Job(number, name, error, None)
        jobs.append(job)
    first: dict[str, int] = {}
    for job in jobs:
        if first.setdefault(job.id, job.number) != job.number:
            raise DataError(
                f"{path}: lines {first[job.id] + 1} and {job.number + 1} have the same id "
                f"{job.id}; a restart could not tell them apart"
            )
    return jobs


def _queries(raw: Mapping[str, Any], record: Record) -> tuple[str, ...]:
    query = raw.get("query")
    if isinstance(query, str):
        query = [query]
    if query is None:
        turns = raw.get("conversations") or []
        query = [t.get("value") for t in turns if ROLES.get(t.get("from")) == "user"]
    if not isinstance(query, list) or not all(isinstance(q, str) and q.strip() for q in query):
        raise record.error(f"query must be a text or a list of texts, it is {query!r}")
    return tuple(q.replace("<image>", "").strip() for q in query)


def keep_finished(path: Path) -> set[str]:
    """Ids of the pairs that a file of predictions answers.

    A last line that was cut off while it was written goes, and so do errors, which a new start
    tries again.
    """
    if not path.is_file():
        return set()
    kept, ids = [], set()
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and "error" not in entry:
            kept.append(line + "\n")
            ids.add(str(entry["id"]))
    write_whole(path, "".join(kept))
    return ids


def run(engine: HTFAInference, jobs: list[Job], folder: Path, args: InferArgs, fresh: bool) -> int:
    """Writes one line per job, as soon as it is there. Returns how many failed."""
    failed = 0
    pairs = [r for job in jobs if isinstance(r := job.record, Record)]
    asked = [job.queries or [None] for job in jobs if isinstance(job.record, Record)]
    results = engine.iterate(
        pairs,
        asked,
        batch_size=args.batch_size,
        decoding=args.decoding,
        completion=args.completion,
        return_intermediates=args.visualize,
    )
    with (folder / PREDICTIONS).open("w" if fresh else "a", encoding="utf-8") as file:
        for job in jobs:
            if isinstance(job.record, Record):
                found = next(results)
                rows = found if isinstance(found, list) else [found]
                entry = _entry(job, job.record, rows, args, folder)
            else:
                entry = {"id": job.id, "error": str(job.record)}
            failed += "error" in entry
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            if args.demo:
                print(f"\n{job.id}")
            if fresh or args.demo:
                _show(entry)
    return failed


def _entry(
    job: Job, record: Record, results: list[Result], args: InferArgs, folder: Path
) -> dict[str, Any]:
    """The line of a pair; its pictures are written first."""
    first = results[0]
    if first.error is not None:
        return {"id": job.id, "error": first.error}
    entry: dict[str, Any] = {
        "id": job.id,
        "answers": [
            {"query": r.query, "answer": r.answer, "confidence": r.confidence} for r in results
        ],
        "alignment": first.alignment,
        "reconstruction": first.recon_source,
    }
    name = f"{job.number:06d}_{re.sub(r'[^A-Za-z0-9._-]', '_', job.id)}.png"
    if first.completed is not None:
        entry["completed"] = f"completed/{name}"
        (folder / "completed").mkdir(exist_ok=True)
        first.completed.save(folder / entry["completed"])
    if args.visualize:
        entry["figures"] = _draw(record, results, args, folder, name.removesuffix(".png"))
    return entry


def _draw(
    record: Record, results: list[Result], args: InferArgs, folder: Path, name: str
) -> dict[str, str]:
    """Writes the figures of a pair. Returns their paths by kind."""
    # Only here: matplotlib takes a second to load, which an answer need not wait for.
    from htfa_jax.look_inside import figures, png

    (folder / "figures").mkdir(exist_ok=True)
    paths = {}
    for kind, figure in figures(*results, truth=_truth(record), view=args.attention).items():
        paths[kind] = f"figures/{name}_{kind}.png"
        (folder / paths[kind]).write_bytes(png(figure))
    return paths


def _truth(record: Record) -> Image.Image | None:
    try:
        return decode_field(record, "image_target", load_image)
    except DataError as error:
        # Nothing else needs it.
        log.warning("%s", error)
        return None


def _show(entry: dict[str, Any]) -> None:
    if "error" in entry:
        print(f"error: {entry['error']}", file=sys.stderr)
        return
    for answer in entry["answers"]:
        confidence = answer["confidence"]
        sure = "" if confidence is None else f"  (confidence {confidence:.2f})"
        print(f"{answer['query']}\n  {answer['answer']}{sure}")
    print(f"aligned by {entry['alignment']}; reconstruction: {entry['reconstruction']}")
