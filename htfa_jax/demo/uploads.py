"""Images that callers send: checked as a dataset's are, and written nowhere."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from htfa_jax.config import Config
from htfa_jax.data.decode import FORMATS
from htfa_jax.data.records import Record, checked_box
from htfa_jax.data.storage import PackedImage
from htfa_jax.demo.options import Limits
from htfa_jax.errors import DataError
from htfa_jax.inference.inputs import FIELDS, LoadedPair, load_pair

# A file's name and content, or a mask in memory.
Upload = PackedImage | np.ndarray


def read_upload(
    images: Mapping[str, Upload | None], boxes: Mapping[str, Any], config: Config, limits: Limits
) -> LoadedPair:
    """A pair out of what was sent; nothing of it is written anywhere.

    Args:
      images: by the names of a record's images; None where there is none.
      boxes: `bbox_orig`, `bbox_recon`: [x, y, w, h], or None.
      config: of the run.
      limits: of what is taken.

    Raises:
      DataError: naming the field, the file, what is wrong with it and what to do.
    """

    def fail(reason: str) -> DataError:
        return DataError(reason)

    if images.get("image_orig") is None:
        raise fail("image_orig is missing: send the image where something hides the object")
    for field, image in images.items():
        if isinstance(image, PackedImage):
            _check_size(field, image, limits.megapixels)
    record = Record(
        where="the upload",
        id=str(getattr(images["image_orig"], "name", "drawn")),
        image_target=None,
        turns=(),
        **{field: images.get(field) for field in FIELDS[:4]},
        **{field: checked_box(boxes.get(field), field, fail) for field in FIELDS[4:]},
    )
    return load_pair(record, config)


def _check_size(field: str, image: PackedImage, megapixels: int) -> None:
    """Refuses what is too large, before it is decoded."""
    try:
        with Image.open(io.BytesIO(image.content), formats=FORMATS) as opened:
            fits = opened.width * opened.height <= megapixels * 1e6
    except Image.DecompressionBombError:
        fits = False
    except Exception:  # it is no image: the reader says so
        return
    if not fits:
        raise DataError(
            f"{field}: {image.name} has more than {megapixels} million pixels: make it smaller"
        )
