"""Scenes: a hand holds an object, the same without the hand, and a reconstruction of the object."""

import dataclasses

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, shift

from htfa_jax.data.held_objects.background import make_background, resize
from htfa_jax.data.held_objects.hand import PROBE_SIZE, grip
from htfa_jax.data.held_objects.objects import CATEGORIES, COLORS, make_object, view_rotation
from htfa_jax.data.held_objects.reconstruction import FOREGROUND, make_reconstruction, place_mesh
from htfa_jax.data.held_objects.render import (
    FAR,
    Light,
    RayCaster,
    image_points,
    shade,
    supersample,
)

SPLITS = {"train": 0, "validation": 1, "test": 2}
RECIPE = 1  # raised with every change that alters scenes, so that a folder never mixes two recipes

PixelBox = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene; images uint8 [S, S, 3], masks bool [S, S], boxes (x, y, w, h) in pixels.

    `target` equals `original` outside `occluder_mask`. `object_mask` includes the occluded part;
    `occlusion` is the occlusion ratio of it, as rendered. `bbox_recon` frames what is visible of
    the object in the reconstruction, whose colour is "grey" or a name that is not `color`.
    """

    original: np.ndarray
    target: np.ndarray
    reconstruction: np.ndarray
    object_mask: np.ndarray
    occluder_mask: np.ndarray
    bbox_orig: PixelBox
    bbox_recon: PixelBox
    category: str
    color: str
    reconstruction_color: str
    occlusion: float
    drawn_occlusion: float


def random_streams(seed: int, split: str, index: int, num: int) -> list[np.random.Generator]:
    """`num` independent generators that depend on exactly these values."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    root = np.random.SeedSequence(seed, spawn_key=(SPLITS[split], index))
    return [np.random.Generator(np.random.Philox(child)) for child in root.spawn(num)]


def mask_box(mask: np.ndarray) -> PixelBox:
    """The smallest box (x, y, w, h) around the true pixels of a mask [H, W] that has some."""
    (columns,), (rows,) = np.nonzero(mask.any(0)), np.nonzero(mask.any(1))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1


def drop_shadow(alpha: np.ndarray, light: Light, strength: float) -> np.ndarray:
    """How much light [S, S] the object leaves on the wall behind it."""
    small = resize(alpha, 64, Image.Resampling.BOX)
    fallen = shift(small, (9 * light.direction[1], -9 * light.direction[0]), order=1)
    soft = gaussian_filter(fallen, 3.5)
    return 1 - strength * resize(soft, len(alpha), Image.Resampling.BICUBIC)


def draw_light(rng: np.random.Generator) -> Light:
    """A key light from above, left or right of the viewer, warm or cool."""
    direction = np.array([rng.uniform(-0.8, 0.8), rng.uniform(0.25, 0.9), 0.9])
    warmth = rng.uniform(-0.05, 0.05) * np.array([1, 0, -1])
    return Light(
        direction=(direction / np.linalg.norm(direction)).astype(np.float32),
        color=(rng.uniform(0.52, 0.7) + warmth).astype(np.float32),
        ambient=float(rng.uniform(0.52, 0.64)),
    )


def make_scene(seed: int, split: str, index: int, image_size: int) -> Scene:
    """Scene `index` of a split ("train", "validation" or "test"): always the same for these values.

    The composition does not depend on image_size (pixels of a side). Drawn occlusion ratios cover
    0.1 to 0.9 evenly in any run of scenes.
    """
    streams = random_streams(seed, split, index, 6)
    kind, view, holding, behind, recon, sensor = streams
    category = list(CATEGORIES)[kind.integers(len(CATEGORIES))]
    color = list(COLORS)[kind.integers(len(COLORS))]
    mesh = make_object(kind, category, color).turned(view_rotation(view, category))
    mesh = place_mesh(mesh, view.uniform(1.15, 1.55), view.uniform(-0.15, 0.15, 2))
    light = draw_light(view)
    caster = RayCaster(mesh)

    probe = np.full(PROBE_SIZE**2, FAR, np.float32)
    rows, surface = caster.hit(image_points(PROBE_SIZE))
    probe[rows] = surface.depth
    drawn = 0.1 + 0.8 * (0.618 * index % 1)
    hand, hand_scale = grip(holding, probe.reshape(PROBE_SIZE, PROBE_SIZE), drawn)

    def sample(points: np.ndarray) -> np.ndarray:
        """Object colour and cover, colour and cover with the hand, hand cover: 9 channels."""
        channels = np.zeros((9, len(points)), np.float32)
        depth = np.full(len(points), FAR, np.float32)
        rows, surface = caster.hit(points)
        channels[:3, rows] = shade(surface, points[rows], light).T
        channels[3, rows] = 1
        channels[4:8] = channels[:4]
        depth[rows] = surface.depth
        rows, surface = hand.hit(points, blend=0.05 * hand_scale, gloss=0.22)
        front = surface.depth > depth[rows]
        channels[4:7, rows[front]] = shade(surface, points[rows], light)[front].T
        channels[7:, rows[front]] = 1
        return channels

    channels = supersample(sample, image_size, grid=3 if image_size < 200 else 2)
    object_mask, occluder_mask = channels[3] >= 0.5, channels[8] > 0
    background = make_background(behind, image_size)
    background *= drop_shadow(channels[3], light, behind.uniform(0.1, 0.45))[..., None]
    noise = sensor.standard_normal((image_size, image_size, 3), np.float32) * (3 / 255)

    def develop(layer: np.ndarray) -> np.ndarray:
        layer = layer.transpose(1, 2, 0)
        image = layer[..., :3] + (1 - layer[..., 3:]) * background + noise
        return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)

    reconstruction, reconstruction_color = make_reconstruction(recon, mesh, color, image_size)
    return Scene(
        original=develop(channels[4:8]),
        target=develop(channels[:4]),
        reconstruction=reconstruction,
        object_mask=object_mask,
        occluder_mask=occluder_mask,
        bbox_orig=mask_box(object_mask),
        bbox_recon=mask_box(reconstruction.mean(-1) > FOREGROUND * 255),
        category=category,
        color=color,
        reconstruction_color=reconstruction_color,
        occlusion=float((object_mask & occluder_mask).sum() / object_mask.sum()),
        drawn_occlusion=drawn,
    )
