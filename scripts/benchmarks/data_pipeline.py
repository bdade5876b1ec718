"""How many samples a second the data pipeline gives, beside bare decoding of the same images.

    python scripts/benchmarks/data_pipeline.py --pairs 256 --rounds 7

Images are noise with the spectrum of photographs, the reconstruction cut out on black, as JPEG
of quality 90. Bare decoding opens, decodes, resizes where that is needed and makes an array of
both images of a pair, in as many processes as there are processors. The pipeline reads records,
decodes, checks, letterboxes, tokenizes two questions and answers and hands out whole updates on
the host, in order: once with threads of one process, once with worker processes. They take turns,
each from empty buffers, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from htfa_jax.common.cli import parse

QUESTIONS = (
    ("human", "<image>\nWhat's the object in the hand?"),
    ("gpt", "The object is bottle."),
    ("human", "What color is it?"),
    ("gpt", "The object is red."),
)


def image(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise whose amplitude falls with the frequency; its channels are alike, as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = 1
    white = rng.standard_normal((3, *frequency.shape, 2)) @ np.array([1, 1j])
    planes = np.fft.irfft2(white / frequency, s=(size, size))
    mixed = np.einsum("ij,jhw->hwi", [[1, 0.2, 0.1], [1, -0.1, 0.2], [1, 0.1, -0.2]], planes)
    return np.clip((mixed - mixed.mean()) / mixed.std() * 45 + 120, 0, 255).astype(np.uint8)


def write_pairs(folder: Path, num: int, size: int) -> Path:
    """A JSON-lines file of `num` pairs."""
    rng, lines = np.random.default_rng(0), []
    y, x = np.mgrid[:size, :size] / size - 0.5
    for i in range(num):
        orig, recon = image(rng, size), image(rng, size)
        recon[x**2 + y**2 > 0.12] = 0
        for name, array in (("orig", orig), ("recon", recon)):
            Image.fromarray(array).save(folder / f"{name}{i}.jpg", quality=90)
        turns = [{"from": who, "value": text} for who, text in QUESTIONS]
        files = {f"image_{name}": f"{name}{i}.jpg" for name in ("orig", "recon")}
        lines.append(json.dumps({"id": str(i), **files, "conversations": turns}) + "\n")
    path = folder / "data.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def decode_pair(files: tuple[Path, Path], size: int) -> None:
    """Two images as arrays, and nothing else."""
    for path in files:
        with Image.open(path) as image:
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BICUBIC)
            np.asarray(image)


def decode_some(pairs: list[tuple[Path, Path]], size: int) -> None:
    """What a process of the bare decoding does."""
    for files in pairs:
        decode_pair(files, size)


def bare(folder: Path, num: int, size: int, pool: multiprocessing.pool.Pool) -> Callable:
    """Measures `samples` pairs of bare decoding; gives samples per second."""
    files = [(folder / f"orig{i}.jpg", folder / f"recon{i}.jpg") for i in range(num)]

    def measure(samples: int) -> float:
        work = [files[i % num] for i in range(samples)]
        parts = [(work[i : i + 8], size) for i in range(0, samples, 8)]
        started = time.perf_counter()
        pool.starmap(decode_some, parts, chunksize=1)
        return samples / (time.perf_counter() - started)

    return measure


class Pipeline:
    """The real one, of which some updates at a time are taken."""

    def __init__(self, path: Path, size: int, workdir: Path, num_workers: int, num_threads: int):
        from htfa_jax.config import Config, override
        from htfa_jax.data.pipeline import samples_per_step, training_batches
        from htfa_jax.data.splits import open_split, open_tokenizer

        config = override(
            Config(),
            {
                "data.train": str(path),
                "image_size": size,
                "data.num_workers": num_workers,
                "data.num_threads": num_threads,
            },
        )
        records = open_split(config, "train")
        tokenizer = open_tokenizer(config, workdir, records)
        self.samples = samples_per_step(config.train, 1)
        # What may be ready before it is asked for, in updates.
        self.ahead = max(num_workers, 1) * (2 * num_threads + 3) + 2
        self.batches = training_batches(config, records, tokenizer, 0, self.samples)
        started = time.perf_counter()
        next(self.batches)
        self.first = time.perf_counter() - started

    def measure(self, samples: int) -> float:
        """Takes what is ready, then measures about so many samples."""
        for _ in range(self.ahead):
            next(self.batches)
        updates = -(-samples // self.samples)
        started = time.perf_counter()
        for _ in range(updates):
            next(self.batches)
        return updates * self.samples / (time.perf_counter() - started)

    def close(self) -> None:
        """Ends its processes."""
        self.batches.close()


@dataclasses.dataclass(frozen=True)
class PipelineArgs:
    """Options of the command."""

    pairs: int = 256  # different pairs
    samples: int = 400  # samples of a measurement
    rounds: int = 7  # measurements of each kind
    size: int = 448  # pixels of a side, as trained on
    source_size: int = 448  # the same, of the files
    processes: int = os.cpu_count() or 1  # and threads


def main(argv: Sequence[str] | None = None) -> None:
    """Prints samples per second, median and spread, and the pipelines' part of bare decoding."""
    args = parse(PipelineArgs, argv, __doc__)
    count = args.processes
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(count) as pool,
    ):
        folder = Path(folder)
        path = write_pairs(folder, args.pairs, args.source_size)
        size = sum(p.stat().st_size for p in folder.glob("*.jpg")) / args.pairs / 2
        print(f"{args.pairs} pairs of {args.source_size} pixels, {size / 1e3:.0f} kB an image")
        threads = Pipeline(path, args.size, folder / "run", 0, count)
        workers = Pipeline(path, args.size, folder / "run", count, 1)
        kinds = {
            f"bare decoding, {count} processes": bare(folder, args.pairs, args.size, pool),
            f"pipeline, {count} threads": threads.measure,
            f"pipeline, {count} worker processes": workers.measure,
        }
        print(
            f"first batch: {threads.first:.1f} s with threads, {workers.first:.1f} s with workers"
        )
        found: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(args.rounds):
            for name, measure in kinds.items():
                found[name].append(measure(args.samples))
                time.sleep(2)  # until what reads ahead is full and idle
        threads.close()
        workers.close()
    (_, first), *_ = found.items()
    for name, rates in found.items():
        parts = [rate / base for rate, base in zip(rates, first, strict=True)]
        print(
            f"{name:<36}{statistics.median(rates):7.0f} samples/s "
            f"({min(rates):.0f} to {max(rates):.0f}), {statistics.median(parts):.2f} of bare "
            f"({min(parts):.2f} to {max(parts):.2f})"
        )


if __name__ == "__main__":
    main()
