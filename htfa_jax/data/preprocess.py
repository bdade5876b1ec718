"""Images, masks and boxes of a record as arrays of the model's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from htfa_jax.data.decode import decode_field, load_image
from htfa_jax.data.masks import load_mask
from htfa_jax.data.records import Record

Box = tuple[float, float, float, float]

IMAGES = ("image_orig", "image_recon", "image_target")
MASKS = ("object_mask", "occluder_mask")
# The image that a box or a region is of.
BOXES = {"bbox_orig": "image_orig", "bbox_recon": "image_recon"}
REGIONS = {"region_orig": "image_orig", "region_recon": "image_recon"}
NOWHERE: Box = (0.0, 0.0, 0.0, 0.0)
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

# A target or mask may differ from its original in size, not in shape by more than this.
ASPECT_TOLERANCE = 0.02


@dataclass(frozen=True)
class Placement:
    """Where an image of `size` (width, height) lands in the square.

    Attributes:
      size: of the source, in pixels.
      region: (x, y, w, h) in the square, whole pixels.
      window: the part of it that is seen there, (x, y, w, h) in parts of its sides.
    """

    size: tuple[int, int]
    region: tuple[int, int, int, int]
    window: Box = WHOLE

    def box(self, box: Box) -> Box:
        """A box of the source image, in the square."""
        x, y, w, h = self.region
        left, top, across, down = self.window
        scale_x, scale_y = w / (across * self.size[0]), h / (down * self.size[1])
        return (
            x + (box[0] - left * self.size[0]) * scale_x,
            y + (box[1] - top * self.size[1]) * scale_y,
            box[2] * scale_x,
            box[3] * scale_y,
        )


def placement_of(
    size: tuple[int, int], image_size: int, resize: Literal["letterbox", "squash"]
) -> Placement:
    """Letterbox keeps the shape and centres the image; squash fills the square."""
    if resize == "squash":
        return Placement(size, (0, 0, image_size, image_size))
    scale = image_size / max(size)
    w, h = (max(1, round(n * scale)) for n in size)
    return Placement(size, ((image_size - w) // 2, (image_size - h) // 2, w, h))


def fit(image: Image.Image, placement: Placement, image_size: int) -> np.ndarray:
    """The image at its place in a square of zeros: uint8 [H, W, 3] or [H, W]."""
    x, y, w, h = placement.region
    if image.size != (w, h) or placement.window != WHOLE:
        left, top, across, down = placement.window
        seen = (left, top, min(left + across, 1.0), min(top + down, 1.0))
        box = tuple(part * side for part, side in zip(seen, 2 * image.size, strict=True))
        image = image.resize((w, h), Image.Resampling.BICUBIC, box=box)
    array = np.asarray(image)
    if (w, h) == (image_size, image_size):
        return array
    square = np.zeros((image_size, image_size, *array.shape[2:]), np.uint8)
    square[y : y + h, x : x + w] = array
    return square


def load_images(
    record: Record,
    image_size: int,
    resize: Literal["letterbox", "squash"],
    crop: Callable[[Sequence[Box]], Box] | None = None,
) -> dict[str, Any]:
    """All images, masks and boxes of a record as `Batch` fields of one sample.

    Args:
      record: whose images they are.
      image_size: of the square, in pixels.
      resize: as in `place`.
      crop: from the object's boxes in original and reconstruction to the part that is to be seen
        of all images, as `Placement.window`; None: all of them.

    Raises DataError naming the record, the field and the file.
    """
    images = {f: decode_field(record, f, load_image) for f in IMAGES}
    images |= {f: decode_field(record, f, load_mask) for f in MASKS}
    sizes = {f: x.size for f, x in images.items() if x is not None}
    for field in ("image_target", *MASKS):
        if field in sizes:
            _check_frame(record, field, sizes[field], sizes["image_orig"])
    placements = {f: placement_of(size, image_size, resize) for f, size in sizes.items()}
    for field, name in BOXES.items():
        box = getattr(record, field)
        if box is not None and name in sizes and not is_inside(box, sizes[name]):
            w, h = sizes[name]
            hint = "; these look like parts of its sides (0 to 1)" if max(box) <= 1 else ""
            raise record.error(
                f"{field}={list(box)} does not lie in its image of {w}x{h}: expected x, y, "
                f"width, height in pixels of the upright image{hint}",
                "box outside",
            )
    if crop is not None:
        window = crop(_objects(record, images))
        placements = {f: replace(p, window=window) for f, p in placements.items()}

    sample: dict[str, Any] = {}
    for field, image in images.items():
        if field != "image_orig":
            sample["has_" + field.removeprefix("image_")] = np.bool_(image is not None)
        if image is None:
            shape = (image_size, image_size) if field in MASKS else (image_size, image_size, 3)
            sample[field] = np.zeros(shape, bool if field in MASKS else np.uint8)
        else:
            # Target and masks are stretched to where the original is.
            where = placements["image_recon" if field == "image_recon" else "image_orig"]
            array = fit(image, where, image_size)
            sample[field] = array > 127 if field in MASKS else array
    for field, name in REGIONS.items():
        region = placements[name].region if name in sizes else NOWHERE
        sample[field] = np.array(region, np.float32)
    for field, name in BOXES.items():
        box = getattr(record, field) if name in sizes else None
        sample["has_" + field] = np.bool_(box is not None)
        box = NOWHERE if box is None else placements[name].box(box)
        sample[field] = np.array(box, np.float32)
    return sample


def _check_frame(
    record: Record, field: str, size: tuple[int, int], original: tuple[int, int]
) -> None:
    (w, h), (w0, h0) = size, original
    if abs(w * h0 / (h * w0) - 1) > ASPECT_TOLERANCE:
        raise record.error(
            f"{field} is {w}x{h} but must show the original's frame, {w0}x{h0} (upright, as its "
            "EXIF tag says): make it of the same shape",
            "another frame",
        )


def _objects(record: Record, images: Mapping[str, Image.Image | None]) -> list[Box]:
    """The object in each of the two images that there is, in parts of the image's sides."""
    boxes = []
    for field, name in BOXES.items():
        image, box = images[name], getattr(record, field)
        if image is None:
            continue
        if box is None and name == "image_orig" and images["object_mask"] is not None:
            image = images["object_mask"]
            x0, y0, x1, y1 = image.point(lambda v: 255 * (v > 127)).getbbox() or (0, 0, *image.size)
            box = (x0, y0, x1 - x0, y1 - y0)
        if box is None:
            raise record.error(
                f"augment.crop does not know where the object is in {name}: give {field}, or "
                "set augment.crop=0",
                "box missing",
            )
        boxes.append(tuple(n / side for n, side in zip(box, 2 * image.size, strict=True)))
    return boxes


def is_inside(box: Box, size: tuple[int, int]) -> bool:
    """Whether at least a pixel of a box is a pixel of an image of `size`."""
    return all(
        length >= 1 and start + length >= 1 and start <= limit - 1
        for start, length, limit in zip(box[:2], box[2:], size, strict=True)
    )


def without_recon(sample: dict[str, Any]) -> dict[str, Any]:
    """The same sample as if its record had no reconstruction."""
    fields = ("image_recon", "region_recon", "bbox_recon", "has_recon", "has_bbox_recon")
    return {**sample, **{f: np.zeros_like(sample[f]) for f in fields}}
