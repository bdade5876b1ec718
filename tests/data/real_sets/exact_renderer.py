"""A small exact renderer: the truth that the fixtures of real data sets are written from.

It shares nothing with `htfa_jax`. Triangles are looked at one by one at the exact rays of the
pixels (OpenCV: x right, y down, z forward; the centre of the top left pixel is (0, 0)), the hand
is solved in closed form, and textures are read with perspective and bilinear weights, without
light. A pixel is of what its centre sees; its colour is the mean of 3 x 3 rays of that surface.
"""

import dataclasses

import numpy as np

FINE = 3  # rays of a pixel, in each direction


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Triangles with a texture: metres, `uv` for each corner of each face with v up, as in OBJ."""

    vertices: np.ndarray  # [V, 3]
    faces: np.ndarray  # [F, 3]
    uv: np.ndarray  # [F, 3, 2]
    texture: np.ndarray  # uint8 [H, W, 3]


@dataclasses.dataclass(frozen=True)
class View:
    """A pinhole camera: pixels per unit of x/z, y/z, and where the axis goes through."""

    fx: float
    fy: float
    cx: float
    cy: float
    width: int = 640
    height: int = 480

    @property
    def matrix(self):
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1.0]])


@dataclasses.dataclass(frozen=True)
class Seen:
    """One thing alone in a window that starts at pixel (x, y) and may leave the image."""

    x: int
    y: int
    mask: np.ndarray  # bool [h, w], by pixel centres
    full: np.ndarray  # bool [h, w], all rays of the pixel hit
    depth: np.ndarray  # [h, w], inf where nothing is
    rgb: np.ndarray  # float [h, w, 3]

    def inside(self, view, name):
        """One of the arrays as a whole image."""
        part = getattr(self, name)
        whole = np.full((view.height, view.width, *part.shape[2:]), np.inf).astype(part.dtype)
        if name != "depth":
            whole[:] = 0
        y0, x0 = max(self.y, 0), max(self.x, 0)
        y1 = min(self.y + part.shape[0], view.height)
        x1 = min(self.x + part.shape[1], view.width)
        if y1 > y0 and x1 > x0:
            whole[y0:y1, x0:x1] = part[y0 - self.y : y1 - self.y, x0 - self.x : x1 - self.x]
        return whole

    @property
    def box(self):
        """x, y, width, height of the mask, wherever it is; None if it is empty."""
        rows, columns = np.nonzero(self.mask)
        if not len(rows):
            return None
        x, y = int(columns.min()), int(rows.min())
        return [self.x + x, self.y + y, int(columns.max()) - x + 1, int(rows.max()) - y + 1]


def see_mesh(mesh, view, rotation, translation):
    """The mesh alone, in a window around its projection: at most three images wide and high."""
    points = mesh.vertices @ np.asarray(rotation).T + np.asarray(translation)
    if points[:, 2].min() < 1e-3:
        raise ValueError("the fixtures' objects stay in front of the camera")
    pixels = points[:, :2] / points[:, 2:] * (view.fx, view.fy) + (view.cx, view.cy)
    x, y = np.maximum(np.floor(pixels.min(0)).astype(int) - 1, (-view.width, -view.height))
    x1, y1 = np.minimum(np.ceil(pixels.max(0)).astype(int) + 2, (2 * view.width, 2 * view.height))
    w, h = max(int(x1 - x), 1), max(int(y1 - y), 1)
    # Fine positions of all rays, in pixels of the window.
    columns = (np.arange(w * FINE) + 0.5) / FINE - 0.5
    rows = (np.arange(h * FINE) + 0.5) / FINE - 0.5
    inverse = np.zeros((h * FINE, w * FINE))  # 1/z, the nearest is the largest
    face = np.full(inverse.shape, -1)
    weights = np.zeros((*inverse.shape, 3))
    flat = pixels - (x, y)
    for index, corners in enumerate(mesh.faces):
        a, b, c = flat[corners]
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        if abs(area) < 1e-12:
            continue
        low, high = np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c)
        j0, j1 = np.searchsorted(columns, [low[0], high[0]])
        i0, i1 = np.searchsorted(rows, [low[1], high[1]])
        if j0 >= j1 or i0 >= i1:
            continue
        u, v = columns[None, j0:j1], rows[i0:i1, None]
        wa = ((b[0] - u) * (c[1] - v) - (b[1] - v) * (c[0] - u)) / area
        wb = ((c[0] - u) * (a[1] - v) - (c[1] - v) * (a[0] - u)) / area
        wc = 1 - wa - wb
        za, zb, zc = 1 / points[corners, 2]
        near = wa * za + wb * zb + wc * zc
        hit = (wa >= 0) & (wb >= 0) & (wc >= 0) & (near > inverse[i0:i1, j0:j1])
        inverse[i0:i1, j0:j1][hit] = near[hit]
        face[i0:i1, j0:j1][hit] = index
        weights[i0:i1, j0:j1][hit] = np.stack([wa[hit] * za, wb[hit] * zb, wc[hit] * zc], -1)
    hit = face >= 0
    colours = np.zeros((*face.shape, 3))
    share = weights[hit] / weights[hit].sum(-1, keepdims=True)
    colours[hit] = bilinear(mesh.texture, (share[..., None] * mesh.uv[face[hit]]).sum(1))
    depth = np.full(face.shape, np.inf)
    depth[hit] = 1 / inverse[hit]
    return _window(int(x), int(y), hit, depth, colours)


def bilinear(texture, uv):
    """Colours of a texture [H, W, 3] at uv [N, 2]; texels' centres lie half a texel inside."""
    height, width = texture.shape[:2]
    x = np.clip(uv[:, 0] * width - 0.5, 0, width - 1)
    y = np.clip((1 - uv[:, 1]) * height - 0.5, 0, height - 1)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]
    texture = texture.astype(float)
    top = texture[y0, x0] * (1 - fx) + texture[y0, x1] * fx
    bottom = texture[y1, x0] * (1 - fx) + texture[y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def see_capsules(capsules, view, colour):
    """A hand: rounded segments [(start, end, radius)] in the camera's frame; inside the image."""
    u = (np.arange(view.width) - view.cx) / view.fx
    v = (np.arange(view.height) - view.cy) / view.fy
    depth = np.full((view.height, view.width), np.inf)
    for start, end, radius in capsules:
        start, end = np.asarray(start, float), np.asarray(end, float)
        # Pixels that its two balls' boxes can touch: a ball of r at z covers about r/(z - r).
        ends = np.stack([start, end])
        z = np.maximum(ends[:, 2] - radius, 0.05)
        corners = np.concatenate(
            [
                (ends[:, :2] + sign * radius) / z_[:, None]
                for sign in (-1, 1)
                for z_ in (z, z + 2 * radius)
            ]
        )
        j0, j1 = np.searchsorted(u, [corners[:, 0].min(), corners[:, 0].max()])
        i0, i1 = np.searchsorted(v, [corners[:, 1].min(), corners[:, 1].max()])
        if j0 >= j1 or i0 >= i1:
            continue
        rays = np.stack([*np.meshgrid(u[j0:j1], v[i0:i1]), np.ones((i1 - i0, j1 - j0))], -1)
        found = _capsule(rays, start, end, radius)
        depth[i0:i1, j0:j1] = np.minimum(depth[i0:i1, j0:j1], found)
    hit = np.isfinite(depth)
    shade = np.zeros((*hit.shape, 3))
    # Nearer is lighter: the hand has no texture but is not flat either.
    if hit.any():
        near = np.clip((depth[hit].max() - depth[hit]) / 0.15, 0, 1)[:, None]
        shade[hit] = np.asarray(colour) * (0.75 + 0.25 * near)
    return Seen(0, 0, hit, hit, depth, shade)


def _capsule(rays, start, end, radius):
    """Depths along rays [..., 3] of z 1 from the origin to a capsule; inf where it is missed."""
    axis = end - start
    aa, rr = axis @ axis, (rays * rays).sum(-1)
    ar, as_, rs = rays @ axis, -(axis @ start), -(rays @ start)
    ss = start @ start
    a = aa * rr - ar**2
    b = aa * rs - as_ * ar
    c = aa * ss - as_**2 - radius**2 * aa
    found = np.full(rr.shape, np.inf)
    root = b**2 - a * c
    ok = (root >= 0) & (a > 1e-15)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = (-b - np.sqrt(root)) / a
    along = as_ + t * ar
    side = ok & (along > 0) & (along < aa) & (t > 0)
    found[side] = t[side]
    for centre in (start, end):
        rc = rays @ centre
        root = rc**2 - rr * (centre @ centre - radius**2)
        t = (rc - np.sqrt(np.maximum(root, 0))) / rr
        ball = (root >= 0) & (t > 0)
        found[ball] = np.minimum(found[ball], t[ball])
    return found


def _window(x, y, hit, depth, colours):
    """Fine rays to pixels: centres for the mask and the depth, means of what was hit for colour."""
    h, w = hit.shape[0] // FINE, hit.shape[1] // FINE

    def blocks(array):
        return array.reshape(h, FINE, w, FINE, *array.shape[2:]).sum((1, 3))

    count = blocks(hit.astype(int))
    rgb = blocks(colours * hit[..., None]) / np.maximum(count, 1)[..., None]
    middle = slice(FINE // 2, None, FINE)
    return Seen(x, y, hit[middle, middle], count == FINE * FINE, depth[middle, middle], rgb)
