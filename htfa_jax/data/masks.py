"""Masks out of files, by their own values: what is certain is read, the rest is refused.

A mask says where something is. Programs write it in many ways: white on black, 0 and 1, indices of
a palette, alpha, 16 bits. Converting each to grey would give an object for any of them, and for
some the wrong one: of a label map the classes with bright colours, of a drawing in alpha nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from htfa_jax.data.decode import ImageSource, opened, upright
from htfa_jax.errors import DataError

Levels = tuple[np.ndarray, np.ndarray]  # the values of a mask, and how many pixels have each

# Of more values a mask is soft or was compressed with losses; label maps of one scene have fewer.
FEW_LEVELS = 16
SHOWN = 6  # values in a message
# Channels of a grey image may differ by so much: JPEG rounds them one by one.
GREY = 12
# Up to here, and from here on, a pixel of a soft mask is decided.
DARK, BRIGHT = 32, 224
# Shares of the pixels between these: a photograph has more.
MOST_BETWEEN = 0.5
# Formats that may lose something. Their values are never exact.
LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000")
# How Pillow stretches values of two and four bits.
STRETCHED = {"L;2": 85, "L;4": 17}
EXPECTED = "expected a mask: 255 (or 1) where the object is, 0 elsewhere, soft at its edges at most"


def load_mask(source: ImageSource) -> Image.Image:
    """Opens and decodes a mask as 8-bit grey, upright; above 127 is true.

    Read are: black and white, also with soft edges or as JPEG; 0 and 1, as values or as indices of
    a palette; one pure colour on black; one colour in alpha; 16 bits and floating-point numbers
    that hold these.

    Raises DataError with the counts of its values if they are not those of a mask, as of label
    maps and photographs, and as `load_image` does.
    """
    with opened(source) as image:
        kind = image.format
        stretch = STRETCHED.get(str(image.tile[0][3]), 1) if getattr(image, "tile", None) else 1
        image = upright(image)
        return Image.fromarray(_values(image, stretch, kind in LOSSY))


def true_share(mask: Image.Image) -> float:
    """The share of a mask's pixels that is true."""
    return float((np.asarray(mask) > 127).mean())


def _values(image: Image.Image, stretch: int, lossy: bool) -> np.ndarray:
    """The mask as uint8 [H, W], above 127 where it is true."""
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode == "F" or image.mode.startswith("I"):
        return _of_numbers(np.asarray(image))
    if image.has_transparency_data and (found := _of_alpha(image, lossy)) is not None:
        return found
    if image.mode == "P":
        return _of_palette(image, lossy)
    if image.mode in ("L", "LA", "La"):
        grey = np.asarray(image.getchannel(0))
        if stretch > 1 and grey.max() == stretch:  # of 2 or 4 bits: 0 and 1
            return np.where(grey > 0, np.uint8(255), np.uint8(0))
        return _of_grey(grey, lossy)
    return _of_colours(image.convert("RGB"), lossy)


def _of_numbers(values: np.ndarray) -> np.ndarray:
    """16 bits, 32 bits or floating point."""
    levels = _levels(values)
    if not np.isfinite(levels[0].astype(np.float64)).all():
        raise _refused(levels, "some are no numbers")
    for top in (1, 255, 65535):
        if np.isin(levels[0], (0, top)).all():
            return np.where(values == top, np.uint8(255), np.uint8(0))
    largest = levels[0][-1]
    if levels[0][0] < 0 or largest > 65535:
        raise _refused(levels)
    if values.dtype.kind == "f":
        if largest <= 1:
            values = values * np.float32(255)
        return _of_grey(np.round(values).astype(np.int64), False, levels)
    if largest <= 255:
        return _of_grey(values.astype(np.uint8), False, levels)
    if len(levels[0]) <= FEW_LEVELS:
        _check_edges(values, levels, 65535)
    return _of_grey((values >> 8).astype(np.uint8), False, levels)


