"""The pinhole renderer against closed forms. Drawn meshes: `real_sets/test_drawn_meshes.py`."""

import numpy as np
import pytest

from htfa_jax.data.rendering.cameras import Camera, Pose, rotation_from_axis_angle
from htfa_jax.data.rendering.meshes import TexturedMesh, read_mesh
from htfa_jax.data.rendering.pinhole import PinholeRenderer, bilinear
from htfa_jax.errors import DataError

CAMERA = Camera(np.array([[300.0, 0, 79.5], [0, 300, 59.5], [0, 0, 1]]), 160, 120)
AHEAD = Pose(np.eye(3), np.array([0.0, 0, 2]))
SQUARE = np.array([[-0.3, -0.2, 0], [0.3, -0.2, 0], [0.3, 0.2, 0], [-0.3, 0.2, 0]])
TWO = np.array([[0, 1, 2], [0, 2, 3]], np.int32)


def sphere(radius, rings=120):
    """A mesh whose corners lie on a sphere."""
    polar, around = np.meshgrid(
        np.linspace(0, np.pi, rings), np.linspace(0, 2 * np.pi, 2 * rings), indexing="ij"
    )
    points = np.stack(
        [np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)], -1
    )
    index = np.arange(points.shape[0] * points.shape[1]).reshape(points.shape[:2])
    a, b, c, d = index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]
    faces = np.concatenate([np.stack(t, -1).reshape(-1, 3) for t in ((a, b, c), (a, c, d))])
    return TexturedMesh(radius * points.reshape(-1, 3), faces.astype(np.int32))


def test_a_sphere_has_the_outline_and_depth_of_one():
    radius, far = 0.3, 2.0
    seen = PinholeRenderer(sphere(radius)).render(CAMERA, AHEAD)
    rays = CAMERA.rays(np.stack(np.meshgrid(np.arange(160), np.arange(120)), -1).reshape(-1, 2))
    # A ray d from the eye meets the sphere where t^2 |d|^2 - 2 t far + far^2 - radius^2 = 0.
    square = (rays**2).sum(1)
    inside = far**2 - square * (far**2 - radius**2)
    mask = (inside > 0).reshape(120, 160)
    assert (seen.mask ^ mask).sum() <= 0.005 * mask.sum()
    depth = ((far - np.sqrt(inside.clip(0))) / square).reshape(120, 160)
    both = seen.mask & mask
    # Polygons lie inside of the sphere: by less than a millimetre, but for the rim.
    assert np.quantile(np.abs(seen.depth - depth)[both], 0.97) < 1e-3
    # The covered shares add up to the area, far more exactly than whole pixels do.
    assert seen.coverage.sum() == pytest.approx(mask.sum(), rel=0.005)
    assert (seen.depth[~seen.mask] == 0).all() and (seen.rgb[seen.coverage == 0] == 0).all()


def test_a_tilted_plane_has_the_depth_of_its_equation():
    pose = Pose(rotation_from_axis_angle(np.array([0.5, 0.4, 0])), np.array([0.05, 0, 1.5]))
    seen = PinholeRenderer(TexturedMesh(SQUARE, TWO)).render(CAMERA, pose)
    rows, columns = np.nonzero(seen.mask)
    rays = CAMERA.rays(np.stack([columns, rows], -1))
    normal = pose.rotation[:, 2]
    expected = normal @ pose.translation / (rays @ normal)
    np.testing.assert_allclose(seen.depth[seen.mask], expected, rtol=1e-5)


