"""Triangle meshes with a colour and a gloss for every face, and the few shapes objects consist of.

Parts are joined by concatenation, never by a boolean union: the first hit of a ray is all that a
renderer needs, so parts may overlap and need not be closed.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

CREASE_COSINE = np.cos(np.radians(40))  # edges sharper than this stay sharp, others are smoothed


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scalar products over a short last axis; several times faster than a sum over it."""
    total = a[..., 0] * b[..., 0]
    for axis in range(1, a.shape[-1]):
        total += a[..., axis] * b[..., axis]
    return total


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., 3] at length one; zero stays zero."""
    return vectors / np.maximum(np.sqrt(dot(vectors, vectors)), 1e-12)[..., None]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Triangles: y up, z towards the viewer, no fixed unit.

    vertices [V, 3], faces [F, 3] (vertex numbers), normals [F, 3, 3] (one per corner, outwards by
    the right-hand rule of the face), colors [F, 3] in 0..1, gloss [F] from 0 (matt) to 1 (metal).
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    colors: np.ndarray
    gloss: np.ndarray

    def moved(self, x: float = 0, y: float = 0, z: float = 0) -> "Mesh":
        """The mesh shifted by (x, y, z)."""
        return dataclasses.replace(self, vertices=self.vertices + np.array([x, y, z]))

    def turned(self, rotation: np.ndarray) -> "Mesh":
        """The mesh turned by a rotation matrix [3, 3] about the origin."""
        return dataclasses.replace(
            self, vertices=self.vertices @ rotation.T, normals=self.normals @ rotation.T
        )

    def stretched(self, x: float = 1, y: float = 1, z: float = 1) -> "Mesh":
        """The mesh stretched along the axes about the origin; factors above zero."""
        factors = np.array([x, y, z])
        return dataclasses.replace(
            self, vertices=self.vertices * factors, normals=unit(self.normals / factors)
        )


def join(parts: Iterable[Mesh]) -> Mesh:
    """One mesh of all parts."""
    parts = list(parts)
    starts = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    return Mesh(
        vertices=np.concatenate([part.vertices for part in parts]),
        faces=np.concatenate(
            [part.faces + start for part, start in zip(parts, starts, strict=True)]
        ),
        normals=np.concatenate([part.normals for part in parts]),
        colors=np.concatenate([part.colors for part in parts]),
        gloss=np.concatenate([part.gloss for part in parts]),
    )


def loft(rings: np.ndarray, color: Sequence[float], gloss: float = 0.2) -> Mesh:
    """The surface through successive closed rings of points [K, S, 3], smooth but for creases.

    A ring may shrink to a point. The outside is on the right-hand side when the points of a ring
    run counter-clockwise as seen from the last ring.
    """
    following = np.roll(rings, -1, axis=1)
    cell = unit(np.cross(following[1:] - rings[:-1], rings[1:] - following[:-1]))
    corners = {}
    for row in (0, 1):
        near = slice(1, None) if row else slice(None, -1)
        above = np.concatenate([cell[near], cell[-1:]] if row else [cell[:1], cell[near]])
        for column in (0, 1):
            shift = -1 if column else 1
            total = cell.copy()
            for other in (above, np.roll(cell, shift, axis=1), np.roll(above, shift, axis=1)):
                total += other * (dot(cell, other) > CREASE_COSINE)[..., None]
            corners[row, column] = unit(total).reshape(-1, 3)
    num_rings, num_points = rings.shape[:2]
    number = np.arange(num_rings * num_points).reshape(num_rings, num_points)
    beside = np.roll(number, -1, axis=1)
    a, b, c, d = (part.ravel() for part in (number[:-1], beside[:-1], beside[1:], number[1:]))
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    lower, upper = [(0, 0), (0, 1), (1, 1)], [(0, 0), (1, 1), (1, 0)]
    normals = np.concatenate(
        [np.stack([corners[corner] for corner in half], 1) for half in (lower, upper)]
    )
    return Mesh(
        vertices=rings.reshape(-1, 3),
        faces=faces,
        normals=normals,
        colors=np.tile(np.asarray(color, float), (len(faces), 1)),
        gloss=np.full(len(faces), float(gloss)),
    )


def revolve(
    profile: Sequence[Sequence[float]],
    color: Sequence[float],
    gloss: float = 0.2,
    sections: int = 48,
    arc: tuple[float, float] | None = None,
) -> Mesh:
    """A profile [(radius, y), ...] turned about the y axis; upwards profiles face outwards.

    `arc` = (from, to) in radians keeps only that part of the turn (0 is +z), as for a label.
    """
    profile = np.asarray(profile, float)
    if arc is None:
        angles = np.arange(sections) * 2 * np.pi / sections
    else:
        # There and back again: a loft's rings are closed, so an open patch gets a coinciding back.
        angles = np.linspace(*arc, max(4, round(sections * (arc[1] - arc[0]) / (2 * np.pi))))
        angles = np.concatenate([angles, angles[::-1]])
    rings = np.stack(
        [
            profile[:, :1] * np.sin(angles),
            np.broadcast_to(profile[:, 1:], (len(profile), len(angles))),
            profile[:, :1] * np.cos(angles),
        ],
        axis=-1,
    )
    return loft(rings, color, gloss)


def rounded_rectangle(width: float, height: float, radius: float) -> np.ndarray:
    """Counter-clockwise outline [S, 2] of a rectangle with round corners, about the origin."""
    radius = min(radius, 0.499 * width, 0.499 * height)
    turn = np.linspace(0, np.pi / 2, 6)
    quarters = []
    for quarter, (x, y) in enumerate([(1, 1), (-1, 1), (-1, -1), (1, -1)]):
        angle = turn + quarter * np.pi / 2
        centre = np.array([x * (width / 2 - radius), y * (height / 2 - radius)])
        quarters.append(centre + radius * np.stack([np.cos(angle), np.sin(angle)], 1))
    return np.concatenate(quarters)


def prism(
    outline: np.ndarray, depth: float, bevel: float, color: Sequence[float], gloss: float = 0.2
) -> Mesh:
    """An outline [S, 2] (convex, counter-clockwise) made `depth` thick, z from -depth/2 to depth/2.

    Front and back edges are rounded by `bevel`, at most half of the depth.
    """
    bevel = min(bevel, 0.5 * depth)
    centre = outline.mean(0)
    half_extent = np.ptp(outline, axis=0) / 2
    turn = np.linspace(0, np.pi / 2, 4)
    inset, height = bevel * (1 - np.cos(turn)), depth / 2 - bevel * (1 - np.sin(turn))
    # The flat faces get a ring of their own, or smoothing would bend them up to their middle.
    inset = np.concatenate([inset, [1.6 * bevel, half_extent.max()]])
    height = np.concatenate([height, [depth / 2, depth / 2]])
    shrink = np.maximum(1 - inset[:, None, None] / half_extent, 0)
    front = np.empty((len(inset), len(outline), 3))
    front[..., :2] = centre + (outline - centre) * shrink
    front[..., 2] = height[:, None]
    back = front[::-1] * np.array([1, 1, -1])
    return loft(np.concatenate([back, front]), color, gloss)


def slab(
    width: float,
    height: float,
    depth: float,
    radius: float,
    bevel: float,
    color: Sequence[float],
    gloss: float = 0.2,
) -> Mesh:
    """A rounded box about the origin."""
    return prism(rounded_rectangle(width, height, radius), depth, bevel, color, gloss)


def knob(
    profile: Sequence[Sequence[float]],
    color: Sequence[float],
    gloss: float = 0.2,
    sections: int = 24,
) -> Mesh:
    """A profile [(radius, z), ...] turned about the z axis, for lenses and round buttons."""
    y_to_z = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    return revolve(profile, color, gloss, sections).turned(y_to_z)


def rotation(axis: Sequence[float], angle: float) -> np.ndarray:
    """Rotation matrix [3, 3] by `angle` radians about `axis` (any length)."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * skew @ skew
