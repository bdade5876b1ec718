"""Out-of-focus backgrounds."""

import numpy as np
from PIL import Image

CANVAS = 64  # drawn small: it is out of focus, and the same at every image size


def resize(image: np.ndarray, size: int, resample: Image.Resampling) -> np.ndarray:
    """A float image [H, W] or [H, W, C] at size x size."""
    if image.ndim == 2:
        flat = Image.fromarray(image.astype(np.float32))
        return np.asarray(flat.resize((size, size), resample))
    channels = [resize(channel, size, resample) for channel in np.moveaxis(image, -1, 0)]
    return np.stack(channels, axis=-1)


def smooth_noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Smooth noise [size, size] of unit variance at the corners of cells x cells."""
    coarse = rng.standard_normal((cells, cells), np.float32)
    return resize(coarse, size, Image.Resampling.BICUBIC)


def make_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A blurred room of greyish colours, [size, size, 3] in 0..1."""
    greys = rng.uniform(50, 215, (2, 1)) + rng.normal(0, 14, (2, 3))
    y, x = np.mgrid[0:CANVAS, 0:CANVAS] / (CANVAS - 1) - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    blend = 0.5 + 0.6 * (np.cos(angle) * x + np.sin(angle) * y)
    for cells, strength in ((3, 0.22), (6, 0.10), (14, 0.05)):
        blend = blend + strength * smooth_noise(rng, cells, CANVAS)
    canvas = greys[0] + np.clip(blend, 0, 1)[..., None] * (greys[1] - greys[0])
    for _ in range(rng.integers(0, 6)):
        # Furniture, windows: rectangles at any angle with soft edges.
        turn, (left, top) = rng.uniform(-0.4, 0.4), rng.uniform(-0.5, 0.5, 2)
        u = np.cos(turn) * (x - left) + np.sin(turn) * (y - top)
        v = np.cos(turn) * (y - top) - np.sin(turn) * (x - left)
        width, height = rng.uniform(0.08, 0.45, 2)
        edge = np.minimum(width - np.abs(u), height - np.abs(v))
        cover = np.clip(0.5 + edge * rng.uniform(10, 40), 0, 1) * rng.uniform(0.3, 0.9)
        shade = rng.uniform(40, 230) + rng.normal(0, 14, 3)
        canvas += cover[..., None] * (shade - canvas)
    canvas = resize(canvas / 255, size, Image.Resampling.BICUBIC)
    return np.clip(canvas, 0.05, 1).astype(np.float32)
