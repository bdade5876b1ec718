"""What callers send: how much of it is taken, and pictures checked as a dataset's are."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from htfa_jax.config import Config
from htfa_jax.data.decode import FORMATS
from htfa_jax.data.places import PackedPicture
from htfa_jax.data.records import Record, checked_box
from htfa_jax.errors import ConfigError, DataError
from htfa_jax.pairs import FIELDS, Scene, read_scene

# A file's name and content, or a mask in memory.
Upload = PackedPicture | np.ndarray


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is taken from callers; more is refused with a sentence."""

    queue: int = 64  # requests that wait
    per_client: int = 32  # of these, from one address
    batch: int = 4  # requests that are worked on together
    streams: int = 8  # answers that are streamed at a time
    upload_mb: int = 20  # of a request, all pictures together
    upload_seconds: int = 60  # in which it must have come
    megapixels: int = 16  # of a picture
    question: int = 1000  # characters
    questions: int = 8  # about one pair
    new_words: int = 256  # of an answer
    visits: int = 32  # open pages that are remembered

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ConfigError(f"--limits.{name}={value} must be at least 1")

    def check_questions(self, questions: Sequence[str]) -> None:
        """Raises DataError for too many of them, for an empty one, or one that is too long."""
        if not 1 <= len(questions) <= self.questions:
            raise DataError(f"{len(questions)} questions: expected 1 to {self.questions}")
        for question in questions:
            if not question.strip():
                raise DataError("a question is empty: ask something")
            if len(question) > self.question:
                raise DataError(
                    f"a question has {len(question)} characters, more than {self.question}: "
                    "make it shorter"
                )


def read_upload(
    pictures: Mapping[str, Upload | None], boxes: Mapping[str, Any], config: Config, limits: Limits
) -> Scene:
    """A pair out of what was sent; nothing of it is written anywhere.

    Args:
      pictures: by the names of a record's pictures; None where there is none.
      boxes: `bbox_orig`, `bbox_recon`: [x, y, w, h], or None.
      config: of the run.
      limits: of what is taken.

    Raises:
      DataError: naming the field, the file, what is wrong with it and what to do.
    """

    def fail(reason: str) -> DataError:
        return DataError(reason)

    if pictures.get("image_orig") is None:
        raise fail("image_orig is missing: send the picture where something hides the object")
    for field, picture in pictures.items():
        if isinstance(picture, PackedPicture):
            _check_size(field, picture, limits.megapixels)
    record = Record(
        where="the upload",
        id=str(getattr(pictures["image_orig"], "name", "drawn")),
        image_target=None,
        turns=(),
        **{field: pictures.get(field) for field in FIELDS[:4]},
        **{field: checked_box(boxes.get(field), field, fail) for field in FIELDS[4:]},
    )
    return read_scene(record, config)


def _check_size(field: str, picture: PackedPicture, megapixels: int) -> None:
    """Refuses what is too large, before it is decoded."""
    try:
        with Image.open(io.BytesIO(picture.content), formats=FORMATS) as image:
            fits = image.width * image.height <= megapixels * 1e6
    except Image.DecompressionBombError:
        fits = False
    except Exception:  # it is no picture: the reader says so
        return
    if not fits:
        raise DataError(
            f"{field}: {picture.name} has more than {megapixels} million pixels: make it smaller"
        )
