"""Images that callers send: checked as a dataset's are, and written nowhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from htfa_jax.config import Config
from htfa_jax.data.records import checked_box
from htfa_jax.data.storage import PackedImage
from htfa_jax.demo.images import decode, record_of
from htfa_jax.demo.options import Limits
from htfa_jax.errors import DataError
from htfa_jax.inference.inputs import FIELDS, LoadedPair, load_pair

# Calls a function with arguments, perhaps elsewhere.
Call = Callable[..., Any]


def here(function: Callable, *args: Any) -> Any:
    """Calls a function in this process."""
    return function(*args)


def read_upload(
    images: Mapping[str, PackedImage | None],
    boxes: Mapping[str, Any],
    config: Config,
    limits: Limits,
    call: Call = here,
) -> LoadedPair:
    """A pair out of what was sent; nothing of it is written anywhere.

    Args:
      images: by the names of a record's images; None where there is none.
      boxes: `bbox_orig`, `bbox_recon`: [x, y, w, h], or None.
      config: of the run.
      limits: of what is taken.
      call: calls what decodes an image.

    Raises:
      DataError: naming the field, the file, what is wrong with it and what to do.
    """

    def fail(reason: str) -> DataError:
        return DataError(reason)

    original = images.get("image_orig")
    if original is None:
        raise fail("image_orig is missing: send the image where something hides the object")
    found = {field: checked_box(boxes.get(field), field, fail) for field in FIELDS[4:]}
    decoded = {
        field: read(call, decode, field, image, limits.megapixels)
        for field, image in images.items()
        if image is not None
    }
    return load_pair(record_of(original.name, **decoded, **found), config)


def read(call: Call, function: Callable, field: str, image: PackedImage, *args: Any) -> Any:
    """What `function` gives for an image, called by `call`. Raises DataError."""
    try:
        return call(function, field, image, *args)
    except (TimeoutError, EOFError) as error:  # of the process that decodes
        raise DataError(f"{field}: {image.name} {error}") from None
