"""Meshes with a texture or colours, from OBJ, PLY and GLB files of others.

trimesh reads them. What it opens beside the file is looked at first: no name leads out of the
file's folder, nothing is fetched, and sizes are bounded.
"""

from __future__ import annotations

import io
import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from htfa_jax.common.json_files import parse_json
from htfa_jax.common.names import inside
from htfa_jax.data.decode import FORMATS, MAX_BYTES, MAX_PIXELS
from htfa_jax.errors import DataError

FORMS = (".obj", ".ply", ".glb")
MAX_FACES = 2_000_000
GREY = (128, 128, 128)  # of a mesh without texture and colours


@dataclass(frozen=True)
class TexturedMesh:
    """Triangles with colours.

    Attributes:
      vertices: [V, 3] float64, metres.
      faces: [F, 3] int32.
      uv: [V, 2], of the texture, v upwards; None without one.
      texture: uint8 [H, W, 3]; None without one.
      vertex_colors: uint8 [V, 3], where there is no texture.
    """

    vertices: np.ndarray
    faces: np.ndarray
    uv: np.ndarray | None = None
    texture: np.ndarray | None = None
    vertex_colors: np.ndarray | None = None

    def transformed(
        self, rotation: np.ndarray, translation: np.ndarray, scale: float = 1.0
    ) -> TexturedMesh:
        """The mesh with vertices scale * rotation @ x + translation."""
        return replace(self, vertices=scale * self.vertices @ rotation.T + translation)

    def corner_colors(self) -> np.ndarray:
        """Colours [F, 3, 3] of the triangles' corners, where there is no texture."""
        colors = self.vertex_colors
        if colors is None:
            colors = np.full((len(self.vertices), 3), GREY, np.uint8)
        return colors[self.faces].astype(np.float32)


def read_mesh(path: Path, scale: float = 1.0) -> TexturedMesh:
    """The mesh of a file.

    Args:
      path: .obj (with its .mtl), .ply or .glb.
      scale: metres of its unit: 0.001 for millimetres.

    Raises DataError that names the file, for one that cannot be read or leads out of its folder.
    """
    import trimesh

    def fail(reason: str) -> DataError:
        return DataError(f"{path}: {reason}")

    content = _bytes(path, fail)
    form = path.suffix.lower()
    transforms: dict[str, dict[str, Any]] = {}
    if form == ".glb":
        content, transforms = _named_materials(content, path, fail)
    elif form not in FORMS:
        raise fail(f"meshes are read from {', '.join(FORMS)}")
    beside = _Beside(path, fail)
    try:
        scene = trimesh.load_scene(
            io.BytesIO(content), file_type=form[1:], resolver=beside, process=False
        )
        if beside.problem:  # which trimesh takes for a missing texture
            raise beside.problem
        parts = [_placed(scene, node, transforms) for node in scene.graph.nodes_geometry]
        parts = [part for part in parts if part is not None]
        if sum(len(part.faces) for part in parts) > MAX_FACES:
            raise fail(f"has more than {MAX_FACES:,} triangles: simplify it first")
        if not parts:
            raise fail("has no triangles")
        whole = parts[0] if len(parts) == 1 else trimesh.util.concatenate(parts)
        return _checked(_colored(whole, scale, fail), fail)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file does to trimesh, and its texture to PIL
        raise beside.problem or fail(f"cannot be read: {str(error)[:200]}") from error


class _Beside:
    """What trimesh asks for names of files beside a mesh, and the first that may not be read."""

    def __init__(self, path: Path, fail: Any):
        self._path, self._fail = path, fail
        self.problem: DataError | None = None

    def get(self, name: str) -> bytes:
        name = unquote(name).strip().replace("\\", "/").removeprefix("./")
        try:
            if "://" in name or name.startswith("file:"):
                raise ValueError("is no file beside it: nothing is fetched")
            return _bytes(inside(self._path.parent, name), self._fail)
        except DataError as error:
            self.problem = self.problem or error
        except ValueError as error:
            self.problem = self.problem or self._fail(f"{name!r}, which it names, {error}")
        raise self.problem

    __getitem__ = get

    def keys(self) -> list[str]:
        """None: trimesh looks for names only by this list."""
        return []

    def __contains__(self, name: str) -> bool:
        return True

    def namespaced(self, namespace: str) -> _Beside:
        """Not used for the forms that are read."""
        raise self._fail(f"looks into {namespace!r}")