def _of_palette(image: Image.Image, lossy: bool) -> np.ndarray:
    """By its colours where they are greys or one pure colour on black, else by its indices."""
    indices = np.asarray(image)
    palette = np.asarray(image.convert("RGB"))
    levels = _levels(indices)
    if (palette.max(axis=2) - palette.min(axis=2)).max() == 0:
        return _of_grey(palette[..., 0], lossy, levels)
    background = palette[indices == 0]
    is_black = not len(background) or not background.any()
    if is_black and np.isin(levels[0], (0, 1)).all():
        return np.where(indices == 1, np.uint8(255), np.uint8(0))
    if is_black and (grey := _of_one_colour(palette)) is not None and grey.max() == 255:
        return _of_grey(grey, lossy)
    void = " (in PASCAL VOC's 255 is void, not the object)" if levels[0][-1] == 255 else ""
    raise _refused(levels, f"indices of a palette, as label maps have them{void}")


def _of_alpha(image: Image.Image, lossy: bool) -> np.ndarray | None:
    """The mask of an image with alpha; None where all of it is opaque."""
    rgba = np.asarray(image.convert("RGBA"))
    colours, alpha = rgba[..., :3], rgba[..., 3]
    if alpha.min() == 255:
        return None
    seen = colours[alpha >= 128]
    one_colour = not len(seen) or np.ptp(seen, axis=0).max() <= 8
    if one_colour and np.ptp(colours.reshape(-1, 3), axis=0).max() <= 8:
        return _of_grey(alpha, lossy)  # colours say nothing
    try:
        by_colour = _of_colours(Image.fromarray(np.ascontiguousarray(colours)), lossy)
    except DataError:
        if one_colour and len(seen):
            return _of_grey(alpha, lossy)
        raise DataError(
            "is no mask: it has many colours and alpha, so that it may be cut out, or have a "
            "hole, where the object is; " + EXPECTED,
            "mask",
        ) from None
    # What is behind transparent pixels must not matter: black there is what one sees.
    shown = (by_colour.astype(np.uint16) * alpha // 255).astype(np.uint8)
    decided = (alpha == 0) | (alpha == 255)
    if ((shown > 127) != (by_colour > 127))[decided].any():
        raise DataError(
            "is no mask: its colours and its alpha contradict each other (white is transparent); "
            "save it without alpha, white where the object is",
            "mask",
        )
    if one_colour and ((alpha > 127) != (by_colour > 127))[decided].any():
        raise DataError(
            "is no mask: its colours say one thing and its alpha another; save it without alpha, "
            "white where the object is",
            "mask",
        )
    return shown


def _of_colours(image: Image.Image, lossy: bool) -> np.ndarray:
    channels = [np.asarray(channel) for channel in image.split()]
    lowest, highest = (pick(pick(*channels[:2]), channels[2]) for pick in (np.minimum, np.maximum))
    spread = int((highest - lowest).max())
    pixels = np.asarray(image)
    if spread == 0 or (spread <= GREY and len(_levels(channels[0])[0]) > 2):
        return _of_grey(np.asarray(image.convert("L")), lossy)
    grey = _of_one_colour(pixels)
    if grey is not None and grey.max() == 255:
        return _of_grey(grey, lossy)
    numbers = pixels.astype(np.int64) @ np.array([65536, 256, 1])
    values, counts = _levels(numbers)
    names = [f"#{value:06x}" for value in values.tolist()]
    raise DataError(
        f"is no mask: its colours are {_counted(names, counts.tolist())}; {EXPECTED}. Of a label "
        "map, take the pixels of one colour",
        "mask",
    )


def _of_one_colour(pixels: np.ndarray) -> np.ndarray | None:
    """How bright an image of one pure colour on black is; None if it has others."""
    grey = pixels.max(axis=2)
    off = (pixels == 0).all(axis=(0, 1))
    full = (pixels == grey[..., None]).all(axis=(0, 1))
    return grey if (off | full).all() else None


def _of_grey(grey: np.ndarray, lossy: bool, own: Levels | None = None) -> np.ndarray:
    """Grey values as they are, 0 and 1 as 0 and 255.

    Args:
      grey: integers up to 255 [H, W].
      lossy: whether they were compressed with losses.
      own: the values that messages name, if they are others.
    """
    levels = _levels(grey)
    own = own or levels
    found = set(levels[0][:3].tolist()) if len(levels[0]) <= 2 else set()
    grey = grey.astype(np.uint8)
    if found and found <= {0, 1}:
        return grey * np.uint8(255)
    if found and (found <= {0, 255} or found == {16, 235}):
        return grey
    if levels[0][-1] <= 127:
        raise _refused(own, f"its largest value is {_plain(own[0][-1])}")
    if found and 0 in found:
        return grey  # lighter grey on black
    if not lossy and len(levels[0]) <= FEW_LEVELS:
        _check_edges(grey, own, 255, levels)
    else:
        _check_soft(grey, own)
    return grey


def _check_edges(values: np.ndarray, own: Levels, top: int, levels: Levels | None = None) -> None:
    """Raises DataError unless each value between 0 and `top` lies across edges alone.

    A class of a label map lies side by side with others; a soft edge has darker pixels on one side
    and brighter ones on the other.
    """
    darkest, brightest = _neighbours(values)
    across = (darkest < values) & (values < brightest)
    for value, count in zip(*(levels or own), strict=True):
        if 0 < value < top and across[values == value].sum() < 0.75 * count:
            raise _refused(own, "as label maps have them")


def _check_soft(grey: np.ndarray, own: Levels) -> None:
    """Raises DataError if a mask of many values has areas of more than two, or is a photograph."""
    between = (grey >= DARK) & (grey < BRIGHT)
    if between.mean() > MOST_BETWEEN:
        raise _refused(own, "most of them between black and white, as in a photograph")
    darkest, brightest = _neighbours(grey)
    flat = np.bincount(grey[darkest == brightest].ravel(), minlength=256)
    areas, last = 0, -9
    for value in np.flatnonzero(flat >= max(9, 0.005 * flat.sum())).tolist():
        areas += value - last > 3
        last = value
    if areas > 2:
        raise _refused(own, "in areas of more than two, as label maps have them")


def _neighbours(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest value of each pixel and the eight around it."""
    padded = np.pad(values, 1, mode="edge")
    h, w = values.shape
    low = high = values
    for y in range(3):
        for x in range(3):
            part = padded[y : y + h, x : x + w]
            low, high = np.minimum(low, part), np.maximum(high, part)
    return low, high


def _levels(values: np.ndarray) -> Levels:
    if values.dtype == np.uint8:  # quicker than to sort the pixels
        counts = np.bincount(values.ravel(), minlength=256)
        found = np.flatnonzero(counts)
        return found, counts[found]
    found, counts = np.unique(values, return_counts=True)
    return found, counts


def _refused(levels: Levels, why: str = "") -> DataError:
    values, counts = levels
    said = _counted([_plain(v) for v in values], counts.tolist())
    return DataError(
        f"is no mask: its values are {said}{why and ', ' + why}; {EXPECTED}. Of a label map, save "
        "the pixels of one class: Image.fromarray((labels == 5) * numpy.uint8(255))",
        "mask",
    )


def _plain(value: Any) -> str:
    return f"{float(value):.4g}" if isinstance(value, float | np.floating) else str(int(value))


def _counted(names: Iterable[str], counts: list[int]) -> str:
    """The names with their counts, the most frequent ones, in their order."""
    pairs = list(zip(names, counts, strict=True))
    kept = sorted(range(len(pairs)), key=lambda i: -pairs[i][1])[:SHOWN]
    said = ", ".join(f"{pairs[i][0]} ({pairs[i][1]})" for i in sorted(kept))
    return said + (f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else "")
