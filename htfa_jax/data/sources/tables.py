"""Tables of records: CSV, Parquet, and the folders that Hugging Face's datasets write."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from htfa_jax.common.json_files import parse_json, read_json
from htfa_jax.common.names import checked_name
from htfa_jax.errors import DataError

CSV = {".csv": ",", ".tsv": "\t"}
ARROW = (".parquet", ".arrow")
MAX_CELL = 2**26
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
STATE, SPLITS = "state.json", "dataset_dict.json"

Row = tuple[bytes, dict[str, bytes]]


def is_table(name: str) -> bool:
    """Whether a local file is a table, by its name."""
    return Path(name).suffix.lower() in (*CSV, *ARROW) and "://" not in name


def files_of_folder(folder: Path, split: str) -> list[Path] | None:
    """The files of a folder that holds a dataset; None if it is no such folder.

    Args:
      folder: of images with metadata.jsonl or metadata.csv, of Parquet files, or what
        `save_to_disk` of Hugging Face's datasets wrote; or a folder of such, one for each split.
      split: whose folder or files are taken where there are several.

    Raises DataError if it has no such split, or cannot be read.
    """
    if not folder.is_dir():
        return None
    for name in METADATA:
        if (folder / name).is_file():
            return [folder / name]
    if (folder / STATE).is_file():
        return _of_state(folder / STATE)
    own = {"validation": ("validation", "val", "valid", "dev"), "test": ("test",)}
    names = own.get(split, ("train", "training"))
    for name in names:
        if (folder / name).is_dir() and (found := files_of_folder(folder / name, split)):
            return found
    if (folder / SPLITS).is_file():
        there = sorted(each.name for each in folder.iterdir() if each.is_dir())
        raise DataError(f"{folder} has no split {split}, but {', '.join(there)[:200]}: name one")
    files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    return [f for f in files if f.name.startswith(names)] or files or None


def _of_state(path: Path) -> list[Path]:
    listed = read_json(path, DataError).get("_data_files")
    try:
        return [path.parent / checked_name(each["filename"]) for each in listed]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise DataError(f"{path} does not list the files of a dataset (_data_files)") from error


def rows(path: Path) -> Iterator[Row]:
    """The records of a table as JSON texts, and the images that it holds.

    Raises OSError, ValueError that says which line is wrong, and DataError if what reads it is not
    installed.
    """
    if (separator := CSV.get(path.suffix.lower())) is not None:
        yield from _csv_rows(path, separator)
        return
    for row in _arrow_rows(path):
        images: dict[str, bytes] = {}
        plain = {name: _plain(value, name, images) for name, value in row.items()}
        yield _text({name: value for name, value in plain.items() if value is not None}), images


def _csv_rows(path: Path, separator: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=separator)
        try:
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"line {reader.line_num} has more cells than the first line has names"
                    )
                yield _text({k: _cell(v) for k, v in row.items() if v not in ("", None)}), {}
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error


def _cell(text: str) -> Any:
    """A list or an object, if it is one; else the text."""
    if text.strip()[:1] not in ("[", "{"):
        return text
    try:
        return parse_json(text, "", DataError, object)
    except DataError:
        return text


def _arrow_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading it needs pyarrow: pip install 'htfa-jax[arrow]'"
        ) from error
    try:
        if path.suffix.lower() == ".parquet":
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(64):
                    yield from batch.to_pylist()
            return
        with pyarrow.memory_map(str(path)) as file:
            try:
                batches: Any = ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                whole = ipc.open_file(file)
                batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
            for batch in batches:
                for start in range(0, batch.num_rows, 64):
                    yield from batch.slice(start, 64).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {str(error)[:200]}") from error


def _plain(value: Any, name: str, images: dict[str, bytes]) -> Any:
    """A cell as JSON has it; bytes go to `images`, and their name stands in their place."""
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    if isinstance(value, bytes):
        key = f"data of {name}.{'jpg' if value.startswith(bytes([255, 216])) else 'png'}"
        images[key] = value
        return key
    if isinstance(value, Mapping):
        return {k: _plain(v, f"{name} {k}", images) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{name} {i}", images) for i, v in enumerate(value)]
    return value


def _text(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
