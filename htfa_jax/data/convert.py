"""Packs a dataset and its images into ArrayRecord shards.

    python -m htfa_jax.data.held_objects --num 24 --size 128 --out scenes
    python -m htfa_jax.data.convert scenes/train-24-word.jsonl packed
    python -m htfa_jax.data.convert scenes/train-24-word.jsonl small --image_size 64

OUT becomes a folder of `records-00000-of-00012.array_record` files and `manifest.json` (counts,
sizes, hashes), which can be trained on as it is. Records keep their order. Shards are made in
parallel, each appears whole or not at all, and the same command resumes a stopped one.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
import multiprocessing
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from htfa_jax.common.cli import available_processors, command, parse
from htfa_jax.common.files import drop_partials, whole_path, write_whole
from htfa_jax.common.hashing import file_sha256
from htfa_jax.common.json_files import read_json_lines
from htfa_jax.common.logs import progress
from htfa_jax.config import Config, override
from htfa_jax.data.encode import read_files
from htfa_jax.data.records import Dataset, Split
from htfa_jax.data.sources.array_records import (
    MANIFEST,
    SUFFIX,
    UNFINISHED,
    is_shard,
    open_writer,
    pack,
    read_manifest,
)
from htfa_jax.data.splits import open_named
from htfa_jax.errors import ConfigError, DataError

log = logging.getLogger("htfa_jax.data.convert")  # by name: this module is run as __main__ too

Format = Literal["array_record"]
LOG_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """What every process needs to make any of the shards.

    Attributes:
      records: what is packed.
      folder: where the shards go.
      shard_size: records of a shard; the last has what is left.
      image_size: longer side of the packed images in pixels; None keeps files as they are.
      skip: leave records out that cannot be packed.
    """

    records: Dataset
    folder: Path
    shard_size: int
    image_size: int | None
    skip: bool

    @property
    def num_shards(self) -> int:
        """Files, the last of which may be shorter."""
        return -(-len(self.records) // self.shard_size)

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return f"records-{shard:05d}-of-{self.num_shards:05d}{SUFFIX}"

    def numbers(self, shard: int) -> range:
        """Numbers of its records."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, len(self.records)))


def convert(
    source: str,
    folder: str | Path,
    *,
    config: Config | None = None,
    split: str = "train",
    shard_size: int = 1000,
    image_size: int | None = None,
    on_error: str = "raise",
    num_workers: int | None = None,
) -> Path:
    """Packs a dataset into `folder` and returns the path of its manifest.

    Args:
      source: as `data.train`.
      folder: new, or one that an equal call left unfinished.
      config: says how records are read (`data`); the default one if None.
      split: of sources that have splits.
      shard_size: records of a shard.
      image_size: longer side in pixels that larger images are reduced to; None packs the files
        as they are.
      on_error: "raise" stops at a record that cannot be packed, "skip" leaves it out.
      num_workers: processes; one per processor if None.

    Raises DataError for a record that cannot be packed, and for a folder of something else.
    """
    config = config or Config()
    records = open_named(config, source, split)
    folder = Path(folder).expanduser()
    job = ShardJob(records, folder, shard_size, image_size, on_error == "skip")
    settings = {
        "format": get_args(Format)[0],
        "source": source,
        "identity": json.loads(json.dumps(records.identity)),
        "image_root": config.data.image_root,
        "recon_template": config.data.recon_template,
        "shard_size": shard_size,
        "image_size": image_size,
        "on_error": on_error,
    }
    manifest = folder / MANIFEST
    if manifest.is_file():
        if read_manifest(manifest).get("settings") != settings:
            raise DataError(f"{folder} holds shards of another conversion: use another folder")
        log.info("%s is complete already", folder)
        return manifest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = _begin(folder, settings)
        missing = [i for i in range(job.num_shards) if i not in done]
        if done:
            log.info("going on: %d of %d shards are there", len(done), job.num_shards)
        with (folder / UNFINISHED).open("a", encoding="utf-8") as report:
            for shard, facts in _make_all(job, missing, num_workers):
                done[shard] = facts
                report.write(json.dumps({"shard": shard, **facts}) + "\n")
                report.flush()
        shards = [done[i] for i in sorted(done) if done[i]["records"]]
        if not shards:
            raise DataError(f"{source}: not one record could be packed")
        total = {key: sum(facts[key] for facts in done.values()) for key in ("records", "skipped")}
        content = {"version": 1, **total, "settings": settings, "shards": shards}
        write_whole(manifest, json.dumps(content, indent=2) + "\n", durable=True)
        (folder / UNFINISHED).unlink()
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}") from error
    return manifest


