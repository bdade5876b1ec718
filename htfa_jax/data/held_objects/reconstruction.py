"""What a single-view 3D reconstruction of the object gives: its shape, degraded, on black."""

import dataclasses

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from htfa_jax.data.held_objects.background import resize, smooth_noise
from htfa_jax.data.held_objects.meshes import Mesh, rotation
from htfa_jax.data.held_objects.objects import COLORS, body_color
from htfa_jax.data.held_objects.render import Light, RayCaster, image_points, shade

CANVAS = 128  # the blur leaves nothing finer, whatever the image's size
FOREGROUND = 0.05  # mean RGB (0..1) above which a pixel of the reconstruction is the object


def place_mesh(mesh: Mesh, longest: float, centre: np.ndarray) -> Mesh:
    """The mesh scaled so that its longer side in the image is `longest`, centred there."""
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    middle, scale = (low + high) / 2, longest / (high - low)[:2].max()
    return mesh.moved(*-middle).stretched(scale, scale, scale).moved(*centre)


def make_reconstruction(
    rng: np.random.Generator, mesh: Mesh, true_color: str, size: int
) -> tuple[np.ndarray, str]:
    """An image uint8 [size, size, 3] of the turned, stretched, damaged object, and its colour.

    The colour is "grey" or the name of a colour that is not the true one.
    """
    turned = mesh.turned(rotation(rng.normal(size=3), np.radians(rng.uniform(-12, 12))))
    turned = turned.stretched(*rng.uniform(0.85, 1.2, 2))
    longest = rng.uniform(0.8, 1.7)
    reach = min(0.2, 0.95 - longest / 2)
    turned = place_mesh(turned, longest, rng.uniform(-reach, reach, 2))

    others = [name for name in COLORS if name != true_color]
    name = others[rng.integers(len(others))] if rng.uniform() < 0.5 else "grey"
    base = np.full(3, rng.uniform(0.35, 0.8)) if name == "grey" else body_color(rng, name)
    brightness = turned.colors.mean(1, keepdims=True)
    contrast = rng.uniform(0, 0.4) * (brightness - np.median(brightness))
    colors = np.clip(np.maximum(base, 0.2) * (1 + contrast), 0, 1)
    turned = dataclasses.replace(turned, colors=colors, gloss=np.full(len(colors), 0.1))

    light = Light(np.array([0.0, 0.25, 0.97], np.float32), np.full(3, 0.58, np.float32), 0.42)
    points = image_points(CANVAS)
    rows, surface = RayCaster(turned).hit(points)
    image = np.zeros((CANVAS * CANVAS, 3), np.float32)
    lumps = 1 + 0.12 * smooth_noise(rng, 12, CANVAS).ravel()[rows, None]
    image[rows] = shade(surface, points[rows], light) * lumps
    # A removed share, not a threshold on the noise: a threshold may take the whole object.
    noise = smooth_noise(rng, int(rng.integers(7, 14)), CANVAS).ravel()[rows]
    image[rows[noise > np.quantile(noise, 1 - rng.uniform(0, 0.3))]] = 0

    blur = rng.uniform(0.8, 2.4) * CANVAS / 112
    image = gaussian_filter(image.reshape(CANVAS, CANVAS, 3), (blur, blur, 0), truncate=3)
    image = resize(image, size, Image.Resampling.BICUBIC)
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8), name
