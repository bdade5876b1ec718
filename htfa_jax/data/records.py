"""Records: the data contract, checked, and random access to them in JSON and JSON-lines files."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from htfa_jax.errors import DataError

ROLES: dict[str, Literal["user", "assistant", "system"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
IMAGE_MARKER = "<image>"


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
      role: who speaks.
      text: what, without image markers.
      kind: what sort of question this is, for evaluation; None if the record does not say.
    """

    role: Literal["user", "assistant", "system"]
    text: str
    kind: str | None = None


@dataclass(frozen=True)
class Record:
    """One sample: pictures by path, boxes (x, y, w, h) in their pixels, a conversation.

    In a program a picture or an array may stand in a path's place.

    Attributes:
      where: file and record number, for messages.
      id: the record's own name.
      image_orig: the original.
      image_recon: the reconstruction, if there is one.
      image_target: the whole object in the original's frame, if there is one.
      object_mask: where the object is, its hidden part included.
      occluder_mask: where something covers the picture.
      bbox_orig: the object in the original.
      bbox_recon: the object in the reconstruction.
      turns: the conversation.
      meta: anything else.
    """

    where: str
    id: str
    image_orig: Path
    image_recon: Path | None
    image_target: Path | None
    object_mask: Path | None
    occluder_mask: Path | None
    bbox_orig: tuple[float, float, float, float] | None
    bbox_recon: tuple[float, float, float, float] | None
    turns: tuple[Turn, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def error(self, reason: str) -> DataError:
        """An error that names this record."""
        return DataError(f"{self.where} (id {self.id}): {reason}")


def parse_record(raw: Any, where: str, root: Path, with_turns: bool = True) -> Record:
    """Checks one decoded record. Raises DataError with `where`, the id, the field and the reason.

    Args:
      raw: what the JSON held.
      where: file and record number.
      root: folder of relative picture paths.
      with_turns: False reads no conversation.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: a record must be an object, this is {type(raw).__name__}")
    name = str(raw.get("id", "none"))

    def fail(reason: str) -> DataError:
        return DataError(f"{where} (id {name}): {reason}")

    def picture(*fields: str) -> Path | None:
        for f in fields:
            value = raw.get(f)
            if value is None:
                continue
            if not isinstance(value, str) or not value:
                raise fail(f"{f} must be a path, it is {value!r}")
            return root / value
        return None

    image_orig = picture("image_orig")
    if image_orig is None:
        raise fail("image_orig is missing")
    meta = {} if raw.get("meta") is None else raw["meta"]
    if not isinstance(meta, Mapping):
        raise fail(f"meta must be an object, it is {meta!r}")
    return Record(
        where=where,
        id=name,
        image_orig=image_orig,
        image_recon=picture("image_recon"),
        image_target=picture("image_target"),
        object_mask=picture("object_mask", "occlusion_mask"),
        occluder_mask=picture("occluder_mask"),
        bbox_orig=checked_box(raw.get("bbox_orig"), "bbox_orig", fail),
        bbox_recon=checked_box(raw.get("bbox_recon"), "bbox_recon", fail),
        turns=_turns(raw.get("conversations"), fail) if with_turns else (),
        meta=meta,
    )


def checked_box(
    value: Any, name: str, fail: Callable[[str], DataError]
) -> tuple[float, float, float, float] | None:
    """A box as four numbers, None without one. Raises what `fail` makes of the reason."""
    if value is None:
        return None
    numbers = isinstance(value, Sequence | np.ndarray) and all(
        isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in value
    )
    # Compared, because NumPy cannot say of an integer of many digits whether it is finite.
    if not numbers or len(value) != 4 or not all(-1e9 < v < 1e9 for v in value):
        raise fail(f"{name} must be [x, y, w, h] in pixels, it is {value!r}")
    if value[2] <= 0 or value[3] <= 0:
        raise fail(f"{name}={value} has no area: width and height must be above 0")
    return tuple(map(float, value))


def _turns(conversations: Any, fail: Any) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise fail("conversations must be a list of turns that is not empty")
    turns = []
    for i, turn in enumerate(conversations):
        if not isinstance(turn, Mapping):
            raise fail(f"conversations[{i}] must be an object with from and value")
        role, text, kind = turn.get("from"), turn.get("value"), turn.get("kind")
        if not isinstance(role, str) or role not in ROLES:
            raise fail(f"conversations[{i}].from={role!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise fail(f"conversations[{i}].value must be text, it is {text!r}")
        if kind is not None and not isinstance(kind, str):
            raise fail(f"conversations[{i}].kind must be text, it is {kind!r}")
        text = text.replace(IMAGE_MARKER + "\n", "").replace(IMAGE_MARKER, "").strip()
        if not text:
            raise fail(f"conversations[{i}].value is empty")
        turns.append(Turn(ROLES[role], text, kind))
    if not any(turn.role == "assistant" for turn in turns):
        raise fail("conversations has no assistant turn: nothing to learn from")
    return tuple(turns)


class RecordFile:
    """Random access to the records of a JSON array or JSON-lines file.

    Of a JSON-lines file only the places of the lines are held in memory. Every process maps
    the file itself, so that an instance can be sent to worker processes.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None):
        self.path = Path(path).expanduser()
        self.root = Path(image_root).expanduser() if image_root else self.path.parent
        if not self.path.is_file():
            raise DataError(f"no dataset at {self.path}: expected a .json or .jsonl file")
        self._records = self._spans = self._mapped = None
        if self._is_array():
            self._records = self._load_array()
        else:
            self._spans = self._line_spans()
        if len(self) == 0:
            raise DataError(f"{self.path} holds no records")

    def _is_array(self) -> bool:
        with self.path.open("rb") as file:
            return file.read(4096).lstrip()[:1] == b"["

    def _load_array(self) -> list[Any]:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path} is not valid JSON: {error}") from error

    def _line_spans(self) -> np.ndarray:
        """Start and end of each line that is not blank, int64 [lines, 2]."""
        spans, position = [], 0
        with self.path.open("rb") as file:
            for line in file:
                if line.strip():
                    spans.append((position, position + len(line)))
                position += len(line)
        return np.array(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans if self._records is None else self._records)

    def __getitem__(self, index: int) -> Record:
        where = f"{self.path}, record {index}"
        return parse_record(self._raw(int(index), where), where, self.root)

    def _raw(self, index: int, where: str) -> Any:
        if self._records is not None:
            return self._records[index]
        if self._mapped is None:
            with self.path.open("rb") as file:
                # A map, because threads that share a file would move each other's position.
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, end = self._spans[index]
        try:
            return json.loads(self._mapped[start:end].decode("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{where}: not valid JSON: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}

    def __repr__(self) -> str:
        return f"RecordFile({self.path}, {len(self)} records)"