def _begin(folder: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Facts of the shards that are there, by number; an empty folder is made ours."""
    path, done = folder / UNFINISHED, {}
    if path.is_file():
        lines = list(read_json_lines(path, DataError))
        if not lines or lines[0] != settings:
            raise DataError(
                f"{folder} holds an unfinished conversion of other settings or of a file that "
                "changed since: delete it, or use another folder"
            )
        for facts in lines[1:]:
            if not is_shard(facts) or not isinstance(facts.get("shard"), int):
                raise DataError(f"{path} is damaged: delete {folder}, or use another folder")
            there = folder / facts["name"]
            if there.is_file() and there.stat().st_size == facts["bytes"]:
                done[facts.pop("shard")] = facts
    elif any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: use another folder")
    drop_partials(folder)
    content = [settings, *({"shard": i, **facts} for i, facts in done.items())]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in content))
    return done


def _make_all(
    job: ShardJob, missing: list[int], num_workers: int | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Makes shards in several processes; yields (number, facts) in the order they are done."""
    if not missing:
        return
    workers = min(num_workers or available_processors(), len(missing))
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    total = sum(len(job.numbers(shard)) for shard in missing)
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(job, counter, stop)
    )
    started = last = time.monotonic()
    try:
        with progress(total, f"packing into {job.folder.name}", unit="record") as bar:
            futures = {pool.submit(_make, i): i for i in missing}
            while futures:
                finished = concurrent.futures.wait(
                    futures, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED
                )[0]
                bar.update(counter.value - bar.n)
                if bar.disable and time.monotonic() - last > LOG_SECONDS:
                    last = time.monotonic()
                    rate = counter.value / (last - started)
                    log.info("packed %d of %d records, %.1f/s", counter.value, total, rate)
                for future in sorted(finished, key=futures.__getitem__):
                    yield futures.pop(future), future.result()
            bar.update(counter.value - bar.n)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            "a process that packs was ended from outside (out of memory?): run the same command "
            "again, it goes on"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    log.info("packed %d records in %.0f s", total, time.monotonic() - started)


_worker: dict[str, Any] = {}  # of a process that packs


def _start(job: ShardJob, counter: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    _worker.update(job=job, counter=counter, stop=stop)


def _make(shard: int) -> dict[str, Any]:
    """Makes one shard; returns its facts for the manifest."""
    job, counter, stop = (_worker[name] for name in ("job", "counter", "stop"))
    path = job.folder / job.name(shard)
    count, skipped = 0, []
    # The manifest says how large it is: it must be so after a power cut too.
    with whole_path(path, durable=True) as partial:
        writer = open_writer(partial)
        try:
            for index in job.numbers(shard):
                if stop.is_set():
                    raise DataError(f"{path.name} was not finished")
                try:
                    record, images = read_files(job.records[index], job.image_size)
                    writer.write(pack(json.dumps(record, ensure_ascii=False).encode(), images))
                    count += 1
                except DataError as error:
                    if not job.skip:
                        raise
                    skipped.append(str(error))
                with counter.get_lock():
                    counter.value += 1
        finally:
            writer.close()
        size, digits = partial.stat().st_size, file_sha256(partial)
    return {
        "name": path.name,
        "records": count,
        "skipped": len(skipped),
        "reasons": skipped,
        "bytes": size,
        "sha256": digits,
    }


@dataclasses.dataclass(frozen=True)
class ConvertArgs:
    """Options of the command."""

    # As data.train: a file, a URL, tfds:NAME, ...
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IN")]
    # Folder to write to.
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    format: Format = "array_record"  # of the shards
    split: Split = "train"  # of a source with splits
    shard_size: int = 1000  # records of a shard
    image_size: int | None = None  # reduce larger images so (default: files as they are)
    on_error: Literal["raise", "skip"] = "raise"  # stop at a bad record, or leave it out
    workers: int | None = None  # processes (default: one per processor)
    image_root: str | None = None  # as data.image_root
    recon_template: str | None = None  # as data.recon_template
    cache_dir: str | None = None  # as data.cache_dir


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see --help."""
    args = parse(ConvertArgs, argv, __doc__)
    for name in ("shard_size", "image_size", "workers"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    given = {f"data.{n}": getattr(args, n) for n in ("image_root", "recon_template", "cache_dir")}
    config = override(Config(), {name: value for name, value in given.items() if value is not None})
    manifest = convert(
        args.source,
        args.folder,
        config=config,
        split=args.split,
        shard_size=args.shard_size,
        image_size=args.image_size,
        on_error=args.on_error,
        num_workers=args.workers,
    )
    content = read_manifest(manifest)
    for shard in content["shards"]:
        for reason in shard["reasons"]:
            print(f"left out: {reason}")
    size = sum(shard["bytes"] for shard in content["shards"])
    print(
        f"{content['records']} records in {len(content['shards'])} shards, {size / 1e6:.1f} MB, "
        f"{content['skipped']} left out: {manifest}"
    )


if __name__ == "__main__":
    main()
