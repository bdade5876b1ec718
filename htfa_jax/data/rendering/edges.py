"""Where an image changes: pixels that one ray through their centre does not tell enough about."""

from __future__ import annotations

import numpy as np


def differs_from_neighbor(image: np.ndarray, threshold: float) -> np.ndarray:
    """Pixels [H, W] of an image [C, H, W] that differ from a pixel beside, above or below.

    Args:
      image: of any number of channels.
      threshold: by more than this, in any channel.
    """
    differs = np.zeros(image.shape[1:], bool)
    for channel in image:
        down = np.abs(channel[1:] - channel[:-1]) > threshold
        right = np.abs(channel[:, 1:] - channel[:, :-1]) > threshold
        differs[1:] |= down
        differs[:-1] |= down
        differs[:, 1:] |= right
        differs[:, :-1] |= right
    return differs
