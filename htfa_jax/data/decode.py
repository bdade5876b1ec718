"""Images out of files: refused before they are decoded, or as 8 bits, upright.

Masks are read in `masks`.
"""

from __future__ import annotations

import contextlib
import io
import re
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from htfa_jax.data import file_kinds
from htfa_jax.data.image_values import DrawnMask
from htfa_jax.data.records import ImageFile, Record
from htfa_jax.data.storage import StoredImage
from htfa_jax.errors import DataError

# By their contents, whatever a file is called. Pillow knows more, some of which start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
MAX_BYTES = 256 * 2**20  # of a file
MAX_PIXELS = 64 * 2**20  # of an image: 200 MB once it is decoded
# Each costs time, an empty one too; those of a progressive JPEG are about ten.
MAX_SCANS = 100
PNG, TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Then markers: those that no segment follows, except the end, need not be found.
JPEG, START_OF_SCAN, END_OF_IMAGE = b"\xff\xd8", b"\xda", b"\xd9"
MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)

# A file, its contents, or an image in memory.
ImageSource = ImageFile | bytes | Image.Image | np.ndarray


def load_image(source: ImageSource) -> Image.Image:
    """Opens and decodes an image as RGB.

    It is turned upright as its EXIF tag says: boxes and masks are of the upright image. What is
    transparent is black, as the background of a reconstruction is. Of an animation it is the
    first image. Of 16 bits the upper 8 count.

    Raises DataError that says what is wrong with it, and whatever else Pillow raises.
    """
    with opened(source) as image:
        return _rgb(_eight_bits(upright(image)))


def decode_field(
    record: Record, field: str, loader: Callable[[ImageSource], Image.Image]
) -> Image.Image | None:
    """An image of a record, None if it has none. Raises DataError naming record, field, file."""
    source = getattr(record, field)
    if source is None:
        return None

    def fail(reason: str, kind: str = "") -> DataError:
        return record.error(f"{field}: {reason}", kind)

    return decoded(source, loader, fail)


def decoded(
    source: ImageSource,
    loader: Callable[[ImageSource], Image.Image] = load_image,
    fail: Callable[[str, str], DataError] = DataError,
) -> Image.Image:
    """An image, whatever the file of somebody else holds.

    Args:
      source: as `load_image` takes it.
      loader: `load_image` or `masks.load_mask`.
      fail: makes the error of a reason, which names the file, and of its kind.
    """
    is_file = isinstance(source, Path | StoredImage)
    name = source if is_file else f"the {type(source).__name__}"
    try:
        return loader(source)
    except DataError as error:
        raise fail(f"{name} {error}", error.kind) from error
    except FileNotFoundError:
        raise fail(
            f"no file at {name}: put it there, or correct the path{file_kinds.beside(source)}",
            "missing image",
        ) from None
    except UnidentifiedImageError:
        raise fail(
            f"{name} {file_kinds.of(source)}: save it as one of " + ", ".join(FORMATS),
            "unknown image format",
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file Pillow's decoders raise nearly anything
        raise fail(
            f"{name} cannot be decoded: {error or type(error).__name__}: copy it again, "
            "or leave the record out",
            "damaged image",
        ) from error


def decode_original(record: Record) -> Image.Image:
    """The original, which every record has. Raises DataError as `decode_field` does."""
    image = decode_field(record, "image_orig", load_image)
    if image is None:
        raise record.error("image_orig is missing")
    return image


def opened(source: ImageSource) -> contextlib.AbstractContextManager[Image.Image]:
    """An image whose size is known and is not too much, not decoded yet."""
    if isinstance(source, Image.Image):
        # The caller's own stays as it is.
        return contextlib.nullcontext(source.copy())
    if isinstance(source, np.ndarray):
        is_mask = source.dtype == np.bool_ and source.ndim == 2
        is_image = source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))
        if not is_mask and not (is_image and source.dtype == np.uint8):
            raise DataError(
                f"is {source.dtype} {list(source.shape)}; an array must be uint8 [H, W, 3] "
                "(or [H, W], or with alpha [H, W, 4]), a mask may be bool [H, W]",
                "array",
            )
        return contextlib.nullcontext(Image.fromarray(source))
    if isinstance(source, StoredImage):
        source = content_of(source)
    if isinstance(source, Path):
        found = source.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError("is not a file", "missing image")
        size = found.st_size
    else:
        size = len(source)
    if size == 0:
        raise DataError("is empty (0 bytes): copy it again", "empty image")
    if size > MAX_BYTES:
        raise DataError(
            f"has {size / 2**20:.0f} MiB, more than {MAX_BYTES >> 20}: make it smaller",
            "too large an image",
        )
    if isinstance(source, Path) and _begins(source).startswith((JPEG, PNG)):
        source = source.read_bytes()
    if isinstance(source, bytes) and too_many_scans(source):
        raise DataError(f"is a JPEG of more than {MAX_SCANS} scans: save it anew", "scans")
    try:
        return _within_limits(source if isinstance(source, Path) else io.BytesIO(source))
    except ValueError as error:
        # Of texts and profiles that are longer than Pillow wants to read.
        shorter = without_texts(source) if isinstance(source, bytes) else b""
        if not shorter or len(shorter) == size or "text" not in str(error).lower():
            raise
        return _within_limits(io.BytesIO(shorter))


