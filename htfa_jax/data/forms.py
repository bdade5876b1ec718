"""Records of other projects, in this project's form.

Read are the forms of InternVL and LLaVA (`image`), of ms-swift, LLaMA-Factory and OpenAI (`images`,
`messages` with `role` and `content`), of image folders (`file_name`), of tables and preferences
(`question`, and `answer` or `chosen`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from htfa_jax.common.templates import fill, names_in
from htfa_jax.errors import DataError

Fail = Callable[[str], DataError]

# What is read of a record in this project's form.
FIELDS = (
    "id", "image_orig", "image_recon", "image_target", "object_mask", "occluder_mask", "bbox_orig",
    "bbox_recon", "conversations", "meta", "query",
)  # fmt: skip
IMAGES = FIELDS[1:6]
# What is read besides. The last two tell the size of polygons and what was not chosen.
OTHERS = (
    "occlusion_mask", "image", "images", "file_name", "messages", "question", "answer", "response",
    "chosen", "rejected", "width", "height", *(f"{name}_file_name" for name in IMAGES),
)  # fmt: skip
# Names that others have for fields, too far from them to be guessed by their letters.
MEANT = {
    "reconstruction": "image_recon", "recon": "image_recon", "target": "image_target",
    "image_gt": "image_target", "ground_truth": "image_target", "original": "image_orig",
    "mask": "object_mask", "segmentation": "object_mask", "occluder": "occluder_mask",
    "hand_mask": "occluder_mask", "bbox": "bbox_orig", "box": "bbox_orig", "boxes": "bbox_orig",
    "conversation": "conversations", "dialog": "conversations", "label": "answer",
    "caption": "answer", "img": "image_orig", "image_path": "image_orig",
}  # fmt: skip
FORMS = (
    "a record has image_orig (or image, images, file_name) and conversations (or messages, or "
    "question and answer)"
)
LONGEST = 80  # characters of a value in a message


def shown(value: Any) -> str:
    """A value as messages show it, however long it is."""
    if isinstance(value, str | bytes) and len(value) > LONGEST:
        return f"{value[:LONGEST]!r}... ({len(value)} long)"
    if isinstance(value, list | tuple) and len(value) > 20:
        return f"a list of {len(value)}"
    text = repr(value)
    if len(text) <= 2 * LONGEST:
        return text
    if isinstance(value, Mapping):
        return f"an object with {names_of(value)}"
    return text[: 2 * LONGEST] + "..."


def names_of(raw: Mapping[str, Any]) -> str:
    """The names of a record's fields, for messages."""
    names = [str(name)[:40] for name in list(raw)[:20]]
    return (", ".join(names) or "no fields") + (" and more" if len(raw) > 20 else "")


def meant_by(name: str) -> str | None:
    """The field that an unknown name may be meant for."""
    known = [*FIELDS, *OTHERS]
    return MEANT.get(name.lower()) or next(
        iter(difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)), None
    )


def unread_fields(raw: Mapping[str, Any], recon_template: str | None = None) -> list[str]:
    """Names of fields that nothing reads."""
    used = names_in(recon_template) if recon_template else ()
    return [str(n)[:LONGEST] for n in raw if n not in FIELDS and n not in OTHERS and n not in used]


def in_own_form(raw: Mapping[str, Any], recon_template: str | None, fail: Fail) -> dict[str, Any]:
    """The record with this project's names; what it has besides stays.

    Args:
      raw: decoded JSON.
      recon_template: path of a missing reconstruction, with fields of the record in braces.
      fail: makes the error of a reason.
    """
    own = dict(raw)
    for field in IMAGES:
        if (name := own.pop(f"{field}_file_name", None)) is not None:
            own.setdefault(field, name)
    if "image_orig" not in own and "file_name" in own and "image" not in own:
        own["image_orig"] = own.pop("file_name")
    found = _conversations(own, fail)
    given = next((n for n in ("image", "images") if own.get(n) is not None), None)
    if own.get("image_orig") is None and (given or found):
        name = given or "messages"
        images = own.pop(given) if given else found
        images = images if isinstance(images, list) else [images]
        if not 1 <= len(images) <= 2:
            raise fail(
                f"{name} has {len(images)} images, expected one or two: the original and its "
                "reconstruction"
            )
        if len(images) == 2 and own.get("image_recon") is not None:
            raise fail(f"{name} has a second image and image_recon is there too: leave one out")
        own |= dict(zip(("image_orig", "image_recon"), images, strict=False))
    if recon_template is not None and "image_recon" not in own:
        own["image_recon"] = _filled(recon_template, raw, fail)
    return own


