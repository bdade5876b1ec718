"""Images of meshes: orthographic rays along -z, shading, and supersampling where it shows.

The image covers x and y from -1 to 1, y up; the viewer looks along -z.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from htfa_jax.data.held_objects.meshes import Mesh, dot, unit
from htfa_jax.data.rendering.edges import differs_from_neighbor
from htfa_jax.data.rendering.ray_caster import Triangles

FAR = -9.0  # depth of "nothing there"; real depths are within -2..2
EYE = 4.0  # rays start here, close enough that float32 distances keep six digits


@dataclasses.dataclass(frozen=True)
class Surface:
    """What N rays hit: z [N], unit normals to the viewer [N, 3], colours [N, 3], gloss [N]."""

    depth: np.ndarray
    normals: np.ndarray
    colors: np.ndarray
    gloss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Light:
    """A key light from `direction` (towards the light, [3], unit), its colour [3], and the rest."""

    direction: np.ndarray
    color: np.ndarray
    ambient: float


def inside_box(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Row numbers of the points [N, 2] between two corners [2]."""
    x, y = np.ascontiguousarray(points.T)
    return np.flatnonzero((x > low[0]) & (x < high[0]) & (y > low[1]) & (y < high[1]))


class RayCaster:
    """First hits of parallel rays on one mesh."""

    def __init__(self, mesh: Mesh):
        vertices = mesh.vertices.astype(np.float32)
        self._triangles = Triangles(vertices, mesh.faces)
        self._low, self._high = vertices[:, :2].min(0), vertices[:, :2].max(0)
        corners = mesh.vertices[mesh.faces]
        edge, other = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
        # Open parts (a bowl's inside, a label) show their back: normals turn to the viewer.
        facing = np.where(edge[:, 0] * other[:, 1] < edge[:, 1] * other[:, 0], -1.0, 1.0)
        self._normals = (mesh.normals * facing[:, None, None]).astype(np.float32)
        self._colors = mesh.colors.astype(np.float32)
        self._gloss = mesh.gloss.astype(np.float32)

    def hit(self, points: np.ndarray) -> tuple[np.ndarray, Surface]:
        """What rays through points [N, 2] hit: their row numbers, and the surface there."""
        rows = inside_box(points, self._low, self._high)
        origins = np.full((len(rows), 3), EYE, np.float32)
        origins[:, :2] = points[rows]
        directions = np.zeros_like(origins)
        directions[:, 2] = -1
        hits = self._triangles.hit(origins, directions)
        face = hits.faces
        surface = Surface(
            EYE - hits.distance,
            unit(hits.blend(self._normals)),
            self._colors[face],
            self._gloss[face],
        )
        return rows[hits.rows], surface


def shade(surface: Surface, points: np.ndarray, light: Light) -> np.ndarray:
    """Colours [N, 3] in 0..1 of surface points seen at image points [N, 2]."""
    normal = surface.normals
    # A slightly perspective viewer gives flat glossy faces a gradient.
    view = unit(np.concatenate([-0.3 * points, np.ones((len(points), 1), points.dtype)], axis=1))
    mirrored = 2 * dot(normal, view)[:, None] * normal - view
    diffuse = np.maximum(normal @ light.direction, 0)[:, None]
    sky = 0.85 + 0.15 * normal[:, 1:2]
    color = surface.colors * (light.ambient * sky + diffuse * light.color)
    gloss = surface.gloss[:, None]
    room = np.clip(0.55 + 0.7 * mirrored[:, 1:2] + 0.25 * mirrored[:, :1], 0.1, 1.15)
    color += (surface.colors * room - color) * 0.6 * gloss**3
    glint = np.maximum(mirrored @ light.direction, 0)[:, None] ** (6 + 60 * gloss)
    return np.clip(color + 0.55 * gloss * glint * light.color, 0, 1)


def image_points(size: int) -> np.ndarray:
    """Centres of the pixels of a size x size image, row by row: [size * size, 2]."""
    centre = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(centre, -centre)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def supersample(
    sample: Callable[[np.ndarray], np.ndarray], size: int, grid: int = 3, threshold: float = 0.05
) -> np.ndarray:
    """The image [C, size, size] of a function from points [N, 2] to channels [C, N].

    Pixels that differ from a neighbour by more than the threshold in any channel become the mean
    of grid x grid samples; the others keep the sample at their centre.
    """
    points = image_points(size)
    channels = sample(points)
    image = channels.reshape(-1, size, size)
    pixels = np.flatnonzero(differs_from_neighbor(image, threshold))
    around = image_points(grid)[:, None] / size + points[pixels]
    samples = sample(around.reshape(-1, 2)).reshape(len(channels), grid * grid, len(pixels))
    channels[:, pixels] = samples.mean(1)
    return image
