"""Times and memory of a JSON-lines file of a million records.

    python scripts/benchmarks/record_sources.py --records 1000000 --out benchmark

Writes a file of records that share a few images, then measures, each in a process of its own: the
time to index it, the bytes of the index, the resident memory of a process that reads records from
it at random, and the time from the start of the pipeline to its first batch without and with worker
processes. What a process imports is told apart: it does not grow with the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from htfa_jax.common.cli import parse
from htfa_jax.common.files import whole_file

IMAGES = 64
NAMES = ("image_orig", "image_recon")


def write_file(folder: Path, num: int, size: int) -> Path:
    """Records of 64 images of `size` pixels, each record with its own id and answer."""
    path = folder / f"records-{num}-{size}.jsonl"
    if path.is_file():
        return path
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(IMAGES):
        coarse = rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{size}-{i}.jpg", quality=90)
    with whole_file(path) as file:
        for i in range(num):
            names = {name: f"images/{size}-{(i + k) % IMAGES}.jpg"
                     for k, name in enumerate(NAMES)}  # fmt: skip
            record = {
                "id": f"{i:08d}",
                **names,
                "bbox_orig": [10, 20, 100, 120],
                "bbox_recon": [30, 20, 90, 110],
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat's the object in the hand?"},
                    {"from": "gpt", "value": f"The object is number {i}."},
                ],
                "meta": {"category": "bottle", "occlusion": i % 100 / 100},
            }
            file.write(json.dumps(record) + "\n")
    return path


def resident() -> float:
    """Memory of this process that is in RAM and its own, in MB: pages of files do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    return int(values["RssAnon"]) / 1000


def measure_index(path: Path, reads: int) -> dict[str, float]:
    """Opening, the index, and what reading at random adds."""
    from htfa_jax.data.sources.json_lines import RecordFile

    imported = resident()
    started = time.perf_counter()
    records = RecordFile(path)
    seconds = time.perf_counter() - started
    opened = resident()
    order = np.random.default_rng(1).integers(0, len(records), reads)
    started = time.perf_counter()
    for i in order.tolist():
        assert records[i].id == f"{i:08d}"
    return {
        "index_seconds": seconds,
        "index_bytes_per_record": len(pickle.dumps(records)) / len(records),
        "imported_mb": imported,
        "opened_mb": opened - imported,
        "after_reads_mb": resident() - imported,
        "read_microseconds": (time.perf_counter() - started) / reads * 1e6,
    }


def measure_first_batch(path: Path, workers: int, tokenizer: Path, batches: int) -> dict:
    """From opening the file to the first batch, and the workers' memory after some more."""
    from htfa_jax.config import Config, override
    from htfa_jax.data.pipeline import training_batches
    from htfa_jax.data.splits import open_split
    from htfa_jax.data.tokenizer import ChatTokenizer

    config = override(Config(), {"data.train": str(path), "data.num_workers": workers})
    started = time.perf_counter()
    records = open_split(config, "train")
    found = training_batches(config, records, ChatTokenizer(tokenizer), 0, 8)
    next(found)
    seconds = time.perf_counter() - started
    since_start = time.time() - float(os.environ["STARTED"])
    for _ in range(batches):
        next(found)
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")  # threads start them
    memory = [worker_memory(int(child)) for task in tasks for child in task.read_text().split()]
    found.close()
    result = {"first_batch_seconds": seconds, "with_start_of_process_seconds": since_start}
    if workers:
        # The process that tracks shared memory is a child too, a small one.
        result["worker_mb"] = sorted(memory)[-workers:]
    return result


def worker_memory(pid: int) -> float:
    """Memory of a process that is its own, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000
    return 0.0


def in_own_process(*arguments: str) -> dict:
    """Runs one measurement of this script."""
    command = [sys.executable, __file__, *arguments]
    environment = {**os.environ, "STARTED": str(time.time())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class SourcesArgs:
    """Options of the command."""

    records: int = 1_000_000  # of the large file
    small: int = 1000  # records of the file beside it
    size: int = 448  # pixels of an image's side
    batches: int = 10  # of 8, before memory is read
    out: Path = Path("benchmark_sources")  # folder to write to
    # Measure once, here: what, file and tokenizer.
    measure: tuple[str, str, str] | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see --help."""
    args = parse(SourcesArgs, argv, __doc__)
    if args.measure:
        what, path, tokenizer = args.measure
        if what == "index":
            result = measure_index(Path(path), 2000)
        else:
            result = measure_first_batch(Path(path), int(what), Path(tokenizer), args.batches)
        print(json.dumps(result))
        return
    from htfa_jax.data.tokenizer import train_tokenizer

    tokenizer = args.out / "tokenizer"
    args.out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(["user assistant What's the object in the hand?"], 300, tokenizer)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors")
    for num in (args.small, args.records):
        path = write_file(args.out, num, args.size)
        size = path.stat().st_size / 1e6
        print(f"\n{num} records, {size:.0f} MB, images of {args.size} pixels")
        for what in ("index", "0", "2"):
            extra = ("--batches", str(args.batches))
            found = in_own_process("--measure", what, str(path), str(tokenizer), *extra)
            for name, value in found.items():
                values = value if isinstance(value, list) else [value]
                label = name if what == "index" else f"{name}, {what} workers"
                print(f"  {label:36} " + ", ".join(f"{v:.1f}" for v in values))


if __name__ == "__main__":
    main()