def _bytes(path: Path, fail: Any) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise fail(f"{path.name} is no file")
        if size > MAX_BYTES:
            raise fail(f"{path.name} has {size:,} bytes, more than {MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise fail(f"{path.name} cannot be read: {error.strerror}") from error


def _named_materials(
    content: bytes, path: Path, fail: Any
) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """A GLB whose materials are named by number, and KHR_texture_transform of each by name.

    trimesh leaves that extension out and keeps of a material only its name.
    """
    if len(content) < 20 or content[:4] != b"glTF":
        raise fail("is no GLB: it does not begin with glTF")
    version, _, length, kind = struct.unpack("<IIII", content[4:20])
    if version != 2 or kind != 0x4E4F534A or 20 + length > len(content):
        raise fail("is no GLB of version 2, or is cut off")
    scene = parse_json(content[20 : 20 + length], f"{path}: its description", DataError)
    transforms = {}
    materials = scene.get("materials") if isinstance(scene, dict) else None
    for number, material in enumerate(materials if isinstance(materials, list) else []):
        if not isinstance(material, dict):
            raise fail(f"its material {number} is no object")
        material["name"] = name = f"material {number}"
        found: Any = material
        for key in ("pbrMetallicRoughness", "baseColorTexture", "extensions",
                    "KHR_texture_transform"):  # fmt: skip
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict):
            transforms[name] = found
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    rest = content[20 + length :]
    header = struct.pack("<4sIIII", b"glTF", 2, 20 + len(text) + len(rest), len(text), kind)
    return header + text + rest, transforms


def _placed(scene: Any, node: str, transforms: dict[str, dict[str, Any]]) -> Any:
    """A part of a scene at its place, its texture's own transform applied; None for no mesh."""
    matrix, name = scene.graph[node]
    part = scene.geometry[name]
    if not len(getattr(part, "faces", ())):
        return None
    part = part.copy()
    part.apply_transform(matrix)
    material = getattr(part.visual, "material", None)
    transform = transforms.get(getattr(material, "name", None) or "")
    if transform and part.visual.uv is not None:
        part.visual.uv = _transformed(part.visual.uv, transform)
    return part


def _transformed(uv: np.ndarray, transform: dict[str, Any]) -> np.ndarray:
    """Texture coordinates with v upwards, after KHR_texture_transform, which has v downwards."""
    u, v = uv[:, 0], 1 - uv[:, 1]
    (x, y), (sx, sy) = transform.get("offset", (0, 0)), transform.get("scale", (1, 1))
    angle = float(transform.get("rotation", 0))
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = sx * u, sy * v
    return np.stack([cos * u + sin * v + x, 1 - (-sin * u + cos * v + y)], axis=1)


def _colored(part: Any, scale: float, fail: Any) -> TexturedMesh:
    vertices = np.asarray(part.vertices, np.float64) * scale
    faces = np.asarray(part.faces, np.int32)
    visual = part.visual
    material = getattr(visual, "material", None)
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    uv = getattr(visual, "uv", None)
    if image is not None and uv is not None:
        if image.format is not None and image.format not in FORMATS:
            raise fail(f"its texture is {image.format}: {', '.join(FORMATS)} are read")
        if image.width * image.height > MAX_PIXELS:
            raise fail(f"its texture has more than {MAX_PIXELS:,} pixels")
        texture = np.asarray(image.convert("RGB"))
        return TexturedMesh(vertices, faces, np.asarray(uv, np.float64), texture)
    if visual.kind == "vertex":
        return TexturedMesh(vertices, faces, vertex_colors=visual.vertex_colors[:, :3].copy())
    color = getattr(material, "main_color", None)
    if color is None:
        return TexturedMesh(vertices, faces)
    plain = np.tile(np.asarray(color[:3], np.uint8), (len(vertices), 1))
    return TexturedMesh(vertices, faces, vertex_colors=plain)


def _checked(mesh: TexturedMesh, fail: Any) -> TexturedMesh:
    if not np.isfinite(mesh.vertices).all():
        raise fail("has vertices that are not finite numbers")
    if mesh.faces.min() < 0 or mesh.faces.max() >= len(mesh.vertices):
        raise fail("has triangles whose vertices are not there")
    if mesh.uv is not None and not (
        len(mesh.uv) == len(mesh.vertices) and np.isfinite(mesh.uv).all()
    ):
        raise fail("has texture coordinates that are not finite, or not one for each vertex")
    return mesh
