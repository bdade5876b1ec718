"""Answers and completed pictures from the command line.

python -m htfa_jax.infer --checkpoint runs/x --image_orig a.jpg --image_recon b.png \\
    --query "What's the object in the hand?" --output_dir out
python -m htfa_jax.infer --checkpoint runs/x --input pairs.jsonl --output_dir out
python -m htfa_jax.infer --demo
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from htfa_jax.answer_attention import View
from htfa_jax.commands import command, use_compilation_cache
from htfa_jax.config import Config
from htfa_jax.config_io import load_config
from htfa_jax.data.decode import decode_field, load_image
from htfa_jax.data.places import StoredPicture
from htfa_jax.data.records import ROLES, Dataset, Record, parse_record
from htfa_jax.errors import ConfigError, DataError
from htfa_jax.files import write_whole
from htfa_jax.inference import HTFAInference
from htfa_jax.inference_weights import Quantize
from htfa_jax.pairs import FIELDS, as_record
from htfa_jax.report_html import PREDICTIONS, write_report
from htfa_jax.results import Completion, Result
from htfa_jax.runs import find_run
from htfa_jax.sampling import Decoding

log = logging.getLogger("htfa_jax.infer")  # by name: this module is run as __main__ too

SCRIPT, EXAMPLE = "infer.sh", "example"
# A finished small model, and scenes that it has not seen.
DEMO, EXAMPLES = Path(__file__).parent / "tiny" / "demo", "examples/pairs.jsonl"
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class InferArgs:
    """Answers questions about picture pairs with a trained run, and completes the pictures."""

    checkpoint: Path | None = None  # a run, RUN/checkpoints/STEP, an exported run or its hub id
    output_dir: Path | None = None  # predictions.jsonl and pictures go here
    demo: bool = False  # this package's small model, on its example scenes if no pair is given
    image_orig: Path | None = None  # the original, where something hides the object
    image_recon: Path | None = None  # the reconstruction; without it the model paints one first
    object_mask: Path | None = None  # white where the object is, its hidden part included
    occluder_mask: Path | None = None  # white where something covers the original
    bbox_orig: Box | None = None  # x y width height of the object in the original's pixels
    bbox_recon: Box | None = None  # the same in the reconstruction's
    query: tuple[str, ...] = ()  # one or several questions (default: data.default_query)
    input: Path | None = None  # many pairs: JSON lines with the fields above, query and id
    batch_size: int = 8  # pairs at a time
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = Decoding()
    completion: Completion = Completion()
    visualize: bool = False  # figures of every pair, and report.html with all of them
    attention: View = View()  # of the answers' attention, in the figures
    device: str | None = None  # "cpu", "gpu" or "tpu" (default: JAX's choice)
    quantize: Quantize | None = None  # keep the decoder's weights in 8 bits
    revision: str | None = None  # of a hub repository: branch, tag or commit


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


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = tyro.cli(InferArgs, args=argv, use_underscores=True)
    if args.demo:
        args = of_the_demo(args)
    for name in ("checkpoint", "output_dir"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} is missing (--help shows all options; --demo needs none)")
    if (args.input is None) == (args.image_orig is None):
        raise ConfigError("give either --image_orig (one pair) or --input (many)")
    workdir, step = find_run(args.checkpoint, args.revision)
    use_compilation_cache(load_config(workdir))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / PREDICTIONS
    jobs = [one_pair(args)] if args.input is None else read_jobs(args.input, args.query)
    done = set() if args.input is None else keep_finished(path)
    todo = [job for job in jobs if job.id not in done]
    if len(todo) < len(jobs):
        log.info("%d of %d pairs are in %s already", len(jobs) - len(todo), len(jobs), path)
    if todo:
        checkpoint = workdir if step is None else args.checkpoint
        engine = HTFAInference(checkpoint, device=args.device, quantize=args.quantize)
        failed = run(engine, todo, path, args, fresh=args.input is None)
        if failed:
            print(f"{failed} of {len(todo)} pairs failed: see `error` in {path}", file=sys.stderr)
    if args.visualize:
        write_report(args.output_dir, f"{args.output_dir.resolve().name}: {workdir.name}")
    print(f"written to {args.output_dir}")
    if todo and failed == len(todo):
        sys.exit(2)


def of_the_demo(args: InferArgs) -> InferArgs:
    """The options with the demo model, its scenes and a folder where the user gave none."""
    if args.checkpoint is not None:
        raise ConfigError("--demo brings its own model: leave --checkpoint out")
    pairs = DEMO / EXAMPLES if (args.input or args.image_orig) is None else args.input
    folder = args.output_dir or Path("demo")
    return dataclasses.replace(args, checkpoint=DEMO, input=pairs, output_dir=folder)


def one_pair(args: InferArgs) -> Job:
    """The pair of the command line."""
    pair = {field: getattr(args, field) for field in FIELDS}
    record = as_record({"id": args.image_orig.stem, **pair}, "the command line")
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


def run(engine: HTFAInference, jobs: list[Job], path: Path, args: InferArgs, fresh: bool) -> int:
    """Writes one line per job, as soon as it is there. Returns how many failed."""
    failed = 0
    good = [job for job in jobs if isinstance(job.record, Record)]
    results = engine.iterate(
        [job.record for job in good],
        [list(job.queries) if job.queries else [None] for job in good],
        batch_size=args.batch_size,
        decoding=args.decoding,
        completion=args.completion,
        return_intermediates=args.visualize,
    )
    with path.open("w" if fresh else "a", encoding="utf-8") as file:
        for job in jobs:
            if isinstance(job.record, Record):
                entry = _entry(job, next(results), args)
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


def _entry(job: Job, results: list[Result], args: InferArgs) -> dict[str, Any]:
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
        _folder(args, "completed")
        first.completed.save(args.output_dir / entry["completed"])
    if args.visualize:
        entry["figures"] = _draw(job, results, args, name.removesuffix(".png"))
    return entry


def _draw(job: Job, results: list[Result], args: InferArgs, name: str) -> dict[str, str]:
    """Writes the figures of a pair. Returns their paths by kind."""
    # Only here: matplotlib takes a second to load, which an answer need not wait for.
    from htfa_jax.look_inside import figures, png

    _folder(args, "figures")
    paths = {}
    for kind, figure in figures(*results, truth=_truth(job.record), view=args.attention).items():
        paths[kind] = f"figures/{name}_{kind}.png"
        (args.output_dir / paths[kind]).write_bytes(png(figure))
    return paths


def _folder(args: InferArgs, name: str) -> None:
    (args.output_dir / name).mkdir(exist_ok=True)


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


def write_example(workdir: Path, config: Config, records: Dataset) -> None:
    """Puts a pair of the data and `infer.sh`, which looks at it, into a run's workdir."""
    record = next((r for r in _readable(records)), None)
    if record is None:
        return
    folder = workdir / EXAMPLE
    folder.mkdir(exist_ok=True)
    words = ["--checkpoint", ".", "--output_dir", f"{EXAMPLE}/out"]
    for field in FIELDS:
        value = getattr(record, field)
        if isinstance(value, Path | StoredPicture):
            name = f"{EXAMPLE}/{field}{value.suffix}"
            (workdir / name).write_bytes(value.read_bytes())
            words += [f"--{field}", name]
        elif value is not None:
            words += [f"--{field}", *map(str, value)]
    questions = [turn.text for turn in record.turns if turn.role == "user"]
    words += ["--query", *dict.fromkeys(questions or [config.data.default_query])]
    script = workdir / SCRIPT
    script.write_text(
        "#!/bin/sh\n"
        "# Asks this run about a pair of its data; more options behind it are passed on.\n"
        'cd "$(dirname "$0")" || exit\n'
        f'exec "${{PYTHON:-{sys.executable}}}" -m htfa_jax.infer {shlex.join(words)} "$@"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)


def _readable(records: Dataset):
    for i in range(len(records)):
        try:
            record = records[i]
        except DataError:
            continue
        paths = [getattr(record, field) for field in FIELDS[:4]]
        if all(path is None or path.is_file() for path in paths):
            yield record


if __name__ == "__main__":
    main()
