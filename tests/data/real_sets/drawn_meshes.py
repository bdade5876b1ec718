"""Textured boxes, cans and a mug: the objects of the fixtures, in metres."""

import numpy as np
from exact_renderer import Mesh


def drawn_texture(seed, colour, size):
    """A coloured texture with some dark marks, so that a flip or a shift is seen.

    Small ones are seen enlarged: half a texel beside, or the nearest texel alone, is seen too.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    pixels = np.ones((size, size, 3)) * colour
    for channel in range(3):
        for _ in range(3):
            fx, fy = rng.uniform(-3.5, 3.5, 2)
            wave = np.sin(2 * np.pi * (fx * x + fy * y) + rng.uniform(0, 6.3))
            pixels[..., channel] += 17 * wave
    for _ in range(5):
        row, column = (rng.uniform(0.04, 0.8, 2) * size).astype(int)
        pixels[row : row + 1 + size // 60, column : column + size // 12] *= 0.35
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def box(width, depth, height, texture, centre=(0, 0, 0)):
    """Six faces, each with its cell of a 3 x 2 atlas."""
    half = np.array([width, depth, height]) / 2
    vertices, faces, uv = [], [], []
    cell = 0
    for axis in range(3):
        for sign in (-1, 1):
            one, two = (axis + 1) % 3, (axis + 2) % 3
            column, row = cell % 3, cell // 3
            first = len(vertices)
            spots = []
            for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
                point = np.zeros(3)
                point[axis], point[one], point[two] = sign, a, b
                vertices.append(point * half + centre)
                spots.append(
                    ((column + 0.04 + 0.46 * (a + 1)) / 3, (row + 0.04 + 0.46 * (b + 1)) / 2)
                )
            order = ((0, 1, 2), (0, 2, 3)) if sign > 0 else ((0, 2, 1), (0, 3, 2))
            for triangle in order:
                faces.append([first + k for k in triangle])
                uv.append([spots[k] for k in triangle])
            cell += 1
    return Mesh(np.array(vertices), np.array(faces), np.array(uv), texture)


def can(radius, height, texture, sides=32, open_top=False, handle=False, centre=(0, 0, 0)):
    """A cylinder about z with a label around it; open with a wall inside, and a handle: a mug."""
    vertices, faces, uv = [], [], []

    def ring(r, z):
        first = len(vertices)
        for k in range(sides):
            turn = 2 * np.pi * k / sides
            vertices.append([r * np.cos(turn), r * np.sin(turn), z])
        return first

    def wall(low, high, v0, v1, inward=False):
        for k in range(sides):
            n = (k + 1) % sides
            quad = [low + k, low + n, high + n, high + k]
            spots = [(k / sides, v0), ((k + 1) / sides, v0), ((k + 1) / sides, v1), (k / sides, v1)]
            for t in ((0, 1, 2), (0, 2, 3)):
                t = t[::-1] if inward else t
                faces.append([quad[i] for i in t])
                uv.append([spots[i] for i in t])

    def lid(first, z, up, u0):
        middle = len(vertices)
        vertices.append([0, 0, z])
        for k in range(sides):
            n = (k + 1) % sides
            spots = [(u0, 0.13)]
            for step in (k, k + 1):
                turn = 2 * np.pi * step / sides
                spots.append((u0 + 0.11 * np.cos(turn), 0.13 + 0.11 * np.sin(turn)))
            triangle = [middle, first + k, first + n]
            faces.append(triangle if up else triangle[::-1])
            uv.append(spots if up else spots[::-1])

    low, high = ring(radius, -height / 2), ring(radius, height / 2)
    wall(low, high, 0.3, 0.97)
    lid(low, -height / 2, up=False, u0=0.15)
    if open_top:
        thin = radius - 0.004
        inner, floor = ring(thin, height / 2), ring(thin, -height / 2 + 0.004)
        wall(high, inner, 0.97, 0.99)
        wall(floor, inner, 0.3, 0.97, inward=True)
        lid(floor, -height / 2 + 0.004, up=True, u0=0.45)
    else:
        lid(high, height / 2, up=True, u0=0.45)
    if handle:
        _handle(vertices, faces, uv, radius, height)
    return Mesh(np.array(vertices) + centre, np.array(faces), np.array(uv), texture)


def _handle(vertices, faces, uv, radius, height, steps=10, around=6):
    """Half of a ring of 6 mm wire at +x."""
    first = len(vertices)
    for i in range(steps + 1):
        turn = np.pi * (i / steps - 0.5)
        out = np.array([np.cos(turn), 0, np.sin(turn)])
        for k in range(around):
            tilt = 2 * np.pi * k / around
            point = np.array([radius - 0.003, 0, 0]) + out * height * 0.34
            vertices.append(
                point + 0.006 * (np.cos(tilt) * out + np.sin(tilt) * np.array([0, 1, 0]))
            )
    for i in range(steps):
        for k in range(around):
            n = (k + 1) % around
            quad = [first + i * around + k, first + i * around + n,
                    first + (i + 1) * around + n, first + (i + 1) * around + k]  # fmt: skip
            u0, u1 = 0.65 + 0.25 * i / steps, 0.65 + 0.25 * (i + 1) / steps
            v0, v1 = 0.03 + 0.2 * k / around, 0.03 + 0.2 * (k + 1) / around
            spots = [(u0, v0), (u0, v1), (u1, v1), (u1, v0)]
            for t in ((0, 1, 2), (0, 2, 3)):
                faces.append([quad[j] for j in t])
                uv.append([spots[j] for j in t])


def ycb_like():
    """{name: mesh}: shapes of YCB's sizes, their origins off the middle as in YCB-Video's files."""
    return {
        "003_cracker_box": box(
            0.07, 0.16, 0.21, drawn_texture(1, (180, 70, 60), 64), (-0.01, 0.02, 0.01)
        ),
        "005_tomato_soup_can": can(
            0.034, 0.101, drawn_texture(2, (190, 130, 70), 256), centre=(-0.008, 0.08, 0.05)
        ),
        "010_potted_meat_can": box(
            0.05, 0.10, 0.083, drawn_texture(3, (70, 100, 185), 256), (-0.03, -0.02, 0.04)
        ),
        "025_mug": can(
            0.045, 0.081, drawn_texture(4, (90, 170, 100), 64), open_top=True, handle=True,
            centre=(-0.01, 0.015, 0.016),
        ),
    }  # fmt: skip
