"""A record's images as file contents, to be packed: as they are, or reduced in size."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from htfa_jax.data.decode import content_of, decode_field, load_image
from htfa_jax.data.image_values import is_inside
from htfa_jax.data.masks import load_mask
from htfa_jax.data.preprocess import BOXES, IMAGES, MASKS, Box, Placement, placement_of
from htfa_jax.data.records import Record

# What a record's JSON may call an image, where that is not its field.
NAMES = {"object_mask": ("object_mask", "occlusion_mask")}
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}


def read_files(
    record: Record, image_size: int | None
) -> tuple[Mapping[str, Any], dict[str, bytes]]:
    """A record's JSON values and the contents of its images by the names that it gives them.

    Args:
      record: as a dataset gives it.
      image_size: longer side that larger images are reduced to, boxes with them; None leaves
        every file as it is.

    Raises DataError that names the field and the file.
    """
    raw, images = dict(record.raw), {}
    for field in (*IMAGES, *MASKS):
        image = getattr(record, field)
        if image is None:
            continue
        key = next(k for k in NAMES.get(field, (field,)) if raw.get(k) is not None)
        if not isinstance(raw[key], str) or is_inside(raw[key]):
            raw[key] = str(image)  # no file of its own: by the name it has there
        if image_size is None:
            images[raw[key]] = _content(record, field)
            continue
        content, placement = _reduced(record, field, image_size)
        name = raw[key]
        if images.setdefault(name, content) != content:
            raw[key] = name = f"{field}/{name}"  # one file, read as image and as mask
            images[name] = content
        box = next((b for b, of in BOXES.items() if of == field), None)
        if box is not None and getattr(record, box) is not None and placement is not None:
            raw[box] = _scaled(getattr(record, box), placement)
    return raw, images


def _content(record: Record, field: str) -> bytes:
    image = getattr(record, field)
    try:
        content = content_of(image)
    except FileNotFoundError:
        raise record.error(f"{field}: no file at {image}") from None
    except OSError as error:
        raise record.error(f"{field}: {image} cannot be read: {error}") from error
    if not content:
        raise record.error(f"{field}: {image} has no bytes")
    return content


def _reduced(record: Record, field: str, image_size: int) -> tuple[bytes, Placement | None]:
    """File content, and where the image went; None if it was small enough and stays as it is."""
    is_mask = field.endswith("mask")
    image = decode_field(record, field, load_mask if is_mask else load_image)
    if max(image.size) <= image_size:
        return _content(record, field), None
    placement = placement_of(image.size, image_size, "letterbox")
    image = image.resize(placement.region[2:], Image.Resampling.BICUBIC)
    if is_mask:
        image = image.point(lambda value: 255 * (value > 127))
    lossless = is_mask or getattr(record, field).suffix.lower() not in (".jpg", ".jpeg")
    stream = io.BytesIO()
    image.save(stream, **({"format": "PNG"} if lossless else JPEG))
    return stream.getvalue(), placement


def _scaled(box: Box, placement: Placement) -> list[float]:
    """A box of the whole image in the reduced one."""
    x, y, _, _ = placement.region
    left, top, width, height = placement.box(box)
    return [left - x, top - y, width, height]
