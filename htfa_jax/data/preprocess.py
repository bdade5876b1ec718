"""Pictures, masks and boxes of a record as arrays of the model's size."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from htfa_jax.data.places import StoredPicture
from htfa_jax.data.records import Picture, Record

Box = tuple[float, float, float, float]

# A target or mask may differ from its original in size, not in shape by more than this.
ASPECT_TOLERANCE = 0.02


@dataclass(frozen=True)
class Placement:
    """Where a picture of `size` (width, height) lands in the square.

    Attributes:
      size: of the source, in pixels.
      region: (x, y, w, h) in the square, whole pixels.
    """

    size: tuple[int, int]
    region: tuple[int, int, int, int]

    def box(self, box: Box) -> Box:
        """A box of the source picture, in the square."""
        x, y, w, h = self.region
        scale_x, scale_y = w / self.size[0], h / self.size[1]
        return (
            x + box[0] * scale_x,
            y + box[1] * scale_y,
            box[2] * scale_x,
            box[3] * scale_y,
        )


def place(
    size: tuple[int, int], image_size: int, resize: Literal["letterbox", "squash"]
) -> Placement:
    """Letterbox keeps the shape and centres the picture; squash fills the square."""
    if resize == "squash":
        return Placement(size, (0, 0, image_size, image_size))
    scale = image_size / max(size)
    w, h = (max(1, round(n * scale)) for n in size)
    return Placement(size, ((image_size - w) // 2, (image_size - h) // 2, w, h))


Source = Picture | Image.Image | np.ndarray


def load_image(source: Source) -> Image.Image:
    """Opens and decodes a picture, upright, as RGB. Raises OSError or ValueError."""
    with _opened(source) as image:
        return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")


def load_mask(source: Source) -> Image.Image:
    """Opens and decodes a mask as 8-bit grey; above 127 is true.

    Values 0 and 1 are taken for 0 and 255. Raises ValueError if nothing would be true in it
    although it is not black.
    """
    with _opened(source) as image:
        mask = image.convert("L")
    largest = mask.getextrema()[1]
    if largest == 1:
        return mask.point(lambda value: 255 * value)
    if 1 < largest <= 127:
        raise ValueError(f"its largest value is {largest}; a mask is white (255, or 1) on black")
    return mask


def _opened(source: Source) -> contextlib.AbstractContextManager[Image.Image]:
    """A file, opened, or a picture in memory, which stays open. Raises OSError or ValueError."""
    if isinstance(source, Image.Image):
        return contextlib.nullcontext(source)
    if isinstance(source, np.ndarray):
        is_mask = source.dtype == np.bool_ and source.ndim == 2
        is_picture = source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))
        if not is_mask and not (is_picture and source.dtype == np.uint8):
            raise ValueError(
                f"it is {source.dtype} {list(source.shape)}; an array must be uint8 [H, W, 3] "
                "(or [H, W], or with alpha [H, W, 4]), a mask may be bool [H, W]"
            )
        return contextlib.nullcontext(Image.fromarray(source))
    if isinstance(source, StoredPicture):
        return Image.open(io.BytesIO(source.read_bytes()))
    return Image.open(source)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 16 bits with the upper 8 of them, where Pillow would cut its values off."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    return Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))


def fit(image: Image.Image, placement: Placement, image_size: int) -> np.ndarray:
    """The picture at its place in a square of zeros: uint8 [H, W, 3] or [H, W]."""
    x, y, w, h = placement.region
    if image.size != (w, h):
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    if (w, h) == (image_size, image_size):
        return array
    square = np.zeros((image_size, image_size, *array.shape[2:]), np.uint8)
    square[y : y + h, x : x + w] = array
    return square


def load_pictures(
    record: Record, image_size: int, resize: Literal["letterbox", "squash"]
) -> dict[str, Any]:
    """All pictures, masks and boxes of a record as `Batch` fields of one sample.

    Raises DataError naming the record, the field and the file.
    """
    zeros = np.zeros((image_size, image_size, 3), np.uint8)
    empty = np.zeros((image_size, image_size), bool)
    no_box = np.zeros(4, np.float32)
    sample: dict[str, Any] = {}

    def decode(field: str, loader: Callable[[Source], Image.Image]) -> Image.Image | None:
        return decode_field(record, field, loader)

    def same_frame(field: str, image: Image.Image, placement: Placement) -> None:
        (w, h), (w0, h0) = image.size, placement.size
        if abs(w * h0 / (h * w0) - 1) > ASPECT_TOLERANCE:
            raise record.error(f"{field} is {w}x{h} but must show the original's frame, {w0}x{h0}")

    orig = decode("image_orig", load_image)
    placement = place(orig.size, image_size, resize)
    sample["image_orig"] = fit(orig, placement, image_size)
    sample["region_orig"] = np.array(placement.region, np.float32)
    for field in ("image_target", "object_mask", "occluder_mask"):
        is_mask = field.endswith("mask")
        image = decode(field, load_mask if is_mask else load_image)
        sample["has_" + field.removeprefix("image_")] = np.bool_(image is not None)
        if image is None:
            sample[field] = empty if is_mask else zeros
            continue
        same_frame(field, image, placement)
        array = fit(image, placement, image_size)
        sample[field] = array > 127 if is_mask else array

    recon = decode("image_recon", load_image)
    sample["has_recon"] = np.bool_(recon is not None)
    recon_placement = None if recon is None else place(recon.size, image_size, resize)
    sample["image_recon"] = zeros if recon is None else fit(recon, recon_placement, image_size)
    sample["region_recon"] = (
        no_box if recon is None else np.array(recon_placement.region, np.float32)
    )
    for field, where in (("bbox_orig", placement), ("bbox_recon", recon_placement)):
        box = getattr(record, field) if where is not None else None
        if box is not None and not is_inside(box, where.size):
            raise record.error(
                f"{field}={list(box)} does not lie in its picture of {where.size[0]}x"
                f"{where.size[1]}: expected x, y, width, height in pixels"
            )
        sample["has_" + field] = np.bool_(box is not None)
        sample[field] = no_box if box is None else np.array(where.box(box), np.float32)
    return sample


def decode_field(
    record: Record, field: str, loader: Callable[[Source], Image.Image]
) -> Image.Image | None:
    """A picture of a record, None if it has none. Raises DataError naming record, field, file."""
    source = getattr(record, field)
    if source is None:
        return None
    is_file = isinstance(source, Path | StoredPicture)
    name = source if is_file else f"the {type(source).__name__}"
    try:
        return loader(source)
    except FileNotFoundError:
        raise record.error(f"{field}: no file at {name}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise record.error(f"{field}: {name} cannot be decoded: {error}") from error


def is_inside(box: Box, size: tuple[int, int]) -> bool:
    """Whether at least a pixel of a box is a pixel of a picture of `size`."""
    return all(
        length >= 1 and start + length >= 1 and start <= limit - 1
        for start, length, limit in zip(box[:2], box[2:], size, strict=True)
    )


def without_recon(sample: dict[str, Any]) -> dict[str, Any]:
    """The same sample as if its record had no reconstruction."""
    fields = ("image_recon", "region_recon", "bbox_recon", "has_recon", "has_bbox_recon")
    return {**sample, **{f: np.zeros_like(sample[f]) for f in fields}}
