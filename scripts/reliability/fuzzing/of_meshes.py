"""Meshes: OBJ with its material, PLY and GLB, nearly right."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from random import Random

import numpy as np
from fuzzing.alter import altered, flipped
from fuzzing.reader import Reader, written
from PIL import Image

from htfa_jax.data.rendering.meshes import read_mesh

CORNERS = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], "<f4")
UV = CORNERS[:, :2].copy()
FACES = np.array([[0, 1, 2], [0, 2, 3]], "<u2")


def readers(folder: Path) -> dict[str, Reader]:
    """By name; each has its files in an existing folder."""
    png = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(png, "PNG")
    texture = png.getvalue()
    description = _description(len(texture))
    written(folder / "a.png", texture)
    written(folder / "a.mtl", b"newmtl m\nKd 0.5 0.5 0.5\nmap_Kd a.png\n")
    seeds = {"a.obj": _obj(), "a.ply": _ply(), "a.glb": _glb(description, texture)}

    def make(rng: Random) -> tuple[str, bytes]:
        name = rng.choice(sorted(seeds))
        if name == "a.glb" and rng.randrange(2):
            return name, _glb(altered(rng, description), texture)
        return name, flipped(rng, seeds[name])

    def read(given: tuple[str, bytes]) -> None:
        read_mesh(written(folder / given[0], given[1]))

    return {"mesh": Reader(make, read)}


def _obj() -> bytes:
    lines = ["mtllib a.mtl", *(f"v {x} {y} {z}" for x, y, z in CORNERS)]
    lines += [*(f"vt {u} {v}" for u, v in UV), "usemtl m", "f 1/1 2/2 3/3", "f 1/1 3/3 4/4"]
    return "\n".join(lines).encode() + b"\n"


def _ply() -> bytes:
    head = "ply\nformat binary_little_endian 1.0\ncomment TextureFile a.png\nelement vertex 4\n"
    names = ("x", "y", "z", "texture_u", "texture_v")
    head += "".join(f"property float {name}\n" for name in names)
    head += "element face 2\nproperty list uchar int vertex_indices\nend_header\n"
    faces = b"".join(b"\3" + face.astype("<i4").tobytes() for face in FACES)
    return head.encode() + np.hstack([CORNERS, UV]).tobytes() + faces


def _description(image_bytes: int) -> dict:
    corners, uv, faces = len(CORNERS.tobytes()), len(UV.tobytes()), len(FACES.tobytes())
    starts = np.cumsum([0, corners, uv, faces])
    sizes = (corners, uv, faces, image_bytes)
    return {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "scale": [0.001, 0.001, 0.001], "translation": [1, 2, 3]}],
        "meshes": [{"primitives": [
            {"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "indices": 2, "material": 0},
        ]}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {
            "index": 0,
            "extensions": {"KHR_texture_transform": {"offset": [0.5, 0], "scale": [2, 2]}},
        }}}],
        "textures": [{"source": 0}],
        "images": [{"bufferView": 3, "mimeType": "image/png"}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3"},
            {"bufferView": 1, "componentType": 5126, "count": 4, "type": "VEC2"},
            {"bufferView": 2, "componentType": 5123, "count": 6, "type": "SCALAR"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteOffset": int(start), "byteLength": size}
            for start, size in zip(starts, sizes, strict=True)
        ],
        "buffers": [{"byteLength": int(sum(sizes))}],
    }  # fmt: skip


def _glb(description: object, image: bytes) -> bytes:
    text = json.dumps(description, default=str).encode("utf-8", "replace")
    text += b" " * (-len(text) % 4)
    buffer = CORNERS.tobytes() + UV.tobytes() + FACES.tobytes() + image
    buffer += b"\0" * (-len(buffer) % 4)
    whole = struct.pack("<II", len(text), 0x4E4F534A) + text
    whole += struct.pack("<II", len(buffer), 0x004E4942) + buffer
    return struct.pack("<4sII", b"glTF", 2, 12 + len(whole)) + whole
