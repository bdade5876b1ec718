"""Templates of names: text with fields in braces, and nothing more.

Not `str.format`, whose fields can reach attributes, ask for a billion blanks and call conversions.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping


def check_template(template: str) -> None:
    """Raises ValueError that says why a text is no template with one field at least."""
    if not any(name is not None for _, name in _pieces(template)):
        raise ValueError("it names no field")


def names_in(template: str) -> set[str]:
    """The fields that a template names; none of a text that is no template."""
    try:
        return {name for _, name in _pieces(template) if name is not None}
    except ValueError:
        return set()


def fill(template: str, words: Mapping[str, str | int | float]) -> str:
    """The template with a word in each field's place.

    Raises ValueError if it is no template, KeyError with the field that has no word.
    """
    parts = []
    for text, name in _pieces(template):
        parts += [text] if name is None else [text, str(words[name])]
    return "".join(parts)


def _pieces(template: str) -> Iterator[tuple[str, str | None]]:
    """Texts, each with the name of the field behind it."""
    for text, name, form, conversion in string.Formatter().parse(template):
        if name is not None and not name.isidentifier():
            raise ValueError(
                f"{{{name}}} is no name: attributes, indices and empty braces are not read"
            )
        if form or conversion:
            raise ValueError(
                f"{{{name}}} has a conversion or a format: write its name alone; "
                "the record has to hold the text as names of files have it"
            )
        yield text, name
