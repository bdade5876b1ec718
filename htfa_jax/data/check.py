"""Looks through a dataset: what would stop a training run, and what the data is like.

    python -m htfa_jax.data.held_objects --num 24 --size 128 --out scenes
    python -m htfa_jax.data.check scenes/train-24-word.jsonl --config debug
    python -m htfa_jax.data.check scenes/train-24-word.jsonl --report report.json \\
        --drop good.jsonl

It sees what a run with the configuration of --config (default: `standard`) would see. Exits with 1
if such a run would stop.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from htfa_jax.common.cli import available_processors, command
from htfa_jax.common.files import whole_file, write_whole
from htfa_jax.common.logs import progress
from htfa_jax.config import Config, override
from htfa_jax.config.io import ConfigFlags, parse_args
from htfa_jax.data.examine import Examiner, RecordProblem, Seen, examine
from htfa_jax.data.hints import hint_lines
from htfa_jax.data.image_values import is_inside
from htfa_jax.data.preprocess import IMAGES, MASKS
from htfa_jax.data.records import Record
from htfa_jax.errors import ConfigError
from weights_convert.on_demand import with_weights

log = logging.getLogger("htfa_jax.check")  # by name: this module is run as __main__ too

# Examples of each problem in the report, and on the terminal.
EXAMPLES, SHOWN = 20, 3
# Different answers that are counted one by one, for each kind of question.
MAX_LABELS = 10_000
LOG_SECONDS = 10


class Findings:
    """All that was seen of a dataset.

    Args:
      source: its name.
      config: of the run that would use it.
    """

    def __init__(self, source: str, config: Config):
        self.source, self.config = source, config
        self.total = Seen()
        self.bad: set[int] = set()
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[RecordProblem]] = collections.defaultdict(list)
        self.first: dict[str, int] = {}
        self.twice: list[tuple[str, int, int]] = []

    def add(self, seen: Seen) -> None:
        """Adds what some more records hold."""
        total = self.total
        total.records += seen.records
        for problem in seen.problems:
            self.bad.add(problem.record)
            self.counts[problem.kind] += 1
            if len(self.examples[problem.kind]) < EXAMPLES:
                self.examples[problem.kind].append(problem)
        for name, index in seen.ids:
            if (first := self.first.setdefault(name, index)) != index:
                self.twice.append((name, first, index))
        for name in ("sizes", "fields", "lengths"):
            getattr(total, name).update(getattr(seen, name))
        total.hints.add(seen.hints)
        total.answers += seen.answers
        total.cut += seen.cut
        for kind, labels in seen.labels.items():
            known = total.labels.setdefault(kind, collections.Counter())
            for label, count in labels.items():
                full = len(known) >= MAX_LABELS and label not in known
                known["(others)" if full else label] += count

    @property
    def stops(self) -> bool:
        """Whether a run would stop."""
        data = self.config.data
        return len(self.bad) > (data.max_bad_records if data.on_error == "skip" else 0)

    def report(self, records: int) -> dict[str, Any]:
        """Everything as JSON values; `records` is how many there are."""
        total, lengths = self.total, self.total.lengths
        tokens = np.array(sorted(lengths.elements()), np.int64)
        return {
            "source": self.source,
            "records": records,
            "checked": total.records,
            "bad_records": len(self.bad),
            "training_would_stop": self.stops,
            "problems": {
                kind: {
                    "count": count,
                    "examples": [
                        {"file": self.source, **dataclasses.asdict(problem)}
                        for problem in self.examples[kind]
                    ],
                }
                for kind, count in self.counts.most_common()
            },
            "duplicate_ids": {
                "count": len(self.twice),
                "examples": [
                    {"id": name, "records": [first, again]}
                    for name, first, again in self.twice[:EXAMPLES]
                ],
            },
            "image_sizes": {f"{w}x{h}": n for (w, h), n in total.sizes.most_common()},
            "fields": dict(total.fields),
            **total.hints.report(),
            "tokens": {
                "max_text_length": self.config.data.max_text_length,
                "median": float(np.median(tokens)) if len(tokens) else None,
                "longest": int(tokens[-1]) if len(tokens) else None,
                "up_to": _histogram(tokens),
            },
            "answers": {
                "count": total.answers,
                "cut": total.cut,
                "cut_share": total.cut / max(total.answers, 1),
            },
            "labels": {
                kind: {"different": len(labels), "most_common": dict(labels.most_common(EXAMPLES))}
                for kind, labels in total.labels.items()
            },
        }


def _histogram(lengths: np.ndarray) -> dict[str, int]:
    """How many lengths are at most a power of two, and above the one before."""
    if not len(lengths):
        return {}
    bins = np.ceil(np.log2(lengths)).astype(int)
    counts = np.bincount(bins)
    return {str(2**i): int(counts[i]) for i in range(bins.min(), bins.max() + 1)}


def findings_table(report: dict[str, Any]) -> str:
    """A report as text."""
    lines = [f"{report['checked']} of {report['records']} records of {report['source']}", ""]
    for kind, problem in report["problems"].items():
        lines.append(f"{kind}: {problem['count']}")
        lines += [f"  {example['reason']}" for example in problem["examples"][:SHOWN]]
    if twice := report["duplicate_ids"]["count"]:
        shown = (
            f"{e['id']} (records {e['records'][0]} and {e['records'][1]})"
            for e in report["duplicate_ids"]["examples"][:SHOWN]
        )
        lines.append(f"ids that come again: {twice}, such as {', '.join(shown)}; training does "
                     "not mind, an evaluation cannot tell them apart")  # fmt: skip
    hints = hint_lines(report)
    if hints:
        lines += [
            "this stops no run, but may be meant otherwise:",
            *(f"  {hint}" for hint in hints),
        ]
    elif not report["problems"]:
        lines.append("nothing wrong")
    tokens, answers = report["tokens"], report["answers"]
    sizes = list(report["image_sizes"].items())
    more = f", and {len(sizes) - 8} more sizes" if len(sizes) > 8 else ""
    lines += [
        "",
        "images: " + ", ".join(f"{n} of {size}" for size, n in sizes[:8]) + more,
        "records with " + ", ".join(f"{f}: {n}" for f, n in report["fields"].items()),
        *(
            f"{field}: {facts['count']}, share of the image that is true: least "
            f"{facts['share']['least']:.1%}, median {facts['share']['median']:.1%}, most "
            f"{facts['share']['most']:.1%}; empty: {facts['empty']}"
            for field, facts in report["masks"].items()
        ),
        f"tokens: median {tokens['median']}, longest {tokens['longest']}; up to "
        + ", ".join(f"{edge}: {n}" for edge, n in tokens["up_to"].items()),
        f"answers: {answers['count']}, of which data.max_text_length="
        f"{tokens['max_text_length']} cuts {answers['cut']} ({answers['cut_share']:.1%})",
    ]
    for kind, labels in report["labels"].items():
        common = list(labels["most_common"].items())[:8]
        shown = ", ".join(f"{text[:40]!r} {n}" for text, n in common)
        lines.append(f"{kind}: {labels['different']} different answers, most often {shown}")
    what = "would stop" if report["training_would_stop"] else "would not stop"
    lines += ["", f"{report['bad_records']} bad records: training {what}"]
    return "\n".join(lines)


def as_line(record: Record, folder: Path) -> str:
    """A record in this project's form, as a line of a file in `folder`.

    Paths are relative to it where they lead into it, absolute elsewhere: such a file is read with
    a `data.image_root` that holds them.
    """

    def path(image: Any) -> str:
        image = getattr(image, "path", image)  # of a drawn scene
        if not isinstance(image, Path):
            raise record.error(
                f"{image} is no file of its own, which JSON lines could name", "record"
            )
        whole = Path(os.path.abspath(image))
        return str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole)

    raw = record.raw
    own = {
        **raw,
        "object_mask": raw.get("object_mask", raw.get("occlusion_mask")),
    }
    images = {
        name: own[name] if is_inside(own.get(name)) else path(image)
        for name in (*IMAGES, *MASKS)
        if (image := getattr(record, name)) is not None
    }
    rest = {name: x for name, x in record.raw.items() if name != "occlusion_mask"}
    return json.dumps({**rest, **images}, ensure_ascii=False) + "\n"


def check(
    config: Config,
    source: str,
    *,
    limit: int | None = None,
    drop: Path | None = None,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Looks through a dataset. Returns the report.

    Args:
      config: of the run that would use it.
      source: as `data.train`.
      limit: only so many of its first records.
      drop: where a JSON-lines file of the good records goes.
      num_workers: processes; None for one per processor.

    Raises DataError if it cannot be opened, or a worker process dies.
    """
    from htfa_jax.data.splits import open_split, open_tokenizer

    # A bad record stops nothing here.
    config = override(config, {"data.train": source, "data.sources": ()})
    lenient = override(config, {"data.on_error": "skip"})
    records = open_split(config, "train")
    num = len(records) if limit is None else min(limit, len(records))
    findings = Findings(source, config)
    folder = None if drop is None else Path(os.path.abspath(drop)).parent
    write = None if folder is None else functools.partial(as_line, folder=folder)
    with (
        tempfile.TemporaryDirectory() as workdir,
        progress(num, "check", unit="record") as bar,
        _new_file(drop) as file,
    ):
        tokenizer = open_tokenizer(lenient, Path(workdir), records)
        examiner = Examiner(records, tokenizer, config, write)
        said = time.monotonic()
        for seen in examine(examiner, num, num_workers or available_processors()):
            findings.add(seen)
            if file is not None:
                file.writelines(seen.lines)
            bar.update(seen.records)
            if bar.disable and time.monotonic() - said > LOG_SECONDS:
                said = time.monotonic()
                log.info("%d of %d records, %d bad", findings.total.records, num, len(findings.bad))
    return findings.report(len(records))