def _within_limits(file: Path | io.BytesIO) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:  # at more than MAX_PIXELS of Pillow's own
        raise _too_large("far") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise _too_large(f"{image.width}x{image.height} pixels,")
    if image.format == "PNG":
        image.load()  # texts may stand behind the pixels
    return image


def too_many_scans(content: bytes) -> bool:
    """Whether a JPEG has so many scans that decoding it takes long, however small the file is."""
    # Counting bytes is quick, and right unless there are such bytes in a profile, a thumbnail or
    # behind the image.
    if not content.startswith(JPEG) or content.count(b"\xff" + START_OF_SCAN) <= MAX_SCANS:
        return False
    scans, at = 0, len(JPEG)
    while scans <= MAX_SCANS and (marker := MARKER.search(content, at)):
        kind, at = marker[1], marker.end()
        if kind == END_OF_IMAGE:
            break
        scans += kind == START_OF_SCAN
        at += int.from_bytes(content[at : at + 2], "big")  # the segment behind it
    return scans > MAX_SCANS


def content_of(image: Path | StoredImage) -> bytes:
    """What an image's file holds; masks that are drawn have the size of their original.

    Raises OSError, and of a mask what `load_image` raises of its original.
    """
    if isinstance(image, DrawnMask):
        return image.drawn(upright_size(image.original))
    return image.read_bytes()


def upright_size(source: ImageSource) -> tuple[int, int]:
    """Width and height of an image as its EXIF tag turns it, without decoding it.

    Raises what `load_image` does of what is no image.
    """
    with opened(source) as image:
        w, h = image.size
        return (h, w) if image.getexif().get(ExifTags.Base.Orientation, 1) > 4 else (w, h)


def without_texts(content: bytes) -> bytes:
    """A PNG without texts and profiles, which nothing here reads; other files as they are.

    Programs that draw images write megabytes of what they were asked, compressed to little.
    """
    if not content.startswith(PNG):
        return content
    kept, at = [PNG], len(PNG)
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] not in TEXTS:
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(PNG))


def _too_large(size: str) -> DataError:
    return DataError(
        f"has {size} more than {MAX_PIXELS >> 20} mebipixels: make it smaller",
        "too large an image",
    )


def upright(image: Image.Image) -> Image.Image:
    """The image, decoded and turned as its EXIF tag says."""
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits with the upper 8 of them, where Pillow would cut its values off."""
    if image.mode == "F":
        raise DataError("holds floating-point numbers: save it with 8 bits", "number format")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise DataError("holds numbers of 32 bits: save it with 8 bits", "number format")
    # Some programs write 8 bits into 16.
    return Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
