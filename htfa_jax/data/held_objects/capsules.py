"""Tapered capsules: the union of the balls between two end balls, seen along -z.

The front surface has a closed form, so a shape of capsules needs no mesh: its image and a search
over thousands of its poses use the same formula.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from htfa_jax.data.held_objects.meshes import dot, unit
from htfa_jax.data.held_objects.render import FAR, Surface, inside_box

Part = tuple[np.ndarray, np.ndarray, float, float, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Capsules:
    """K capsules, maybe a batch: end points [..., K, 3], radii [K] at the ends, colours [K, 3]."""

    start: np.ndarray
    end: np.ndarray
    start_radius: np.ndarray
    end_radius: np.ndarray
    colors: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[Part]) -> "Capsules":
        """Capsules from (start [..., 3], end [..., 3], start radius, end radius, colour [3])."""
        start, end, start_radius, end_radius, colors = zip(*parts, strict=True)
        return cls(
            start=np.stack(start, axis=-2).astype(np.float32),
            end=np.stack(end, axis=-2).astype(np.float32),
            start_radius=np.array(start_radius, np.float32),
            end_radius=np.array(end_radius, np.float32),
            colors=np.array(colors, np.float32),
        )

    def member(self, number: int) -> "Capsules":
        """One of a batch."""
        return dataclasses.replace(self, start=self.start[number], end=self.end[number])

    def depth(self, points: np.ndarray) -> np.ndarray:
        """Depth of the front at points [N, 2] for every member of the batch: [..., N]."""
        nearest = np.float32(FAR)
        for k in range(len(self.colors)):
            start, end = self.start[..., k, None, :], self.end[..., k, None, :]
            front, _ = capsule_front(points, start, end, self.start_radius[k], self.end_radius[k])
            nearest = np.maximum(nearest, front)
        return nearest

    def hit(self, points: np.ndarray, blend: float, gloss: float) -> tuple[np.ndarray, Surface]:
        """What rays through points [N, 2] hit: their row numbers, and the surface there.

        Capsules nearer to each other in depth than `blend` melt into each other, as flesh does.
        """
        reach = np.maximum(self.start_radius, self.end_radius)[:, None]
        low = np.minimum(self.start, self.end)[:, :2] - reach
        high = np.maximum(self.start, self.end)[:, :2] + reach
        near = inside_box(points, low.min(0), high.max(0))
        points = np.asfortranarray(points[near])  # columns in one piece: this is the inner loop
        depth = np.full(len(points), FAR, np.float32)
        look = np.zeros((len(points), 6), np.float32)  # normal and colour
        for k, color in enumerate(self.colors):
            start, end = self.start[k], self.end[k]
            start_radius, end_radius = self.start_radius[k], self.end_radius[k]
            rows = inside_box(points, low[k], high[k])
            front, place = capsule_front(points[rows], start, end, start_radius, end_radius)
            hit = np.flatnonzero(front > FAR)
            rows, front, place = rows[hit], front[hit], place[hit, None]
            own = np.empty((len(rows), 6), np.float32)
            own[:, :2], own[:, 2], own[:, 3:] = points[rows], front, color
            own[:, :3] -= start + place * (end - start)
            own[:, :3] /= start_radius + place * (end_radius - start_radius)
            behind = depth[rows]
            share = np.clip(0.5 + (front - behind) * (0.5 / blend), 0, 1)
            depth[rows] = behind + share * (front - behind + blend * (1 - share))
            before = look[rows]
            look[rows] = before + share[:, None] * (own - before)
        rows = np.flatnonzero(depth > FAR)
        glosses = np.full(len(rows), gloss, np.float32)
        return near[rows], Surface(depth[rows], unit(look[rows, :3]), look[rows, 3:], glosses)


def capsule_front(
    points: np.ndarray, start: np.ndarray, end: np.ndarray, start_radius: float, end_radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Depth of a capsule's front at points [..., 2], FAR beside it, and the place along it, 0 to 1.

    The front is the highest z(t) + sqrt(r(t)^2 - distance(t)^2) of all its balls t; the radicand is
    the parabola a (t - peak)^2 + height, so that t follows from a zero derivative.
    """
    bone, taper = end - start, end_radius - start_radius
    flat, rise = bone[..., :2], bone[..., 2]
    away = points - start[..., :2]
    a = np.minimum(taper**2 - dot(flat, flat), -1e-7)
    peak = (start_radius * taper + dot(away, flat)) / -a
    height = start_radius**2 - dot(away, away) - a * peak**2
    lean = rise / np.sqrt(a * (a - rise**2))
    place = np.clip(peak + lean * np.sqrt(np.maximum(height, 0)), 0, 1)
    radicand = a * (place - peak) ** 2 + height
    depth = start[..., 2] + place * rise + np.sqrt(np.maximum(radicand, 0))
    return np.where(radicand > 0, depth, FAR), place