@contextlib.contextmanager
def _new_file(path: Path | None) -> Iterator[Any]:
    """A file to write to that is there when it is whole; None without a path."""
    if path is None:
        yield None
        return
    if path.exists():
        raise ConfigError(f"--drop {path} exists already: give another name, or delete it")
    try:
        with whole_file(path) as file:
            yield file
    except OSError as error:
        raise ConfigError(f"--drop {path} cannot be written: {error}") from error


@dataclasses.dataclass(frozen=True)
class CheckArgs:
    """Options of the command."""

    config: ConfigFlags
    # What data.train would be.
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")] = ""
    limit: int | None = None  # look only at so many of its first records
    report: Path | None = None  # write everything that was found to this JSON file
    drop: Path | None = None  # write the good records to this JSON-lines file
    num_workers: int | None = None  # processes (default: one per processor)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse_args(
        CheckArgs,
        argv,
        description=__doc__,
        resolve=lambda args, base: with_weights(args.config, base),
    )
    if not args.source:
        raise ConfigError("which dataset? python -m htfa_jax.data.check SOURCE (--help shows more)")
    for name in ("limit", "num_workers"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    found = check(
        args.config,
        args.source,
        limit=args.limit,
        drop=args.drop,
        num_workers=args.num_workers,
    )
    print(findings_table(found))
    if args.report is not None:
        text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
        write_whole(args.report, text)
        print(f"written to {args.report}")
    if args.drop is not None:
        print(f"{found['checked'] - found['bad_records']} good records written to {args.drop}")
    if found["training_would_stop"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
