"""First hits of rays on triangles: the one place that knows the ray tracer (Embree)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Hits:
    """What N of some rays hit first.

    Attributes:
      rows: which rays [N].
      faces: the triangles [N].
      weights: of their corners at the point that was hit [N, 3].
      distance: to that point, in lengths of the ray's direction [N].
    """

    rows: np.ndarray
    faces: np.ndarray
    weights: np.ndarray
    distance: np.ndarray

    def blend(self, corners: np.ndarray) -> np.ndarray:
        """Values [N, C] at the points, of values [F, 3, C] at the corners of all triangles."""
        of_hits, weights = corners[self.faces], self.weights[..., None]
        return sum(of_hits[:, corner] * weights[:, corner] for corner in range(3))


class Triangles:
    """Triangles that rays can be sent at.

    Args:
      vertices: [V, 3]; they are traced in float32.
      faces: [F, 3], rows of `vertices`.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray):
        # Only rendering needs the ray tracer, so that reading a finished dataset does not load it.
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene

        self._scene = EmbreeScene()
        self._geometry = TriangleMesh(
            self._scene, vertices.astype(np.float32), faces.astype(np.int32)
        )

    def hit(self, origins: np.ndarray, directions: np.ndarray) -> Hits:
        """The first hits of rays, given as float32 [N, 3] each."""
        result = self._scene.run(origins, directions, output=1)
        rows = np.flatnonzero(result["primID"] >= 0)
        u, v = result["u"][rows], result["v"][rows]
        weights = np.stack([1 - u - v, u, v], axis=1)
        return Hits(rows, result["primID"][rows], weights, result["tfar"][rows])
