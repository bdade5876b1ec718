"""Records of TFDS datasets, read through `tfds.data_source`: no TensorFlow.

A dataset's features have the names of a record's fields. Images are Image features, read as the
files that they are stored as; a conversation is a Sequence of `from`, `value` and maybe `kind`, or
JSON text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from htfa_jax.common.json_files import parse_json
from htfa_jax.data.records import Record, parse_record
from htfa_jax.data.storage import ImageRoot, PackedImage
from htfa_jax.errors import DataError

EMBEDDED = "held_objects"
# A split may be a part: train[:10%].
_NAME = re.compile(r"(?P<name>[^:]+(?::[\d*]+\.[\d*]+\.[\d*]+)?)(?::(?P<split>.+))?")


class TfdsRecords:
    """The records of one split.

    Args:
      name: `NAME[/config][:version][:split]`.
      split: if the name has none.
      image_root: as `data.image_root`, for features that are paths.
      recon_template: as `data.recon_template`.

    Raises DataError if there is no such dataset, or TFDS is not installed.
    """

    def __init__(self, name: str, split: str, image_root: str | None, recon_template: str | None):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise DataError(
                f"tfds:{name} needs TensorFlow Datasets: pip install 'htfa-jax[tfds]'"
            ) from error
        if (parts := _NAME.fullmatch(name)) is None:
            raise DataError(f"tfds:{name} must be tfds:NAME[/config][:version][:split]")
        name, split = parts["name"], parts["split"] or split
        if re.split("[/:]", name)[0] == EMBEDDED:
            import htfa_jax.data.held_objects.held_objects_dataset_builder  # noqa: F401, registers
        self.name, self.split = f"tfds:{name}", split
        self.recon_template = recon_template
        self.place = ImageRoot(image_root, given=True) if image_root else _no_paths
        try:
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
            self._images = {
                key: feature.encoding_format or "png"
                for key, feature in builder.info.features.items()
                if isinstance(feature, tfds.features.Image)
            }
            decoders = {key: tfds.decode.SkipDecoding() for key in self._images}
            self._source = builder.as_data_source(split=split, decoders=decoders)
        except Exception as error:  # of a dozen kinds, by what the dataset needs
            what = str(error).strip().partition("\n")[0]
            raise DataError(
                f"{self.name}, split {split}, cannot be opened: {type(error).__name__}: {what}"
            ) from error
        if len(self._source) == 0:
            raise DataError(f"{self!r} holds no records")
        self.identity: list[Any] = [builder.info.full_name, str(builder.data_dir), split]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        where = f"{self.name}:{self.split}, record {index}"
        try:
            example = self._source[int(index)]
        except Exception as error:
            raise DataError(f"{where} cannot be read: {error}") from error
        try:
            raw = {key: self._value(key, x) for key, x in example.items() if not _is_empty(x)}
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        if isinstance(text := raw.get("conversations"), str):
            raw["conversations"] = parse_json(text, where, DataError, object, allow_nan=True)
        return parse_record(raw, where, self.place, self.recon_template)

    def _value(self, key: str, value: Any) -> Any:
        if key in self._images:
            return PackedImage(f"{key}.{self._images[key]}", value)
        return plain(value)

    def __repr__(self) -> str:
        return f"TfdsRecords({self.name}:{self.split}, {len(self)} records)"


def plain(value: Any) -> Any:
    """A feature's value as JSON has it; a Sequence of features becomes a list of objects."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        columns = {key: plain(column) for key, column in value.items()}
        lengths = {len(c) if isinstance(c, list) else None for c in columns.values()}
        if columns and len(lengths) == 1 and None not in lengths:
            rows = zip(*columns.values(), strict=True)
            return [
                {k: v for k, v in zip(columns, row, strict=True) if v not in ("", None)}
                for row in rows
            ]
        return columns
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def _is_empty(value: Any) -> bool:
    """TFDS has no missing values: an empty text or image stands for one."""
    return value is None or (isinstance(value, bytes | str) and not value)


def _no_paths(name: str) -> Any:
    raise ValueError("is a path, and a TFDS dataset has no folder: set data.image_root")
