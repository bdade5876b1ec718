"""Answers questions about image pairs with a trained run, and completes the images.

    python -m htfa_jax.infer --demo --visualize
    python -m htfa_jax.infer --checkpoint runs/a --input scenes/train-24-word.jsonl \\
        --output_dir answers
    python -m htfa_jax.infer --checkpoint runs/a --output_dir answer \\
        --image_orig scenes/train/orig/000000.jpg --image_recon scenes/train/recon/000000.png \\
        --query "What's the object in the hand?" "What color is it?"

The first needs nothing: a small trained model and its scenes are in this package. runs/a is what
`htfa_jax.train` wrote, scenes/ what `htfa_jax.data.held_objects --num 24 --out scenes` draws. Of
many pairs, those that predictions.jsonl answers already are left out: the same pairs, asked the
same by the same model. What is there of anything else goes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from htfa_jax.checkpoints.runs import DEMO, EXAMPLES, find_run
from htfa_jax.common.cli import command, parse, use_compilation_cache
from htfa_jax.common.compiling import compiling
from htfa_jax.common.files import make_folder, write_whole, writing
from htfa_jax.config.renamed import current_flags
from htfa_jax.errors import ConfigError, DataError
from htfa_jax.evaluation.report_html import PREDICTIONS, REPORT
from htfa_jax.inference.options import Completion, Decoding, Quantize, View

if TYPE_CHECKING:
    from PIL import Image

    from htfa_jax.data.records import Record
    from htfa_jax.inference.engine import HTFAInference
    from htfa_jax.inference.inputs import PredictionJob
    from htfa_jax.inference.results import Result

# What loads JAX, matplotlib or PIL is imported where it is used: `--help` must be quick.

log = logging.getLogger("htfa_jax.infer")  # by name: this module is run as __main__ too

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class InferArgs:
    """Options of the command."""

    checkpoint: Path | None = None  # a run, RUN/checkpoints/STEP, an exported run or its hub id
    output_dir: Path | None = None  # predictions.jsonl and images go here
    demo: bool = False  # this package's small model, on its example scenes if no pair is given
    image_orig: Path | None = None  # the original, where something hides the object
    image_recon: Path | None = (
        None  # the reconstruction; without it the model completes the original first
    )
    object_mask: Path | None = None  # white where the object is, its occluded part included
    occluder_mask: Path | None = None  # white where something covers the original
    bbox_orig: Box | None = None  # x y width height of the object in the original's pixels
    bbox_recon: Box | None = None  # the same in the reconstruction's
    query: tuple[str, ...] = ()  # one or several questions (default: data.default_query)
    input: Path | None = None  # many pairs: JSON lines with the fields above, query and id
    image_root: Path | None = None  # folder that holds the images of --input (default: its own)
    batch_size: int = 8  # pairs at a time
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = Decoding()
    completion: Completion = Completion()
    visualize: bool = False  # figures of every pair, and report.html with all of them
    attention: View = View()  # of the answers' attention, in the figures
    device: str | None = None  # "cpu", "gpu" (or "cuda"), "tpu", "gpu:1" (default: JAX's choice)
    quantize: Quantize | None = None  # keep the decoder's weights in 8 bits
    revision: str | None = None  # of a hub repository: branch, tag or commit


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(InferArgs, current_flags(argv or []), __doc__)
    if args.demo:
        args = with_demo_defaults(args)
    checkpoint, folder = required(args, "checkpoint"), required(args, "output_dir")
    if (args.input is None) == (args.image_orig is None):
        raise ConfigError("give either --image_orig (one pair) or --input (many)")
    if args.image_root is not None and args.input is None:
        raise ConfigError("--image_root is of the images that --input names: leave it out")
    from htfa_jax.inference.devices import find_device

    find_device(args.device)  # before anything is fetched or made
    workdir, step = find_run(checkpoint, args.revision)
    use_compilation_cache()
    make_folder(folder, "--output_dir")
    failed, tried = predict(args, workdir if step is None else checkpoint, folder)
    if args.visualize:
        from htfa_jax.evaluation.report_html import write_report

        write_report(folder, f"{folder.resolve().name}: {workdir.name}")
    print(f"written to {folder}")
    if tried and failed == tried:
        sys.exit(2)


def required(args: InferArgs, name: str) -> Path:
    """An option that cannot do without a value. Raises ConfigError if it has none."""
    value = getattr(args, name)
    if value is None:
        raise ConfigError(f"--{name} is missing (--help shows all options; --demo needs none)")
    return value


def with_demo_defaults(args: InferArgs) -> InferArgs:
    """The options with the demo model, its scenes and a folder where the user gave none."""
    if args.checkpoint is not None:
        raise ConfigError("--demo brings its own model: leave --checkpoint out")
    pairs = DEMO / EXAMPLES if (args.input or args.image_orig) is None else args.input
    folder = args.output_dir or Path("demo")
    return dataclasses.replace(args, checkpoint=DEMO, input=pairs, output_dir=folder)


def predict(args: InferArgs, checkpoint: str | Path, folder: Path) -> tuple[int, int]:
    """Answers what is not answered yet. Returns how many pairs failed, of how many.

    Args:
      args: options of the command.
      checkpoint: as `HTFAInference` takes it.
      folder: for the predictions and their images.
    """
    from htfa_jax.inference import kept
    from htfa_jax.inference.inputs import read_jobs

    path = folder / PREDICTIONS
    jobs = (
        [one_pair(args)]
        if args.input is None
        else read_jobs(args.input, args.query, args.image_root)
    )
    view = dataclasses.asdict(args.attention) if args.visualize else None
    options = [
        dataclasses.asdict(args.decoding),
        dataclasses.asdict(args.completion),
        args.quantize,
        view,
    ]
    model = kept.model_hash(checkpoint, args.revision)
    made_from = {
        job.id: functools.cache(functools.partial(kept.made_from, job, model, options))
        for job in jobs
    }
    # One pair is always asked again, as somebody waits for it.
    done = kept.keep_finished(path, made_from if args.input is not None else {})
    todo = [job for job in jobs if job.id not in done]
    if len(todo) < len(jobs):
        log.info("%d of %d pairs are in %s already", len(jobs) - len(todo), len(jobs), path)
    if not todo:
        return 0, 0
    (folder / REPORT).unlink(missing_ok=True)  # of the results until now
    from htfa_jax.inference.engine import HTFAInference

    engine = HTFAInference(checkpoint, device=args.device, quantize=args.quantize)
    failed = run(engine, todo, folder, args, made_from)
    if failed:
        print(f"{failed} of {len(todo)} pairs failed: see `error` in {path}", file=sys.stderr)
    return failed, len(todo)


def one_pair(args: InferArgs) -> PredictionJob:
    """The pair of the command line."""
    from htfa_jax.inference.inputs import FIELDS, PredictionJob, as_record

    pair = {field: getattr(args, field) for field in FIELDS}
    record = as_record({"id": Path(str(args.image_orig)).stem, **pair}, "the command line")
    return PredictionJob(0, record.id, record, args.query or None)


def run(
    engine: HTFAInference,
    jobs: list[PredictionJob],
    folder: Path,
    args: InferArgs,
    made_from: Mapping[str, Callable[[], dict[str, str]]],
) -> int:
    """Writes one line per job, as soon as it is there. Returns how many failed."""
    from htfa_jax.data.records import Record
    from htfa_jax.inference.kept import MADE_FROM

    failed, fresh = 0, args.input is None
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
    path = folder / PREDICTIONS
    with writing(path), path.open("a", encoding="utf-8") as file:
        waiting = contextlib.nullcontext() if not pairs else compiling("for the first pairs")
        for number, job in enumerate(jobs, start=1):
            if isinstance(job.record, Record):
                with waiting:
                    found = next(results)
                waiting = contextlib.nullcontext()
                rows = found if isinstance(found, list) else [found]
                entry = _entry(job, job.record, rows, args, folder)
            else:
                entry = {"id": job.id, "error": str(job.record)}
            failed += "error" in entry
            entry[MADE_FROM] = made_from[job.id]()
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            if not sys.stderr.isatty():  # where there is no bar
                said = "failed" if "error" in entry else "done"
                log.info("pair %d of %d, %s: %s", number, len(jobs), job.id, said)
            if args.demo:
                print(f"\n{job.id}")
            if fresh or args.demo:
                _show(entry)
    return failed


def _entry(
    job: PredictionJob, record: Record, results: list[Result], args: InferArgs, folder: Path
) -> dict[str, Any]:
    """The line of a pair; its images are written first."""
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
    name = f"{job.number:06d}_{re.sub(r'[^A-Za-z0-9._-]', '_', job.id[:80])}.png"
    if first.completed is not None:
        entry["completed"] = f"completed/{name}"
        (folder / "completed").mkdir(exist_ok=True)
        with writing(folder / entry["completed"]) as path:
            first.completed.save(path)
    if args.visualize:
        entry["figures"] = _draw(record, results, args, folder, name.removesuffix(".png"))
    return entry


def _draw(
    record: Record, results: list[Result], args: InferArgs, folder: Path, name: str
) -> dict[str, str]:
    """Writes the figures of a pair. Returns their paths by kind."""
    from htfa_jax.evaluation.look_inside import figures, png

    (folder / "figures").mkdir(exist_ok=True)
    paths = {}
    for kind, figure in figures(*results, truth=_truth(record), view=args.attention).items():
        paths[kind] = f"figures/{name}_{kind}.png"
        write_whole(folder / paths[kind], png(figure))
    return paths


def _truth(record: Record) -> Image.Image | None:
    from htfa_jax.data.decode import decode_field, load_image

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
        said_confidence = "" if confidence is None else f"  (confidence {confidence:.2f})"
        print(f"{answer['query']}\n  {answer['answer']}{said_confidence}")
    print(f"aligned by {entry['alignment']}; reconstruction: {entry['reconstruction']}", flush=True)


if __name__ == "__main__":
    main()
