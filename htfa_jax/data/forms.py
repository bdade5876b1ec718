"""Other projects' forms of a record, brought into this project's own.

Read are, beside records with `image_orig`: InternVL's multi-image form (`"image": [original,
reconstruction]`), LLaVA's and OCC-MLLM's (`"image": original`). A template names the
reconstruction of records that name none, such as `{id}_0_obman_test_rgb_{id}.jpg.png`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from htfa_jax.errors import DataError

Fail = Callable[[str], DataError]


def in_own_form(raw: Mapping[str, Any], recon_template: str | None, fail: Fail) -> Mapping:
    """The record with `image_orig` and `image_recon` in place of `image`; the rest as it is.

    Args:
      raw: decoded JSON.
      recon_template: path of a missing reconstruction, with fields of the record in braces.
      fail: makes the error of a reason.
    """
    own = dict(raw)
    if "image" in raw and "image_orig" not in raw:
        del own["image"]
        pictures = raw["image"] if isinstance(raw["image"], list) else [raw["image"]]
        if not 1 <= len(pictures) <= 2:
            raise fail(
                f"image has {len(pictures)} pictures, expected one or two: the original and its "
                "reconstruction"
            )
        if len(pictures) == 2 and "image_recon" in raw:
            raise fail("image has a second picture and image_recon is there too: leave one out")
        own |= dict(zip(("image_orig", "image_recon"), pictures, strict=False))
    if recon_template is not None and "image_recon" not in own:
        own["image_recon"] = _filled(recon_template, raw, fail)
    return own


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
        return template.format_map(words)
    except KeyError as error:
        raise fail(
            f"data.recon_template={template!r} needs the field {error.args[0]}, which the record "
            f"does not have as text or a number; it has {', '.join(words) or 'none'}"
        ) from None
    except ValueError as error:
        raise fail(f"data.recon_template={template!r} does not fit its fields: {error}") from error