def questions(raw: Mapping[str, Any], fail: Fail) -> list[Any]:
    """What a user asks in a record of any form; not checked yet."""
    turns = in_own_form(raw, None, fail).get("conversations") or []
    for i, turn in enumerate(turns if isinstance(turns, list) else ()):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str | None):
            raise fail(
                f"conversations[{i}] must be an object with from and value, it is {shown(turn)}"
            )
    if not isinstance(turns, list):
        raise fail(f"conversations must be a list of turns, it is {shown(turns)}")
    return [t.get("value") for t in turns if t.get("from") in ("human", "user")]


def _conversations(own: dict[str, Any], fail: Fail) -> list[Any]:
    """Puts `conversations` into the record. Returns the images that stand in its turns."""
    name = "conversations" if own.get("conversations") is not None else "messages"
    turns, images = own.get(name), []
    if turns is None:
        own.pop("messages", None)
        question = own.get("question")
        answer = next((own[n] for n in ("answer", "response", "chosen") if n in own), None)
        if question is not None:
            own["conversations"] = [
                {"from": "human", "value": question},
                *([] if answer is None else [{"from": "gpt", "value": answer}]),
            ]
            for used in ("question", "answer", "response", "chosen", "rejected"):
                own.pop(used, None)
        return []
    if isinstance(turns, Mapping):  # one turn
        turns = [turns]
    if isinstance(turns, list):
        turns = [
            _turn(turn, f"{name}[{i}]", images, fail)
            if isinstance(turn, Mapping) and "role" in turn and "from" not in turn
            else turn
            for i, turn in enumerate(turns)
        ]
    if name == "messages":
        del own["messages"]
    own["conversations"] = turns
    return images


def _turn(turn: Mapping[str, Any], where: str, images: list[Any], fail: Fail) -> dict[str, Any]:
    """A turn with `role` and `content` as one with `from` and `value`."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "\n".join(
            text
            for i, part in enumerate(content)
            if (text := _part(part, f"{where}.content[{i}]", images, fail)) is not None
        )
    rest = {k: v for k, v in turn.items() if k not in ("role", "content", "value")}
    return {"from": turn["role"], "value": content, **rest}


def _part(part: Any, where: str, images: list[Any], fail: Fail) -> str | None:
    """The text of a part of a content; an image goes to `images`."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        if isinstance(text := part.get("text"), str):
            return text
        named = next((part[n] for n in ("image", "image_url", "path", "url") if n in part), None)
        if str(part.get("type", "image")).startswith("image"):
            if named is not None:
                images.append(named)
            return None
    raise fail(f"{where} must be a text or an image, it is {shown(part)}")


def _filled(template: str, raw: Mapping[str, Any], fail: Fail) -> str:
    """The template with the record's own fields, then those of its `meta`."""
    meta = raw.get("meta")
    known = {**(meta if isinstance(meta, Mapping) else {}), **raw}
    words = {
        name: value
        for name, value in known.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool)
    }
    try:
        return fill(template, words)
    except KeyError as error:
        raise fail(
            f"data.recon_template={template!r} needs the field {error.args[0]}, which the record "
            f"does not have as text or a number; it has {', '.join(words) or 'none'}"
        ) from None
    except ValueError as error:
        raise fail(f"data.recon_template={template!r} is no template: {error}") from error
