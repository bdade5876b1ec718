"""What a file is that is no image here, and what is there in place of a missing one."""

from __future__ import annotations

import itertools
import os
import unicodedata
from pathlib import Path
from typing import Any

LOOKED_AT = 20_000  # names of a folder
# How files begin that people take for images, and what they are.
BEGINNINGS = {
    b"version https://git-lfs": "is a pointer of git-lfs (run git lfs pull)",
    b"<!DOCTYPE": "is a page of the web, not the image behind it",
    b"<!doctype": "is a page of the web, not the image behind it",
    b"<html": "is a page of the web, not the image behind it",
    b"<svg": "is a drawing (SVG)",
    b"<?xml": "is XML, perhaps a drawing (SVG)",
    b"%PDF": "is a PDF",
    b"8BPS": "is a file of Photoshop (PSD)",
    b"PK\x03\x04": "is a ZIP archive",
    b"\x93NUMPY": "is an array of NumPy",
    b"\x1f\x8b": "is compressed by gzip",
}
BRANDS = {
    b"heic": "HEIC, as phones write it", b"heix": "HEIC, as phones write it",
    b"mif1": "HEIF, as phones write it", b"msf1": "HEIF, as phones write it",
    b"avif": "AVIF", b"avis": "AVIF", b"jxl ": "JPEG XL", b"crx ": "a raw file of a camera",
}  # fmt: skip


def of(source: Any) -> str:
    """What a file that could not be read is, as far as its beginning says."""
    try:
        beginning = source if isinstance(source, bytes) else _beginning(source)
    except OSError:
        beginning = b""
    if beginning[4:8] == b"ftyp" and beginning[8:12] in BRANDS:
        return f"is {BRANDS[beginning[8:12]]}, which is not read here"
    for start, what in BEGINNINGS.items():
        if beginning.lstrip().startswith(start):
            return f"{what}, no image that can be read"
    return "is no image that can be read"


def _beginning(source: Any) -> bytes:
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(64)
    return source.read_bytes()[:64] if hasattr(source, "read_bytes") else b""


def beside(source: Any) -> str:
    """What is there under nearly the same name as a missing file, for messages; or nothing."""
    if not isinstance(source, Path):
        return ""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    try:
        with os.scandir(source.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, LOOKED_AT)]
    except OSError:
        return f" (there is no folder {source.parent.name})" if source.parent.name else ""
    for name in names:
        if plain(name) == plain(source.name):
            return f" ({name} is there: capital and small letters differ)"
    for name in names:
        if plain(Path(name).stem) == plain(source.stem):
            return f" ({name} is there)"
    return ""


def as_written(folder: Path, name: str) -> str:
    """The name in a folder, or the one that is there with the same letters, composed otherwise.

    macOS writes an accent as a character of its own, others do not.
    """
    if name.isascii() or (folder / name).exists():
        return name
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, name)
        if (folder / other).exists():
            return other
    return name
