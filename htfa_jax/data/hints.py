"""What is odd in a record though nothing stops a run: it may be meant otherwise.

Corners in place of width and height, masks of nothing, images of one colour, fields that nobody
reads: each is right in some dataset, and a mistake in most.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from htfa_jax.data.forms import meant_by, unread_fields
from htfa_jax.data.preprocess import BOXES, IMAGES, MASKS, REGIONS, Box
from htfa_jax.data.records import Record

# Of a box and of the box around a mask: less in common is another object, or other numbers.
LEAST_IN_COMMON = 0.3
CORNERS_IN_COMMON = 0.7
# Boxes may be rounded: by so many pixels of the model's square.
ROUNDED = 1.5


@dataclasses.dataclass
class Hints:
    """What is odd in some records.

    Attributes:
      shares: of each mask, which part of its image is true.
      leaving: how many boxes leave their image, by field.
      corners: how many boxes fit if they are read as corners (x, y, x, y), by field.
      disagreeing: how many `bbox_orig` are elsewhere than their object mask.
      constant: how many images have one colour, by field.
      unread: how many records have a field that nothing reads.
    """

    shares: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    leaving: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    corners: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    disagreeing: int = 0
    constant: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unread: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def look_at_fields(self, record: Record, recon_template: str | None) -> None:
        """Adds the fields of a record that nothing reads."""
        self.unread.update(unread_fields(record.raw, recon_template))

    def look_at_images(self, record: Record, sample: dict[str, Any]) -> None:
        """Adds a record's images, masks and boxes, as `load_images` gives them uncropped."""
        regions = {of: sample[region] for region, of in REGIONS.items()}
        around = None
        for field in MASKS:
            if getattr(record, field) is not None:
                mask = _part(sample[field], regions["image_orig"])
                self.shares.setdefault(field, []).append(float(mask.mean()))
                if field == "object_mask" and mask.any():
                    around = _around(mask, regions["image_orig"])
        for field in IMAGES:
            region = regions["image_recon" if field == "image_recon" else "image_orig"]
            if getattr(record, field) is not None:
                pixels = _part(sample[field], region).reshape(-1, 3)
                self.constant[field] += bool((pixels == pixels[0]).all())
        for field, of in BOXES.items():
            if (raw := getattr(record, field)) is not None and sample["has_" + field]:
                self._look_at_box(field, raw, sample[field], regions[of],
                                  around if of == "image_orig" else None)  # fmt: skip

    def _look_at_box(
        self, field: str, raw: Box, box: np.ndarray, region: np.ndarray, around: Box | None
    ) -> None:
        x, y, w, h = map(float, box)
        left, top, across, down = map(float, region)
        leaves = (
            x < left - ROUNDED
            or y < top - ROUNDED
            or x + w > left + across + ROUNDED
            or y + h > top + down + ROUNDED
        )
        self.leaving[field] += leaves
        as_corners = None
        if raw[2] > raw[0] and raw[3] > raw[1]:
            scale_x, scale_y = w / raw[2], h / raw[3]
            right, bottom = left + raw[2] * scale_x, top + raw[3] * scale_y
            if right <= left + across + ROUNDED and bottom <= top + down + ROUNDED:
                as_corners = (x, y, right - x, bottom - y)
        apart = around is not None and _in_common((x, y, w, h), around) < LEAST_IN_COMMON
        self.disagreeing += apart
        if as_corners is not None and around is not None:
            better = _in_common(as_corners, around)
            fits = better > CORNERS_IN_COMMON and better > _in_common((x, y, w, h), around) + 0.2
        else:
            fits = leaves and as_corners is not None
        self.corners[field] += bool(fits)

    def add(self, other: Hints) -> None:
        """Adds those of some more records."""
        for field, shares in other.shares.items():
            self.shares.setdefault(field, []).extend(shares)
        for name in ("leaving", "corners", "constant", "unread"):
            getattr(self, name).update(getattr(other, name))
        self.disagreeing += other.disagreeing

    def report(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "masks": {
                field: {
                    "count": len(shares),
                    "share": {
                        "least": min(shares),
                        "median": float(np.median(shares)),
                        "most": max(shares),
                    },
                    "empty": sum(share == 0 for share in shares),
                    "everything": sum(share == 1 for share in shares),
                }
                for field, shares in self.shares.items()
            },
            "boxes": {
                "leave_their_image": {k: n for k, n in self.leaving.items() if n},
                "look_like_corners": {k: n for k, n in self.corners.items() if n},
                "elsewhere_than_object_mask": self.disagreeing,
            },
            "images_of_one_colour": {k: n for k, n in self.constant.items() if n},
            "unread_fields": {
                name: {"count": count, "meant": meant_by(name)}
                for name, count in self.unread.most_common(50)
            },
        }


def hint_lines(report: dict[str, Any]) -> list[str]:
    """What is odd, in sentences; none if nothing is."""
    lines = []
    for name, facts in report["unread_fields"].items():
        meant = f"; did you mean {facts['meant']}?" if facts["meant"] else ""
        lines.append(f"field {name} is not read: {facts['count']} records{meant}")
    boxes = report["boxes"]
    for field, count in boxes["leave_their_image"].items():
        lines.append(f"{field} leaves its image: {count} records")
    for field, count in boxes["look_like_corners"].items():
        lines.append(
            f"{field} looks like corners (x, y, x, y): {count} records; it must be x, y, width, "
            "height"
        )
    if count := boxes["elsewhere_than_object_mask"]:
        lines.append(f"bbox_orig is elsewhere than object_mask: {count} records")
    for field, facts in report["masks"].items():
        if facts["empty"]:
            lines.append(f"{field} is true nowhere: {facts['empty']} records")
        if facts["everything"] and field == "object_mask":
            lines.append(f"{field} is true everywhere: {facts['everything']} records")
        if field == "object_mask" and facts["share"]["median"] > 0.6:
            lines.append(f"{field} covers most of its image: is it inverted?")
    for field, count in report["images_of_one_colour"].items():
        lines.append(f"{field} has one colour alone: {count} records")
    return lines


def _part(array: np.ndarray, region: np.ndarray) -> np.ndarray:
    x, y, w, h = (int(n) for n in region)
    return array[y : y + h, x : x + w]


def _around(mask: np.ndarray, region: np.ndarray) -> Box:
    """The box around a mask, in the square."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = float(region[0] + columns[0]), float(region[1] + rows[0])
    return x, y, float(columns[-1] - columns[0] + 1), float(rows[-1] - rows[0] + 1)


def _in_common(a: Box, b: Box) -> float:
    """The area that two boxes share, of the area that either has."""
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(across, 0.0) * max(down, 0.0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)