def test_half_covered_pixels_are_half_there():
    # The square's left border lies in the middle of a column of pixels.
    left = (40 - CAMERA.intrinsics[0, 2]) / 300 * 2
    corners = SQUARE.copy()
    corners[[0, 3], 0] = left
    mesh = TexturedMesh(corners, TWO, vertex_colors=np.full((4, 3), 200, np.uint8))
    seen = PinholeRenderer(mesh).render(CAMERA, AHEAD, supersample=4)
    np.testing.assert_allclose(seen.coverage[60, 39:42], [0, 0.5, 1], atol=1e-6)
    np.testing.assert_array_equal(seen.rgb[60, 39:42, 0], [0, 100, 200])
    photograph = np.full((120, 160, 3), 50, np.uint8)
    np.testing.assert_array_equal(seen.over(photograph)[60, 39:42, 0], [50, 125, 200])


def test_a_texture_seen_head_on_is_itself():
    texture = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    uv = np.array([[0, 1], [1, 1], [1, 0], [0, 0]])  # y is down before the camera, v is up
    mesh = TexturedMesh(SQUARE * [0.2 / 0.3, 0.2 / 0.3, 1], TWO, uv, texture)
    # 0.4 m at 2 m are 60 pixels, and 0.267 m are 40: a texel a pixel.
    seen = PinholeRenderer(mesh).render(CAMERA, AHEAD, supersample=1)
    assert seen.mask.sum() == 60 * 40
    np.testing.assert_array_equal(seen.rgb[seen.mask].reshape(40, 60, 3), texture)


def test_between_texels_colours_are_mixed_and_textures_repeat():
    texture = np.array([[[0] * 3, [100] * 3]], np.uint8)
    uv = np.array([[0.25, 0.5], [0.75, 0.5], [0.5, 0.5], [0.375, 0.3], [1.25, 2.5], [0, 0]])
    np.testing.assert_allclose(bilinear(texture, uv)[:, 0], [0, 100, 50, 25, 0, 50])


def test_a_mesh_behind_the_camera_is_not_seen():
    renderer = PinholeRenderer(TexturedMesh(SQUARE, TWO))
    seen = renderer.render(CAMERA, Pose(np.eye(3), np.array([0, 0, -2.0])))
    assert not seen.mask.any() and not seen.rgb.any()
    around = renderer.render(CAMERA, Pose(rotation_from_axis_angle(np.array([0, 1.5, 0])),
                                          np.array([0, 0, 0.1])))  # fmt: skip
    assert around.mask.any() and not around.mask.all()


def test_the_silhouette_at_some_points():
    renderer = PinholeRenderer(TexturedMesh(SQUARE, TWO))
    points = np.array([[79.5, 59.5], [79.5 - 44, 59.5], [79.5 - 46, 59.5], [79.5, 59.5 + 31]])
    assert renderer.silhouette(CAMERA, AHEAD, points).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    "name,content,said",
    [
        ("a.glb", b"glTF", "does not begin with glTF|is cut off|no GLB"),
        ("a.glb", b"glTF" + b"\2\0\0\0" * 4, "no GLB of version 2"),
        ("a.glb", b"glTF\2\0\0\0\0\0\0\0\4\0\0\0JSON{,  ", "its description: .*JSON"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 0\nend_header\n", "no triangles|cannot"),
        ("a.obj", b"v 0 0 0\nv 0 0 1\n", "no triangles|cannot be read"),
        ("a.obj", b"v nan 0 0\nv 0 0 1\nv 0 1 0\nf 1 2 3\n", "not finite"),
        ("a.stl", b"solid", "are read from .obj, .ply, .glb"),
    ],
)
def test_what_is_no_mesh_is_said(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: .*({said})"):
        read_mesh(tmp_path / name)


def test_a_mesh_that_is_not_there_or_too_fine(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="a.obj: a.obj cannot be read: No such file"):
        read_mesh(tmp_path / "a.obj")
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 0 0 1\nv 0 1 0\nf 1 2 3\nf 1 3 2\n")
    assert len(read_mesh(tmp_path / "a.obj").faces) == 2
    monkeypatch.setattr("htfa_jax.data.rendering.meshes.MAX_FACES", 1)
    with pytest.raises(DataError, match="more than 1 triangles: simplify it"):
        read_mesh(tmp_path / "a.obj")
