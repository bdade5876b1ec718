"""Cameras, poses and conversions against formulas written out."""

import numpy as np
import pytest

from htfa_jax.data.rendering import cameras
from htfa_jax.data.rendering.cameras import Camera, Pose

K = np.array([[500.0, 0, 320], [0, 400, 200], [0, 0, 1]])
TURN = cameras.rotation_from_axis_angle(np.array([0.3, -0.5, 0.9]))


def test_a_point_is_where_the_formula_says():
    camera = Camera(K, 640, 480)
    points = np.array([[0.1, -0.2, 2.0], [0, 0, 1]])
    expected = [[500 * 0.05 + 320, 400 * -0.1 + 200], [320, 200]]
    np.testing.assert_allclose(camera.project(points), expected)
    rays = camera.rays(np.array(expected))
    np.testing.assert_allclose(rays * points[:, 2:], points, atol=1e-12)


def test_a_crop_and_another_size_show_the_same():
    camera, points = Camera(K, 640, 480), np.array([[0.1, -0.2, 2.0], [-0.3, 0.1, 1.5]])
    seen = camera.project(points)
    np.testing.assert_allclose(camera.crop(30, -5, 100, 100).project(points), seen - [30, -5])
    # Borders stay: half a pixel left of the first centre is still half a pixel left of it.
    half = camera.resized(320, 240).project(points)
    np.testing.assert_allclose(half, (seen + 0.5) / 2 - 0.5)


def test_normalized_intrinsics():
    camera = Camera.from_normalized(np.array([[1.5, 0, 0.5], [0, 2, 0.25], [0, 0, 1]]), 200, 100)
    np.testing.assert_allclose(camera.intrinsics, [[300, 0, 99.5], [0, 200, 24.5], [0, 0, 1]])


def test_a_field_of_view_is_between_the_borders():
    camera = Camera.from_field_of_view(60, 400, 300)
    edges = camera.rays(np.array([[-0.5, 149.5], [399.5, 149.5]]))
    np.testing.assert_allclose(edges[:, 0], [-np.tan(np.pi / 6), np.tan(np.pi / 6)])


def test_a_turn_about_an_axis():
    quarter = cameras.rotation_from_axis_angle(np.array([0, 0, np.pi / 2]))
    np.testing.assert_allclose(quarter, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-12)
    axis, angle = np.array([1, 2, -2]) / 3, 0.7
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    expected = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    np.testing.assert_allclose(cameras.rotation_from_axis_angle(axis * angle), expected)
    w, xyz = np.cos(angle / 2), axis * np.sin(angle / 2)
    np.testing.assert_allclose(cameras.rotation_from_wxyz(np.array([w, *xyz])), expected)
    np.testing.assert_allclose(cameras.rotation_from_xyzw(np.array([*xyz, w])), expected)


def test_opengl_looks_along_minus_z():
    # 2 m before an OpenGL camera and 1 m above it is, for OpenCV, z = 2 and y = -1.
    pose = cameras.from_opengl(Pose(TURN, np.array([0.5, 1, -2])))
    np.testing.assert_allclose(pose.translation, [0.5, -1, 2])
    point = np.array([0.1, 0.2, 0.3])
    x, y, z = TURN @ point + [0.5, 1, -2]
    np.testing.assert_allclose(pose(point[None])[0], [x, -y, -z])


def test_pytorch3d_has_row_vectors_and_x_to_the_left():
    point, shift = np.array([0.1, 0.2, 0.3]), np.array([0.5, 1, 2])
    x, y, z = point @ TURN + shift
    pose = cameras.from_pytorch3d(TURN, shift)
    np.testing.assert_allclose(pose(point[None])[0], [-x, -y, z])


def test_gltf_s_up_is_y():
    np.testing.assert_allclose(cameras.z_up_from_y_up(np.array([[1.0, 2, 3]])), [[1, -3, 2]])
    assert cameras.metres([250.0])[0] == 0.25


def test_poses_are_chained_and_undone():
    first, second = Pose(TURN, np.array([1.0, 2, 3])), Pose(TURN.T @ TURN.T, np.array([0.1, 0, 5]))
    points = np.random.default_rng(0).standard_normal((5, 3))
    np.testing.assert_allclose((second @ first)(points), second(first(points)))
    np.testing.assert_allclose(first.inverse()(first(points)), points)
    np.testing.assert_allclose(first.matrix @ [*points[0], 1], [*first(points)[0], 1])


@pytest.mark.parametrize(
    "rotation,said",
    [
        (2 * np.eye(3), "no rotation: its rows are not orthonormal.*Is a scale in it"),
        (np.diag([1, 1, -1]), "is a mirror"),
        (np.full((3, 3), np.nan), "must be finite"),
        (np.eye(4), r"must have the shape \[3, 3\], it has \[4, 4\]"),
    ],
)
def test_what_is_no_rotation_is_said(rotation, said):
    with pytest.raises(ValueError, match=said):
        Pose(rotation, np.zeros(3))


@pytest.mark.parametrize(
    "make,said",
    [
        (lambda: Camera(np.zeros((3, 3)), 4, 4), "focal lengths must be above 0"),
        (lambda: Camera(K.T, 4, 4), "third row"),
        (lambda: Camera(K, 0, 4), "0 x 4 pixels has none"),
        (lambda: Camera.from_field_of_view(180, 4, 4), "180 degrees"),
        (lambda: cameras.rotation_from_wxyz(np.zeros(4)), "zeros is no rotation"),
    ],
)
def test_what_is_no_camera_is_said(make, said):
    with pytest.raises(ValueError, match=said):
        make()
