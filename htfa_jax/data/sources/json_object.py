"""JSON files that are no array and no lines: records under a key, and records over many lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from htfa_jax.common.json_files import parse_json
from htfa_jax.data.forms import FIELDS, OTHERS, names_of
from htfa_jax.errors import DataError

# Such a file is read as a whole.
MAX_BYTES = 2**30
META = ("root", "annotation")  # of a dataset in InternVL's meta files


def begins_as_lines(line: bytes, is_all: bool) -> bool:
    """Whether a file's first line is a record, or one that is damaged.

    Args:
      line: the first one that is not blank.
      is_all: whether the file has no other.
    """
    try:
        value = parse_json(line, "", DataError, object, allow_nan=True)
    except DataError:
        # What is written over many lines ends its first one behind a bracket, a comma or a name.
        return not line.lstrip().startswith(b"{") or line.rstrip()[-1:] not in b"{[,:"
    return not is_all or not isinstance(value, Mapping) or records_in(value) is None


def records_in(value: Mapping[str, Any]) -> list[Any] | None:
    """The records that an object holds under one of its keys; None if it is a record itself.

    Raises ValueError if it is another thing that people have for a dataset.
    """
    if {"images", "annotations", "categories"} <= value.keys():
        raise ValueError(
            "is in COCO's form, whose images and annotations are lists of their own: write one "
            "record for each object"
        )
    if any(name in value for name in ("image_orig", "image", "images", "messages", "file_name")):
        return None
    if value and all(isinstance(v, Mapping) and all(k in v for k in META) for v in value.values()):
        first = next(iter(value.values()))
        raise ValueError(
            "is a list of datasets, as InternVL's meta files are: give a dataset by its own "
            f"name (data.train={str(first['annotation'])[:200]}, "
            f"data.image_root={str(first['root'])[:200]}), several of them with data.sources"
        )
    lists = {
        name: each
        for name, each in value.items()
        if isinstance(each, list) and each and all(isinstance(v, Mapping) for v in each)
    }
    known = {name: each for name, each in lists.items() if name not in (*FIELDS, *OTHERS)}
    if len(known) > 1:
        raise ValueError(
            f"has lists of objects under {names_of(known)}: write the records alone, as an "
            "array or as lines"
        )
    return next(iter(known.values()), None)


def texts(content: bytes) -> list[bytes] | None:
    """The records' texts of a file that begins with an object; None if it is no JSON as a whole.

    Raises ValueError if it is a thing that holds no records.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"is no JSON lines, and longer than {MAX_BYTES >> 20} MiB")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := _behind_blanks(text, at)) < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        found.append(value)
    if len(found) == 1 and isinstance(found[0], Mapping):
        found = records_in(found[0]) or found
    return [
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") for value in found
    ]


def _behind_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
