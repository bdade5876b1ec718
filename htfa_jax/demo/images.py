"""What decodes an image that a caller sent; light, as it is loaded in processes of its own."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from htfa_jax.data.decode import FORMATS, decode_field, load_image, without_texts
from htfa_jax.data.masks import load_mask
from htfa_jax.data.records import Record
from htfa_jax.data.storage import PackedImage
from htfa_jax.errors import DataError

# What the page's canvas writes.
DRAWN = ("PNG", "WEBP")
FIELDS = (
    "image_orig", "image_recon", "image_target", "object_mask", "occluder_mask", "bbox_orig",
    "bbox_recon",
)  # fmt: skip


def decode(field: str, image: PackedImage, megapixels: int) -> np.ndarray:
    """An image [H, W, 3] or a mask [H, W], uint8. Raises DataError."""
    _check_size(field, image, megapixels)
    loader = load_mask if field.endswith("mask") else load_image
    return np.asarray(decode_field(record_of(image.name, **{field: image}), field, loader))


def decode_ink(field: str, layer: PackedImage, megapixels: int) -> PackedImage | None:
    """What was drawn on a transparent layer, as a mask; None if nothing was. Raises DataError."""
    _check_size(field, layer, megapixels)
    try:
        with Image.open(io.BytesIO(layer.content), formats=DRAWN) as image:
            pixels = image.convert("RGBA")
    except Exception as error:  # of a damaged file Pillow's decoders raise nearly anything
        raise DataError(f"{field}: {layer.name} is no drawing: draw it again") from error
    ink = pixels.getchannel("A").point(lambda value: 255 * (value > 0))
    if ink.getbbox() is None:
        return None
    buffer = io.BytesIO()
    ink.save(buffer, "png")
    return PackedImage("the drawn mask", buffer.getvalue())


def record_of(name: str, **values: Any) -> Record:
    """A record of what was sent, without conversation."""
    return Record(where="the upload", id=name, turns=(), **dict.fromkeys(FIELDS) | values)


def _check_size(field: str, image: PackedImage, megapixels: int) -> None:
    """Refuses what is too large, before it is decoded."""
    try:
        with Image.open(io.BytesIO(image.content), formats=FORMATS) as opened:
            fits = opened.width * opened.height <= megapixels * 1e6
    except Image.DecompressionBombError:
        fits = False
    except ValueError:  # of a PNG's long texts, which the reader leaves out
        if (shorter := without_texts(image.content)) == image.content:
            return
        _check_size(field, PackedImage(image.name, shorter), megapixels)
        return
    except Exception:  # it is no image: the reader says so
        return
    if not fits:
        raise DataError(
            f"{field}: {image.name} has more than {megapixels} million pixels: make it smaller"
        )
