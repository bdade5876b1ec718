"""`rendering.meshes` and `rendering.pinhole` on meshes that an independent writer made."""

import drawn_scenes
import numpy as np
import pytest
from drawn_scenes import CAMERAS, MESHES
from exact_renderer import see_mesh
from mesh_files import write_glb, write_obj, write_ply
from PIL import Image

from htfa_jax.data.rendering.cameras import Camera, Pose
from htfa_jax.data.rendering.meshes import read_mesh
from htfa_jax.data.rendering.pinhole import PinholeRenderer
from htfa_jax.errors import DataError

# Of the pixels inside a mesh such a share is within so many levels of the exact colour.
SHARE, LEVELS = 0.95, 2
NAME = "025_mug"
FORMS = ["obj", "text", "binary", "glb"]


def written(folder, form, mesh):
    """(file, metres of its unit)"""
    if form == "obj":
        write_obj(folder / "m", mesh)
        return folder / "m" / "textured_simple.obj", 1.0
    if form == "glb":
        write_glb(folder / "m.glb", mesh)
        return folder / "m.glb", 1.0
    write_ply(folder / "m.ply", mesh, 0, binary=form == "binary")
    return folder / "m.ply", 0.001


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", list(MESHES))
def test_a_mesh_looks_as_the_exact_renderer_draws_it(tmp_path, form, name):
    mesh = MESHES[name]
    path, scale = written(tmp_path, form, mesh)
    found = read_mesh(path, scale)
    low, high = found.vertices.min(0), found.vertices.max(0)
    assert np.allclose([low, high], [mesh.vertices.min(0), mesh.vertices.max(0)], atol=1e-5)
    renderer = PinholeRenderer(found)
    for camera in CAMERAS[::3]:
        rotation, translation = camera.pose((drawn_scenes.turned((1, 2, 0.5), 75), np.zeros(3)))
        exact = see_mesh(mesh, camera.view, rotation, translation)
        seen = renderer.render(
            Camera(camera.view.matrix, camera.view.width, camera.view.height),
            Pose(rotation, translation),
        )
        mask = exact.inside(camera.view, "mask")
        assert (seen.mask ^ mask).sum() <= 0.002 * mask.sum()
        full = exact.inside(camera.view, "full")
        depth = exact.inside(camera.view, "depth")
        both = full & seen.mask
        # At an edge of the mesh a hair's breadth decides which of two depths a pixel has.
        assert (np.abs(seen.depth - depth)[both] < 1e-4).mean() > 0.995
        gap = np.abs(seen.rgb.astype(float) - exact.inside(camera.view, "rgb"))[both]
        assert (gap <= LEVELS + 0.5).all(-1).mean() >= SHARE
        assert seen.coverage[full].min() > 0.99


def test_vertex_colours_are_read(tmp_path):
    write_ply(tmp_path / "m.ply", MESHES[NAME], 0, binary=True, coloured=True)
    found = read_mesh(tmp_path / "m.ply", 0.001)
    assert found.vertex_colors is not None and found.texture is None
    assert len(np.unique(found.vertex_colors, axis=0)) > 20


@pytest.fixture
def secret(tmp_path):
    """A folder for a model, and files outside of it that no model may read."""
    Image.new("RGB", (8, 8), (255, 0, 255)).save(tmp_path / "secret.png")
    (tmp_path / "secret.bin").write_bytes(b"\0" * 1_000_000)
    (tmp_path / "secret.mtl").write_text("newmtl material_0\nmap_Kd secret.png\n")
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.mark.parametrize(
    "uri", ["../secret.png", "{outside}/secret.png", "file://{outside}/secret.png",
            "%2e%2e/secret.png", "http://127.0.0.1:9/secret.png"],
)  # fmt: skip
def test_a_glb_whose_texture_is_elsewhere_is_refused(secret, uri):
    write_glb(secret / "m.glb", MESHES[NAME], image_uri=uri.format(outside=secret.parent))
    with pytest.raises(DataError, match=r"m\.glb"):
        read_mesh(secret / "m.glb")


@pytest.mark.parametrize("uri", ["../secret.bin", "{outside}/secret.bin", "%2e%2e/secret.bin"])
def test_a_glb_whose_vertices_are_elsewhere_is_refused(secret, uri):
    write_glb(secret / "m.glb", MESHES[NAME], buffer_uri=uri.format(outside=secret.parent))
    with pytest.raises(DataError, match=r"m\.glb"):
        read_mesh(secret / "m.glb")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mtllib ./textured_simple.obj.mtl", "mtllib ../../secret.mtl"),
        ("mtllib ./textured_simple.obj.mtl", "mtllib {outside}/secret.mtl"),
        ("map_Kd texture_map.png", "map_Kd ../../secret.png"),
        ("map_Kd texture_map.png", "map_Kd {outside}/secret.png"),
    ],
)
def test_an_obj_whose_material_is_elsewhere_is_refused(secret, old, new):
    write_obj(secret / "m", MESHES[NAME])
    changed = 0
    for path in (secret / "m").glob("textured_simple.obj*"):
        text = path.read_text()
        changed += old in text
        path.write_text(text.replace(old, new.format(outside=secret.parent)))
    assert changed == 1
    with pytest.raises(DataError, match="textured_simple"):
        read_mesh(secret / "m" / "textured_simple.obj")


@pytest.mark.parametrize("form", ["obj", "text"])
def test_a_texture_that_is_a_link_out_is_refused(secret, form):
    path, scale = written(secret, form, MESHES[NAME])
    texture = path.with_name("texture_map.png") if form == "obj" else path.with_suffix(".png")
    texture.unlink()
    texture.symlink_to(secret.parent / "secret.png")
    with pytest.raises(DataError, match=path.name):
        read_mesh(path, scale)


@pytest.mark.parametrize("form", ["obj", "text"])
def test_a_texture_that_is_not_there_is_named(secret, form):
    path, scale = written(secret, form, MESHES[NAME])
    texture = path.with_name("texture_map.png") if form == "obj" else path.with_suffix(".png")
    texture.unlink()
    with pytest.raises(DataError, match=texture.name):
        read_mesh(path, scale)
