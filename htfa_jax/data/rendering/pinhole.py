"""Images of meshes through a pinhole camera: colour, depth and mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from htfa_jax.data.rendering.cameras import Camera, Pose
from htfa_jax.data.rendering.edges import differs_from_neighbor
from htfa_jax.data.rendering.meshes import TexturedMesh
from htfa_jax.data.rendering.ray_caster import Hits, Triangles

EVEN = 6.0  # levels of 255 by which neighbours may differ where one ray is enough


@dataclass(frozen=True)
class Rendering:
    """An image of a mesh.

    Attributes:
      rgb: uint8 [H, W, 3]; black where nothing is, mixed with black at the edge of the mesh.
      mask: bool [H, W], pixels whose centre the mesh covers.
      depth: float32 [H, W], metres along the camera's z; 0 where nothing is.
      coverage: float32 [H, W], the share of the pixel that the mesh covers.
    """

    rgb: np.ndarray
    mask: np.ndarray
    depth: np.ndarray
    coverage: np.ndarray

    def over(self, photograph: np.ndarray) -> np.ndarray:
        """The mesh before a photograph: uint8 [H, W, 3]."""
        behind = photograph * (1 - self.coverage[..., None])
        return np.rint(behind + self.rgb).clip(0, 255).astype(np.uint8)


class PinholeRenderer:
    """Draws one mesh from any side, with the colours of its texture and no light.

    A scan's texture holds the light of its room. Both sides of a triangle are seen.
    """

    def __init__(self, mesh: TexturedMesh):
        self.mesh = mesh
        # Rays meet vertices in float32: near the origin they are exact to a fraction of a hair.
        self._centre = (mesh.vertices.min(0) + mesh.vertices.max(0)) / 2
        self._triangles = Triangles(mesh.vertices - self._centre, mesh.faces)
        corners = mesh.corner_colors() if mesh.texture is None else mesh.uv[mesh.faces]
        self._corners = corners.astype(np.float32)

    def silhouette(self, camera: Camera, pose: Pose, points: np.ndarray) -> np.ndarray:
        """Which image points [N, 2] the mesh covers: bool [N]."""
        covered = np.zeros(len(points), bool)
        covered[self._hit(camera, pose, points).rows] = True
        return covered

    def render(self, camera: Camera, pose: Pose, supersample: int = 3) -> Rendering:
        """An image; at edges each pixel is the mean of supersample x supersample rays.

        Args:
          camera: of the image.
          pose: of the mesh, all of it or a part before the camera.
          supersample: 1 takes the ray through the pixel's centre alone.
        """
        left, top, right, bottom = self._window(camera, pose)
        width, height = right - left, bottom - top
        rgb = np.zeros((camera.height, camera.width, 3), np.uint8)
        mask = np.zeros(rgb.shape[:2], bool)
        depth, coverage = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.float32)
        if width > 0 and height > 0:
            part = camera.crop(left, top, width, height)
            x, y = np.meshgrid(np.arange(width), np.arange(height))
            hits, color = self._sample(part, pose, np.stack([x.ravel(), y.ravel()], axis=1))
            color = color.reshape(height, width, 4)
            window = slice(top, bottom), slice(left, right)
            mask[window] = color[..., 3] > 0
            depth[window][mask[window]] = hits.distance
            if supersample > 1:
                channels = np.ascontiguousarray(np.moveaxis(color, -1, 0))
                channels[3] *= 255  # an edge of the mesh always counts
                uneven = differs_from_neighbor(channels, EVEN)
                pixels = np.argwhere(uneven)[:, ::-1]
                color[uneven] = self._mean(part, pose, pixels, supersample)
            rgb[window], coverage[window] = np.rint(color[..., :3]), color[..., 3]
        return Rendering(rgb, mask, depth, coverage)

    def _window(self, camera: Camera, pose: Pose) -> tuple[int, int, int, int]:
        """Left, top, right and bottom border of the part of the image that can show the mesh."""
        points = pose(self.mesh.vertices)
        if points[:, 2].max() <= 0:
            return 0, 0, 0, 0
        if points[:, 2].min() <= 1e-6:  # a part is beside the camera: it may be seen anywhere
            return 0, 0, camera.width, camera.height
        places = camera.project(points)
        size = camera.width, camera.height
        # One pixel more on each side: the mesh may cover a part of it.
        left, top = np.clip(np.floor(places.min(0)) - 1, 0, size).astype(int)
        right, bottom = np.clip(np.ceil(places.max(0)) + 2, 0, size).astype(int)
        return int(left), int(top), int(right), int(bottom)

    def _hit(self, camera: Camera, pose: Pose, points: np.ndarray) -> Hits:
        directions = camera.rays(points) @ pose.rotation
        origin = pose.inverse().translation - self._centre
        origins = np.broadcast_to(origin, directions.shape)
        # A direction's z in the camera is 1, so that distances are depths.
        return self._triangles.hit(
            np.ascontiguousarray(origins, np.float32), np.ascontiguousarray(directions, np.float32)
        )

    def _mean(self, camera: Camera, pose: Pose, pixels: np.ndarray, grid: int) -> np.ndarray:
        """Colours and covered shares [N, 4] of pixels [N, 2], of grid x grid rays each."""
        offsets = (np.arange(grid) + 0.5) / grid - 0.5
        x, y = np.meshgrid(offsets, offsets)
        points = pixels[:, None] + np.stack([x.ravel(), y.ravel()], axis=1)[None]
        _, samples = self._sample(camera, pose, points.reshape(-1, 2))
        return samples.reshape(len(pixels), -1, 4).mean(1)

    def _sample(self, camera: Camera, pose: Pose, points: np.ndarray) -> tuple[Hits, np.ndarray]:
        """What is hit at points [N, 2]; colours from 0 to 255, and 1 where something is: [N, 4]."""
        hits = self._hit(camera, pose, points)
        colors = hits.blend(self._corners)
        if self.mesh.texture is not None:
            colors = bilinear(self.mesh.texture, colors)
        samples = np.zeros((len(points), 4), np.float32)
        samples[hits.rows, :3], samples[hits.rows, 3] = colors, 1
        return hits, samples


def bilinear(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Colours [N, 3] of a texture [H, W, 3] at coordinates [N, 2] with v upwards, repeated.

    The centres of texels lie half a texel inside, as in OpenGL and glTF.
    """
    height, width = texture.shape[:2]
    x, y = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5
    left, top = np.floor(x), np.floor(y)
    right_share, low_share = (x - left)[:, None], (y - top)[:, None]
    left, top = left.astype(np.int64), top.astype(np.int64)
    columns, rows = (left % width, (left + 1) % width), (top % height, (top + 1) % height)
    upper, lower = (
        texture[row, columns[0]] * (1 - right_share) + texture[row, columns[1]] * right_share
        for row in rows
    )
    return upper * (1 - low_share) + lower * low_share
