"""What a record may have for an image: a path, an image itself, or a mask as COCO writes it."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from htfa_jax.data.forms import shown
from htfa_jax.data.storage import PackedImage, StoredImage

DATA = "data:"
MAX_SIDE = 2**15
MAX_PIXELS = 64 * 2**20


@dataclass(frozen=True)
class DrawnMask(StoredImage):
    """A mask as COCO writes it: run lengths, or polygons in the original's pixels.

    Attributes:
      name: as messages call it.
      value: of the record's field.
      original: whose size polygons have.
    """

    name: str
    value: Any = field(repr=False)
    original: Any = field(repr=False)

    def read_bytes(self) -> bytes:
        """The mask of run lengths. Polygons have no size of their own: `drawn` takes it."""
        size = self.value.get("size") if isinstance(self.value, Mapping) else None
        if size is None:
            raise OSError("polygons are drawn in the size of their original")
        return self.drawn((size[1], size[0]))

    def drawn(self, size: tuple[int, int]) -> bytes:
        """The mask as a PNG; polygons in an image of that width and height."""
        if isinstance(self.value, Mapping):
            image = Image.fromarray(run_lengths(self.value))
        else:
            image = Image.new("1", size)
            pen = ImageDraw.Draw(image)
            for polygon in self.value:
                pen.polygon(list(map(float, polygon)), fill=1)
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    def is_file(self) -> bool:
        return True


def image_of(value: Any, name: str, place: Callable[[str], Any], original: Any = None) -> Any:
    """The image that a record's value stands for.

    Args:
      value: a path; a `data:` address; an object with `bytes` (base64 in JSON) or `path`, as
        Hugging Face's datasets have it, or with `url`; of a mask also COCO's run lengths
        (`size`, `counts`) and polygons (lists of x, y, x, y, ...).
      name: of the field.
      place: from a path to the image; raises ValueError if it may not be read.
      original: the image that a mask belongs to.

    Raises ValueError that says what is wrong with it.
    """
    is_mask = name.endswith("mask")
    if isinstance(value, StoredImage):
        return value
    if isinstance(value, str) and value:
        return _packed(_of_address(value), name) if value[:5].lower() == DATA else place(value)
    if isinstance(value, bytes) and value:
        return _packed(value, name)
    if isinstance(value, Mapping):
        if is_mask and "counts" in value:
            run_lengths(value)
            return DrawnMask(f"data of {name}.png", value, original)
        if value.get("bytes") is not None:
            content = value["bytes"]
            return _packed(content if isinstance(content, bytes) else _of_base64(content), name)
        named = next((value[n] for n in ("path", "url") if value.get(n) is not None), None)
        if isinstance(named, str) and named:
            return image_of(named, name, place)
        raise ValueError(f"must have bytes or a path, it is {shown(value)}")
    if is_mask and isinstance(value, list) and value:
        polygons = value if isinstance(value[0], list) else [value]
        _check_polygons(polygons)
        return DrawnMask(f"data of {name}.png", polygons, original)
    raise ValueError(f"must be a path, it is {shown(value)}")


def is_inside(value: Any) -> bool:
    """Whether a record's value is an image itself, and no name of one."""
    if isinstance(value, Mapping):
        return value.get("bytes") is not None or "counts" in value or is_inside(value.get("url"))
    return isinstance(value, bytes | list) or str(value)[:5].lower() == DATA


def run_lengths(value: Mapping[str, Any]) -> np.ndarray:
    """COCO's run lengths, compressed to a text or not, as bool [H, W]. Raises ValueError."""
    size, counts = value.get("size"), value.get("counts")
    if not (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(isinstance(n, int) and 0 < n <= MAX_SIDE for n in size)
        and size[0] * size[1] <= MAX_PIXELS
    ):
        raise ValueError(f"has run lengths of size {shown(size)}, expected [height, width]")
    if isinstance(counts, str | bytes):
        counts = _uncompressed(counts.encode() if isinstance(counts, str) else counts)
    if not isinstance(counts, list) or not all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= size[0] * size[1]
        for n in counts
    ):
        raise ValueError("has run lengths (counts) that are no list of pixels, and no text of COCO")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(
            f"has run lengths of {sum(counts)} pixels, its size has {size[0] * size[1]}"
        )
    runs = np.arange(len(counts)) % 2 == 1
    # Column by column.
    return np.ascontiguousarray(np.repeat(runs, counts).reshape(size[1], size[0]).T)


def _uncompressed(text: bytes) -> list[int]:
    """Run lengths from COCO's text: five bits a character, differences from the last but one."""
    counts: list[int] = []
    at = 0
    while at < len(text):
        number, shift, more = 0, 0, True
        while more:
            if at >= len(text) or not 48 <= text[at] < 112 or shift > 30:
                raise ValueError("has run lengths (counts) that are no text of COCO")
            digit = text[at] - 48
            number |= (digit & 31) << shift
            more, at, shift = bool(digit & 32), at + 1, shift + 5
            if not more and digit & 16:
                number |= -1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
    return counts


def _check_polygons(polygons: list[Any]) -> None:
    for polygon in polygons:
        if (
            not isinstance(polygon, list)
            or len(polygon) < 6
            or len(polygon) % 2
            or not all(
                isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e6
                for n in polygon
            )
        ):
            raise ValueError(
                "has a polygon that is not x, y, x, y, ... of three points or more: "
                f"{shown(polygon)}"
            )


def _of_address(address: str) -> bytes:
    header, comma, content = address.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ValueError("is a data: address without base64: write data:image/png;base64,...")
    return _of_base64(content)


def _of_base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"has bytes that are no base64 text, but {type(text).__name__}")
    try:
        plain = "".join(text.split())
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("has base64 that is damaged, or cut off") from None


def _packed(content: bytes, name: str) -> PackedImage:
    lossy = content.startswith(b"\xff\xd8")
    return PackedImage(f"data of {name}.{'jpg' if lossy else 'png'}", content)
