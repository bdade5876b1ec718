"""Records: the data contract, checked. Where they come from is in `sources`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from PIL import Image

from htfa_jax.config.renamed import KINDS, current
from htfa_jax.data.forms import FORMS, in_own_form, names_of, shown
from htfa_jax.data.image_values import image_of
from htfa_jax.data.storage import StoredImage
from htfa_jax.errors import DataError

EMBEDDED = "held_objects"
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# A file, or in a program what stands in its place.
ImageFile = Path | StoredImage
Pixels = Image.Image | np.ndarray
ROLES: dict[str, Literal["user", "assistant", "system"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# A marker where an image stands in a conversation, with what InternVL writes in front of it.
IMAGE_MARKER = re.compile(r"(?:Image-\d+:[ \t]*)?<image>")
# No answer is a book: so much text is damage, or another file's content.
MAX_CHARACTERS = 100_000
# No image has so many pixels. Compared with, because NumPy cannot say of an integer of many
# digits whether it is finite.
LARGEST = 1e9


class Dataset(Protocol):
    """Random access to records; can be sent to worker processes, and says what it is.

    Attributes:
      identity: JSON values that tell this content from another's: places, sizes, times.
    """

    identity: list[Any]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises DataError for a record that cannot be used."""


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
    """One sample: images as files, boxes (x, y, w, h) in their pixels, a conversation.

    In a program an image or an array may stand in a file's place.

    Attributes:
      where: file and record number, for messages.
      id: the record's own name.
      image_orig: the original.
      image_recon: the reconstruction, if there is one.
      image_target: the whole object in the original's frame, if there is one.
      object_mask: where the object is, its occluded part included.
      occluder_mask: where something covers the image.
      bbox_orig: the object in the original.
      bbox_recon: the object in the reconstruction.
      turns: the conversation.
      meta: anything else.
      raw: the JSON values that it was read from, images named as in this project's form.
    """

    where: str
    id: str
    image_orig: ImageFile | Pixels
    image_recon: ImageFile | None
    image_target: ImageFile | None
    object_mask: ImageFile | None
    occluder_mask: ImageFile | None
    bbox_orig: tuple[float, float, float, float] | None
    bbox_recon: tuple[float, float, float, float] | None
    turns: tuple[Turn, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def error(self, reason: str, kind: str = "") -> DataError:
        """An error that names this record; `kind` as in `DataError`."""
        return DataError(f"{self.where} (id {self.id}): {reason}", kind)


def parse_record(
    raw: Any,
    where: str,
    place: Callable[[str], ImageFile],
    recon_template: str | None = None,
    with_turns: bool = True,
) -> Record:
    """Checks one decoded record. Raises DataError with `where`, the id, the field and the reason.

    Args:
      raw: what the JSON held; instead of its path an image itself may be there.
      where: file and record number.
      place: from an image's path in the record to the image; raises ValueError if it may not
        be read.
      recon_template: path of the reconstruction of records that name none.
      with_turns: False reads no conversation.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: a record must be an object, this is {type(raw).__name__}")
    name = str(raw.get("id", "none"))

    def fail(reason: str) -> DataError:
        return DataError(f"{where} (id {name}): {reason}")

    def image(*fields: str, of: ImageFile | None = None) -> ImageFile | None:
        for f in fields:
            value = raw.get(f)
            if value is None:
                continue
            try:
                return image_of(value, f, place, of)
            except ValueError as error:
                said = f"{f}={shown(value)}" if isinstance(value, str) and value else f
                raise fail(f"{said} {error}") from error
        return None

    found = raw
    raw = in_own_form(raw, recon_template, fail)
    image_orig = image("image_orig")
    if image_orig is None:
        raise fail(f"image_orig is missing: {FORMS}; this one has {names_of(found)}")
    if with_turns and raw.get("conversations") is None:
        raise fail(f"conversations is missing: {FORMS}; this one has {names_of(found)}")
    meta = {} if raw.get("meta") is None else raw["meta"]
    if not isinstance(meta, Mapping):
        raise fail(f"meta must be an object, it is {shown(meta)}")
    return Record(
        where=where,
        id=name,
        image_orig=image_orig,
        image_recon=image("image_recon"),
        image_target=image("image_target"),
        object_mask=image("object_mask", "occlusion_mask", of=image_orig),
        occluder_mask=image("occluder_mask", of=image_orig),
        bbox_orig=checked_box(raw.get("bbox_orig"), "bbox_orig", fail),
        bbox_recon=checked_box(raw.get("bbox_recon"), "bbox_recon", fail),
        turns=_turns(raw.get("conversations"), fail) if with_turns else (),
        meta=meta,
        raw=raw,
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
    if not numbers or len(value) != 4:
        raise fail(f"{name} must be [x, y, w, h] in pixels, it is {shown(value)}")
    if not all(abs(v) < LARGEST for v in value):
        raise fail(f"{name}={list(value)} must be finite numbers: x, y, w, h in pixels")
    if value[2] <= 0 or value[3] <= 0:
        raise fail(f"{name}={list(value)} has no area: width and height must be above 0")
    x, y, w, h = map(float, value)
    return x, y, w, h


def _turns(conversations: Any, fail: Any) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise fail("conversations must be a list of turns that is not empty")
    turns: list[Turn] = []
    for i, turn in enumerate(conversations):
        if not isinstance(turn, Mapping):
            raise fail(f"conversations[{i}] must be an object with from and value")
        role, text, kind = turn.get("from"), turn.get("value"), turn.get("kind")
        if not isinstance(role, str) or role not in ROLES:
            raise fail(f"conversations[{i}].from={shown(role)}, expected one of {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise fail(f"conversations[{i}].value must be text, it is {shown(text)}")
        if kind is not None and not isinstance(kind, str):
            raise fail(f"conversations[{i}].kind must be text, it is {shown(kind)}")
        if len(text) > MAX_CHARACTERS:
            raise fail(
                f"conversations[{i}].value has {len(text)} characters, more than {MAX_CHARACTERS}: "
                "shorten it, or leave the record out"
            )
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise fail(f"conversations[{i}].value has half of a surrogate pair: not a character")
        text = without_markers(text)
        if not text:
            raise fail(f"conversations[{i}].value is empty")
        if ROLES[role] == "assistant" and turns and turns[-1].role == "assistant":
            raise fail(
                f"conversations[{i - 1}] and [{i}] are two assistant turns in a row: join them, "
                "or put the question between them"
            )
        turns.append(Turn(ROLES[role], text, kind and current(KINDS, kind, "kind of question")))
    if not any(turn.role == "assistant" for turn in turns):
        raise fail("conversations has no assistant turn: nothing to learn from")
    return tuple(turns)


def without_markers(text: str) -> str:
    """A turn's text without image markers: the images always come before the conversation.

    A line of markers alone goes, and so do the blanks that a marker leaves in others.
    """
    if not IMAGE_MARKER.search(text):
        return text.strip()
    lines = []
    for line in text.split("\n"):
        rest, markers = IMAGE_MARKER.subn(" ", line)
        if markers:
            rest = re.sub(r" ([.,;:!?])", r"\1", " ".join(rest.split()))
        if rest or not markers:
            lines.append(rest)
    return "\n".join(lines).strip()
