"""ArrayRecord shards: records with their images, one after another in files of their own.

A shard's record is a msgpack map: `record`, its JSON text, and `pictures`, what the image files
named in it hold. An image that is not there is looked for as in any other dataset.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from htfa_jax.common.json_files import parse_json, read_json
from htfa_jax.common.names import checked_name
from htfa_jax.data.records import ImageFile, Record, parse_record
from htfa_jax.data.storage import ImageRoot, PackedImage
from htfa_jax.errors import DataError

SUFFIX = ".array_record"
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.jsonl"
# Keys of a packed record. The second is older than this project's other names, and stays: shards
# that were written before can be read, also by versions that were.
TEXT, IMAGES = "record", "pictures"


def pack(text: bytes, images: Mapping[str, bytes] | None = None) -> bytes:
    """A shard's record, of a JSON text and of the images that it names."""
    return msgpack.packb({TEXT: text, IMAGES: images or {}})


def open_writer(path: Path) -> ArrayRecordWriter:
    """Writes a shard whose records can be read one by one."""
    return ArrayRecordWriter(str(path), "group_size:1")


class ShardedRecords:
    """The records of ArrayRecord files, in the order of the files.

    Files are opened where they are first needed, by every process itself, so that an instance can
    be sent to worker processes. In memory is the number of records of each file.

    Args:
      paths: the files.
      place: finds images that are not packed.
      recon_template: as `data.recon_template`.
      name: what messages call it, if the files are a copy; each file by its own name otherwise.
      identity: as in `Dataset`; that of the files if None.

    Raises DataError if a file is missing or damaged.
    """

    def __init__(
        self,
        paths: list[Path],
        place: ImageRoot,
        recon_template: str | None = None,
        name: str | None = None,
        identity: list[Any] | None = None,
    ):
        self.paths, self.place, self.name = paths, place, name
        self.recon_template = recon_template
        self._sizes = [_size(path) for path in paths]
        self._readers: list[ArrayRecordReader | None] = [None] * len(paths)
        counts = [self._open(i).num_records() for i in range(len(paths))]
        for path, count in zip(paths, counts, strict=True):
            if count == 0:
                raise DataError(
                    f"{path} holds no records: it is damaged, cut off, or not an ArrayRecord file"
                )
        self._ends = np.cumsum(counts)
        self.identity = identity or [
            [str(path.resolve()), *size] for path, size in zip(paths, self._sizes, strict=True)
        ]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        number = int(index) - (int(self._ends[shard - 1]) if shard else 0)
        where = f"{self.name or self.paths[shard]}, record {index if self.name else number}"
        try:
            reader = self._readers[shard] or self._open(shard)
            packed = msgpack.unpackb(reader.read([number])[0])
            text, images = packed[TEXT], packed[IMAGES]
            if not isinstance(text, bytes) or not isinstance(images, dict):
                raise TypeError("its record has no text and images")
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        except (RuntimeError, KeyError, TypeError) as error:
            raise DataError(f"{where} cannot be read, the file is damaged: {error}") from error
        except ValueError as error:  # msgpack's errors too
            raise DataError(f"{where}: {error}") from error
        raw = parse_json(text, where, DataError, object, allow_nan=True)

        def place(name: str) -> ImageFile:
            content = images.get(name)
            return self.place(name) if content is None else PackedImage(name, content)

        return parse_record(raw, where, place, self.recon_template)

    def _open(self, shard: int) -> ArrayRecordReader:
        path = self.paths[shard]
        if (found := _size(path)) != self._sizes[shard]:
            raise DataError(
                f"the shard {path} was changed since the dataset was opened: it has {found[0]} "
                f"bytes, it had {self._sizes[shard][0]}"
            )
        reader = ArrayRecordReader(str(path), options="readahead_buffer_size:0")
        self._readers[shard] = reader
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": [None] * len(self.paths)}

    def __repr__(self) -> str:
        name = self.name or _common(self.paths)
        return f"ShardedRecords({name}, {len(self)} records in {len(self.paths)} files)"


def find_shards(name: str) -> list[Path]:
    """The local shards that a name stands for: a file, a folder, its manifest, or a pattern.

    Raises DataError if there are none, or if they are not what the manifest says.
    """
    path = Path(name).expanduser()
    if path.name == MANIFEST:
        path = path.parent
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return _of_manifest(path / MANIFEST)
        if (path / UNFINISHED).is_file():
            raise DataError(
                f"{path} is not finished: run the same htfa_jax.data.convert again, it goes on"
            )
        paths = sorted(path.glob("*" + SUFFIX + "*"))
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(found) for found in sorted(glob.glob(str(path)))]
    if not paths:
        raise DataError(f"no ArrayRecord files at {name} (looked for *{SUFFIX})")
    return paths


def is_shards(name: str) -> bool:
    """Whether a name stands for ArrayRecord files."""
    path = Path(name).expanduser()
    return (
        SUFFIX in path.name
        or path.name == MANIFEST
        or path.is_dir()
        or (any(c in name for c in "*?[") and not path.exists())
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """What `htfa_jax.data.convert` says of a folder. Raises DataError if it is no such file."""
    manifest = read_json(path, DataError)
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not all(map(is_shard, shards)):
        raise DataError(
            f"{path} is no manifest of shards: `shards` must have sizes and names of files in it"
        )
    return manifest


def is_shard(facts: Any) -> bool:
    """Whether a manifest says of a shard what reading it takes: its name and its bytes."""
    if not isinstance(facts, dict) or not isinstance(name := facts.get("name"), str):
        return False
    try:
        checked_name(name)
    except ValueError:
        return False
    return isinstance(facts.get("bytes"), int)


def _of_manifest(path: Path) -> list[Path]:
    paths = []
    for shard in read_manifest(path)["shards"]:
        paths.append(path.parent / shard["name"])
        size = _size(paths[-1])[0]
        if size != shard["bytes"]:
            raise DataError(
                f"the shard {paths[-1]} has {size} bytes, {path.name} says {shard['bytes']}: copy "
                "it again, or delete it and convert again"
            )
    return paths


def _size(path: Path) -> tuple[int, int]:
    """Bytes and time. Raises DataError."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise DataError(f"the shard {path} is gone, or never was there") from None
    except (OSError, ValueError) as error:  # the second one of a zero byte in a name
        raise DataError(f"the shard {path} cannot be read: {error}") from error
    return stat.st_size, stat.st_mtime_ns


def _common(paths: list[Path]) -> str:
    return str(paths[0] if len(paths) == 1 else paths[0].parent)
