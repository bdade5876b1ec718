"""Cameras and poses, in OpenCV's convention; other conventions are converted here and nowhere else.

OpenCV's camera looks along z, with x to the right and y down. Lengths are metres. Integer
coordinates of an image are the centres of its pixels: (0, 0) is the centre of the top left one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

# How far a rotation matrix from a file may be from an orthonormal one.
TOLERANCE = 1e-3
# From OpenGL's axes (x right, y up, z backwards) and PyTorch3D's (x left, y up, z forwards).
OPENGL, PYTORCH3D = np.diag([1.0, -1.0, -1.0]), np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Attributes:
      intrinsics: K [3, 3], in pixels; its third row is 0, 0, 1.
      width, height: of the image, in pixels.

    Raises ValueError for intrinsics of no camera.
    """

    intrinsics: np.ndarray
    width: int
    height: int

    def __post_init__(self) -> None:
        matrix = _numbers(self.intrinsics, (3, 3), "intrinsics")
        object.__setattr__(self, "intrinsics", matrix)
        if matrix[0, 0] <= 0 or matrix[1, 1] <= 0 or abs(matrix[1, 0]) > 1e-9:
            raise ValueError(f"intrinsics={matrix.tolist()}: the focal lengths must be above 0")
        if not np.allclose(matrix[2], [0, 0, 1]):
            raise ValueError(f"intrinsics={matrix.tolist()}: the third row must be 0, 0, 1")
        if self.width < 1 or self.height < 1:
            raise ValueError(f"an image of {self.width} x {self.height} pixels has none")

    @classmethod
    def from_normalized(cls, intrinsics: np.ndarray, width: int, height: int) -> Camera:
        """A camera whose intrinsics go from 0 to 1 over the image, as MoGe and SAM 3D give them.

        There the centre of the first pixel is at 0.5 / width.
        """
        scale = np.diag([width, height, 1.0])
        shift = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
        return cls(shift @ scale @ _numbers(intrinsics, (3, 3), "intrinsics"), width, height)

    @classmethod
    def from_field_of_view(cls, degrees: float, width: int, height: int) -> Camera:
        """A camera with square pixels that looks at the middle.

        Args:
          degrees: between the borders of the longer side, above 0 and below 180.
          width, height: of the image.
        """
        if not 0 < degrees < 180:
            raise ValueError(f"a field of view of {degrees} degrees: it must be above 0, below 180")
        focal = max(width, height) / 2 / np.tan(np.radians(degrees) / 2)
        centre = (width - 1) / 2, (height - 1) / 2
        return cls(np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]]),
                   width, height)  # fmt: skip

    def rays(self, points: np.ndarray) -> np.ndarray:
        """Directions [N, 3] from the camera through image points [N, 2]; their z is 1."""
        (fx, skew, cx), (_, fy, cy) = self.intrinsics[0], self.intrinsics[1]
        y = (points[:, 1] - cy) / fy
        x = (points[:, 0] - cx - skew * y) / fx
        return np.stack([x, y, np.ones(len(points))], axis=1)

    def project(self, points: np.ndarray) -> np.ndarray:
        """Where points [N, 3] before the camera (z above 0) are in the image [N, 2]."""
        return (points @ self.intrinsics.T)[:, :2] / points[:, 2:]

    def crop(self, x: int, y: int, width: int, height: int) -> Camera:
        """The camera of a part of the image, which may stick out of it."""
        shift = np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1.0]])
        return Camera(shift @ self.intrinsics, width, height)

    def resized(self, width: int, height: int) -> Camera:
        """The camera of the image in another size."""
        scale = np.diag([width / self.width, height / self.height, 1])
        # Resizing keeps the borders, which lie half a pixel beside the outermost centres.
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        return Camera(np.linalg.inv(half) @ scale @ half @ self.intrinsics, width, height)


@dataclass(frozen=True)
class Pose:
    """Where an object is: x_camera = rotation @ x_object + translation.

    Attributes:
      rotation: [3, 3].
      translation: [3], metres.

    Raises ValueError for a matrix that is no rotation, and numbers that are not finite.
    """

    rotation: np.ndarray
    translation: np.ndarray

    def __post_init__(self) -> None:
        rotation = _numbers(self.rotation, (3, 3), "rotation")
        off = np.abs(rotation @ rotation.T - np.eye(3)).max()
        if off > TOLERANCE:
            raise ValueError(
                f"rotation={rotation.tolist()} is no rotation: its rows are not orthonormal, by "
                f"{off:.2g}. Is a scale in it?"
            )
        if np.linalg.det(rotation) < 0:
            raise ValueError(f"rotation={rotation.tolist()} is a mirror: its determinant is -1")
        object.__setattr__(self, "rotation", rotation)
        object.__setattr__(
            self, "translation", _numbers(np.ravel(self.translation), (3,), "translation")
        )

    @property
    def matrix(self) -> np.ndarray:
        """[4, 4]."""
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = self.rotation, self.translation
        return matrix

    def inverse(self) -> Pose:
        """From the camera to the object."""
        return Pose(self.rotation.T, -self.rotation.T @ self.translation)

    def __matmul__(self, first: Pose) -> Pose:
        """The pose that does `first` and then this one."""
        return Pose(self.rotation @ first.rotation, self(first.translation[None])[0])

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Points [N, 3] of the object in the camera's frame."""
        return points @ self.rotation.T + self.translation


def from_opengl(pose: Pose) -> Pose:
    """A pose in OpenGL's camera (x right, y up, looking along -z), as HO-3D's."""
    return Pose(OPENGL @ pose.rotation, OPENGL @ pose.translation)


def from_pytorch3d(rotation: np.ndarray, translation: np.ndarray) -> Pose:
    """A pose of PyTorch3D: x_camera = x_object @ rotation + translation, x left, y up.

    Args:
      rotation: [3, 3], for row vectors.
      translation: [3], metres.
    """
    rotation = _numbers(rotation, (3, 3), "rotation")
    return Pose(PYTORCH3D @ rotation.T, PYTORCH3D @ np.ravel(translation))


def metres(millimetres: np.ndarray) -> np.ndarray:
    """Lengths in metres."""
    return np.asarray(millimetres, np.float64) / 1000


def rotation_from_axis_angle(vector: np.ndarray) -> np.ndarray:
    """The rotation [3, 3] about a vector [3] by its length, in radians (Rodrigues)."""
    return Rotation.from_rotvec(_numbers(np.ravel(vector), (3,), "axis-angle")).as_matrix()


def rotation_from_wxyz(quaternion: np.ndarray) -> np.ndarray:
    """The rotation [3, 3] of a quaternion with its real part first. Raises ValueError for zeros."""
    w, x, y, z = _numbers(np.ravel(quaternion), (4,), "quaternion")
    return rotation_from_xyzw(np.array([x, y, z, w]))


def rotation_from_xyzw(quaternion: np.ndarray) -> np.ndarray:
    """The rotation [3, 3] of a quaternion with its real part last. Raises ValueError for zeros."""
    quaternion = _numbers(np.ravel(quaternion), (4,), "quaternion")
    if np.linalg.norm(quaternion) < 1e-9:
        raise ValueError("a quaternion of zeros is no rotation")
    return Rotation.from_quat(quaternion).as_matrix()


def z_up_from_y_up(points: np.ndarray) -> np.ndarray:
    """Points [N, 3] of a model whose y axis is up (glTF), in a frame whose z axis is up."""
    return np.stack([points[:, 0], -points[:, 2], points[:, 1]], axis=1)


def _numbers(value: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    array = np.asarray(value, np.float64)
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}, it has {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}={array.tolist()} must be finite numbers")
    return array
