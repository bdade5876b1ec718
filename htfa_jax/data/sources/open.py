"""From the name of a source to its records."""

from __future__ import annotations

import logging
from pathlib import Path

from htfa_jax.config import DataConfig
from htfa_jax.data.forms import meant_by, unread_fields
from htfa_jax.data.records import Dataset
from htfa_jax.data.sources import array_records, record_cache, tables
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.data.storage import ImageRoot, StoredImage, image_root, is_url, remote
from htfa_jax.errors import DataError

log = logging.getLogger(__name__)

TFDS = "tfds:"
# Records that are looked at for a reconstruction where the template says it is.
TEMPLATE_TRIES = 8


def open_source(name: str, data: DataConfig, split: str = "train") -> Dataset:
    """The records of a source.

    Args:
      name: a JSON array, JSON lines or records under a key, plain or compressed by gzip or zstd;
        CSV, Parquet or Arrow; a folder of images with metadata.jsonl, or of such tables;
        ArrayRecord shards: a folder, a pattern, a file; a URL of JSON or of shards (`gs://`,
        `s3://`, ...); or `tfds:NAME[/config][:split]`.
      data: how its records are read.
      split: of a TFDS dataset that names none.

    Raises DataError if it cannot be opened: what was looked for, what is wrong.
    """
    records = _open(name, data, split)
    if data.recon_template is not None:
        _check_template(records, data.recon_template)
    warn_of_unread(records, data.recon_template)
    return records


def warn_of_unread(records: Dataset, template: str | None = None) -> None:
    """Says which fields of the first records are not read, but may be meant for one that is."""
    unread: set[str] = set()
    for i in range(min(len(records), TEMPLATE_TRIES)):
        try:
            unread.update(unread_fields(records[i].raw, template))
        except DataError:
            continue  # told when it is its turn
    for name in sorted(unread):
        if meant := meant_by(name):
            log.warning("%s: the field %s is not read; did you mean %s?", records, name, meant)


def _open(name: str, data: DataConfig, split: str) -> Dataset:
    if name.startswith(TFDS):
        from htfa_jax.data.sources.tfds import TfdsRecords

        return TfdsRecords(name.removeprefix(TFDS), split, data.image_root, data.recon_template)
    cache_dir, template = Path(data.cache_dir).expanduser(), data.recon_template
    files = None if is_url(name) else tables.files_of_folder(Path(name).expanduser(), split)
    if files is not None and len(files) == 1 and files[0].suffix == ".jsonl":
        name, files = str(files[0]), None
    if files is not None:
        root = image_root(data.image_root, str(files[0]))
        copies = [record_cache.copy_of_texts(str(file), cache_dir) for file in files]
        facts = [record_cache.identity_of(str(file)) for file in files]
        return array_records.ShardedRecords(copies, root, template, name=name, identity=facts)
    place = image_root(data.image_root, name)
    if is_url(name) and array_records.SUFFIX in name.rpartition("/")[2]:
        urls = _remote_files(name)
        copies = [record_cache.copy_of_file(url, cache_dir) for url in urls]
        return array_records.ShardedRecords(copies, place, template, identity=[*urls])
    if is_url(name) and "." not in name.rpartition("/")[2]:
        return _open(f"{name.rstrip('/')}/*{array_records.SUFFIX}", data, split)
    if not is_url(name) and array_records.is_shards(name):
        if data.image_root is None and Path(name).expanduser().is_dir():
            place = ImageRoot(str(Path(name).expanduser()))
        return array_records.ShardedRecords(array_records.find_shards(name), place, template)
    if record_cache.is_random_access(name):
        return RecordFile(name, data.image_root, template)
    identity = record_cache.identity_of(name)
    copy = record_cache.copy_of_texts(name, cache_dir)
    return array_records.ShardedRecords([copy], place, template, name=name, identity=identity)


def _remote_files(pattern: str) -> list[str]:
    try:
        with remote(pattern) as (files, path):
            found = [files.unstrip_protocol(p) for p in sorted(files.glob(path))]
    except OSError as error:
        raise DataError(f"{pattern} cannot be read: {error}") from error
    if not found:
        raise DataError(f"no ArrayRecord files at {pattern}")
    return found


def _check_template(records: Dataset, template: str) -> None:
    """Raises DataError if the template leads nowhere: a mistake in it would cost every record."""
    looked_at = []
    for i in range(min(len(records), TEMPLATE_TRIES)):
        try:
            image = records[i].image_recon
        except DataError as error:
            if "data.recon_template" in str(error):
                raise
            continue  # told when it is its turn
        if isinstance(image, Path | StoredImage) and image.is_file():
            return
        looked_at.append(str(image))
    if looked_at:
        raise DataError(
            f"data.recon_template={template!r} leads to no file: there is none at "
            f"{', '.join(looked_at[:3])}"
        )
