"""Augmentation of training samples: one random change for all images, masks and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from htfa_jax.config import AugmentConfig
from htfa_jax.data.preprocess import BOXES, IMAGES, MASKS, REGIONS, Box


@dataclass(frozen=True)
class Change:
    """What is done to one sample.

    Original, reconstruction and target change in the same way. The target must, because it is
    what the original is completed to. The reconstruction does too, because it is the target of a
    record that has no other, and because Level 1 blends it with the original pixel by pixel.
    Every change of colour leaves black black: that is what padding and the background of a
    reconstruction are.

    Attributes:
      side: part of each side that is seen, at least; more where the object needs it.
      corner: where the seen part lies among the places that keep the object, x and y in [0, 1].
      flip: left and right change places.
      brightness: factor of all values.
      gamma: exponent of values in [0, 1]; above 1 the middle is darker.
      saturation: factor of the distance from grey.
    """

    side: float = 1.0
    corner: tuple[float, float] = (0.0, 0.0)
    flip: bool = False
    brightness: float = 1.0
    gamma: float = 1.0
    saturation: float = 1.0

    def window(self, objects: Sequence[Box]) -> Box:
        """The part of every image that is seen, (x, y, w, h) in parts of its sides.

        Args:
          objects: boxes that must be seen whole, in the same unit.
        """
        spans = []
        for axis in (0, 1):
            starts = [min(max(box[axis], 0.0), 1.0) for box in objects]
            ends = [min(max(box[axis] + box[axis + 2], 0.0), 1.0) for box in objects]
            spans.append((min(starts, default=0.5), max(ends, default=0.5)))
        # Both sides in the same part, so that the image keeps its shape and its place.
        side = max(self.side, *(end - start for start, end in spans))
        first = []
        for (start, end), part in zip(spans, self.corner, strict=True):
            lowest, highest = max(0.0, end - side), min(start, 1.0 - side)
            first.append(lowest + part * (highest - lowest))
        return first[0], first[1], side, side

    def applied(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A sample of `load_images`, cropped already, flipped and in other colours."""
        changed = dict(sample)
        for name in IMAGES:
            changed[name] = self._colored(sample[name])
        if self.flip:
            for name in (*IMAGES, *MASKS):
                changed[name] = np.ascontiguousarray(changed[name][:, ::-1])
            for name in (*REGIONS, *BOXES):
                x, y, w, h = sample[name]
                if w:  # what a record does not have is zero
                    width = sample["image_orig"].shape[1]
                    changed[name] = np.array([width - x - w, y, w, h], np.float32)
        return changed

    def _colored(self, image: np.ndarray) -> np.ndarray:
        if (self.brightness, self.gamma, self.saturation) == (1, 1, 1):
            return image
        changed = Image.fromarray(image)
        if self.saturation != 1:
            changed = ImageEnhance.Color(changed).enhance(self.saturation)
        values = 255 * self.brightness * (np.arange(256) / 255) ** self.gamma
        table = np.clip(np.round(values), 0, 255).astype(int).tolist()
        return np.asarray(changed.point(3 * table))


def draw(config: AugmentConfig, rng: np.random.Generator) -> Change | None:
    """A random change, None if the configuration asks for none."""
    if config == AugmentConfig():
        return None

    def around_one(strength: float) -> float:
        return 1 + strength * rng.uniform(-1, 1)

    return Change(
        side=1 - config.crop * rng.random(),
        corner=(rng.random(), rng.random()),
        flip=bool(rng.random() < config.flip),
        brightness=around_one(config.brightness),
        gamma=around_one(config.gamma),
        saturation=around_one(config.saturation),
    )
