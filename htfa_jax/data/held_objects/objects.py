"""Eight kinds of objects with random proportions, in eight named colours.

Object frame: y up, z to the front, the longest side about 2. Numbers are parts of that unit.
"""

from collections.abc import Callable, Sequence

import numpy as np

from htfa_jax.data.held_objects.meshes import Mesh, join, knob, prism, revolve, rotation, slab

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 35, 35),
    "orange": (240, 130, 20),
    "yellow": (240, 215, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 200),
    "purple": (130, 50, 160),
    "white": (238, 238, 235),
    "black": (32, 32, 36),
}
METAL = (0.72, 0.73, 0.75)
DARK = (0.10, 0.10, 0.11)
PAPER = (0.93, 0.92, 0.88)

Random = np.random.Generator
Color = Sequence[float]


def body_color(rng: Random, name: str) -> np.ndarray:
    """One shade [3] in 0..1 of a named colour."""
    noise = rng.normal(0, 3 if name in ("white", "black") else 8, 3)
    shade = np.array(COLORS[name]) * rng.uniform(0.88, 1.08) + noise
    return np.clip(shade, 8, 250) / 255


def accent(color: Color) -> np.ndarray:
    """A colour that stands out from a body colour: lighter on dark ones, darker on light ones."""
    color = np.asarray(color)
    return color * 0.35 + 0.65 if color.mean() < 0.5 else color * 0.45


def chance(rng: Random, probability: float) -> bool:
    """True with the given probability."""
    return bool(rng.uniform() < probability)


def label(rng: Random, radius: float, low: float, high: float, color: Color) -> list[Mesh]:
    """A paper label around a vessel, with lines of print on its front."""
    paper = PAPER if np.mean(color) < 0.75 else (0.80, 0.84, 0.88)
    parts = [revolve([(radius, low), (radius, high)], paper, 0.05)]
    height = high - low
    ink = np.asarray(color) * 0.7
    title = high - 0.34 * height
    for y, thickness, half_arc in [
        (title, 0.20 * height, rng.uniform(0.6, 0.9)),
        (low + 0.34 * height, 0.07 * height, rng.uniform(0.3, 0.8)),
        (low + 0.18 * height, 0.07 * height, rng.uniform(0.3, 0.8)),
    ]:
        line = [(radius + 0.004, y), (radius + 0.004, y + thickness)]
        parts.append(revolve(line, ink, 0.05, arc=(-half_arc, half_arc)))
    return parts


def bottle(rng: Random, color: Color) -> Mesh:
    """A bottle with shoulder, neck and cap, often with a label."""
    radius, height = rng.uniform(0.30, 0.42), rng.uniform(0.95, 1.25)
    shoulder, neck = rng.uniform(0.22, 0.42), rng.uniform(0.22, 0.42)
    neck_radius, power = rng.uniform(0.10, 0.15), rng.uniform(1.2, 1.9)
    t = np.linspace(0, 1, 10)
    curve = neck_radius + (radius - neck_radius) * (1 - t**power)
    top = height + shoulder + neck
    profile = [(0, 0.02), (0.85 * radius, 0), (0.97 * radius, 0.03), (radius, 0.09)]
    profile += [(r, height + shoulder * s) for r, s in zip(curve, t, strict=True)]
    profile += [(neck_radius, top)]
    parts = [revolve(profile, color, 0.75)]
    cap, cap_color = 1.3 * neck_radius, METAL if chance(rng, 0.5) else accent(color)
    cap_profile = [(neck_radius, top - 0.07), (cap, top - 0.06), (cap, top + 0.09)]
    cap_profile += [(0.9 * cap, top + 0.12), (0, top + 0.12)]
    parts.append(revolve(cap_profile, cap_color, 0.6))
    collar = 1.25 * neck_radius
    parts.append(revolve([(collar, top - 0.12), (collar, top - 0.07)], color))
    if chance(rng, 0.55):
        size = rng.uniform(0.35, 0.5) * height
        low = rng.uniform(0.15, 0.3) * height
        parts += label(rng, radius + 0.006, low, low + size, color)
    return join(parts).moved(y=-top / 2)


def can(rng: Random, color: Color) -> Mesh:
    """A drinks can: bevelled ends, sunk metal lid with a pull tab, often a coloured band."""
    radius, height = rng.uniform(0.40, 0.50), rng.uniform(1.25, 1.6)
    neck, lid = 0.86 * radius, 0.80 * radius
    body = [(0, 0.03), (0.78 * radius, 0), (radius, 0.10), (radius, height - 0.12)]
    body += [(neck, height - 0.02)]
    rim = [(neck, height - 0.02), (0.9 * radius, height), (0.9 * radius, height + 0.03)]
    rim += [(0.85 * radius, height + 0.035), (lid, height - 0.04), (0, height - 0.04)]
    parts = [revolve(body, color, 0.85), revolve(rim, METAL, 0.9)]
    tab = slab(0.20 * radius * 2, 0.5 * radius, 0.03, 0.2 * radius, 0.01, METAL, 0.9)
    parts.append(tab.turned(rotation([1, 0, 0], -np.pi / 2)).moved(y=height, z=0.12 * radius))
    mouth = knob([(0.3 * radius, 0), (0.0, 0.0)], DARK, 0.2).turned(rotation([1, 0, 0], -np.pi / 2))
    parts.append(mouth.moved(y=height - 0.035, z=0.42 * radius))
    if chance(rng, 0.7):
        low = rng.uniform(0.3, 0.5) * height
        high = low + rng.uniform(0.12, 0.3) * height
        parts.append(revolve([(1.004 * radius, low), (1.004 * radius, high)], accent(color), 0.8))
    return join(parts).moved(y=-height / 2)


def jar(rng: Random, color: Color) -> Mesh:
    """A wide vessel with a short shoulder and a broad lid, often with a label."""
    radius, height = rng.uniform(0.50, 0.62), rng.uniform(0.85, 1.1)
    lid, lid_height = rng.uniform(0.80, 0.94) * radius, rng.uniform(0.20, 0.30)
    t = np.linspace(0, 1, 6)
    profile = [(0, 0), (0.86 * radius, 0), (0.96 * radius, 0.04), (radius, 0.14)]
    profile += [(radius, 0.8 * height)]
    shoulder = 0.92 * lid + (radius - 0.92 * lid) * np.cos(t * np.pi / 2)
    profile += [(r, height * (0.8 + 0.2 * s)) for r, s in zip(shoulder, t, strict=True)]
    profile += [(0.92 * lid, height + 0.05)]
    parts = [revolve(profile, color, 0.7)]
    top, lid_color = height + 0.04 + lid_height, METAL if chance(rng, 0.6) else accent(color)
    cover = [(0.95 * lid, height + 0.02), (lid, height + 0.04), (lid, height + 0.10)]
    cover += [(0.97 * lid, height + 0.12), (0.97 * lid, top - 0.05), (0.90 * lid, top)]
    cover += [(0.80 * lid, top), (0.78 * lid, top - 0.02), (0, top - 0.02)]
    parts.append(revolve(cover, lid_color, 0.7))
    if chance(rng, 0.5):
        parts += label(rng, radius + 0.006, 0.24 * height, 0.70 * height, color)
    return join(parts).moved(y=-top / 2)


def bowl(rng: Random, color: Color) -> Mesh:
    """An open bowl on a foot ring."""
    radius, height = rng.uniform(0.80, 1.0), rng.uniform(0.45, 0.65)
    foot, wall = rng.uniform(0.36, 0.46) * radius, rng.uniform(0.05, 0.08)
    t = np.linspace(0, 1, 12)
    curve = foot + (radius - foot) * t ** rng.uniform(0.40, 0.62)
    outer = list(zip(curve, height * t, strict=True))
    rim = [(radius - 0.2 * wall, height + 0.4 * wall), (radius - 0.8 * wall, height + 0.4 * wall)]
    inner = [(max(r - wall, 0), max(y, wall)) for r, y in outer[::-1]]
    inside = accent(color) if chance(rng, 0.2) else np.asarray(color) * 0.85
    parts = [
        revolve([(foot, -0.08), (foot, 0), *outer, rim[0]], color, 0.6),
        revolve([rim[0], rim[1], *inner, (0, wall)], inside, 0.6),
        revolve([(0, -0.05), (0.8 * foot, -0.05), (0.85 * foot, -0.08), (foot, -0.08)], color, 0.3),
    ]
    return join(parts).moved(y=-height / 2)


def camera(rng: Random, color: Color) -> Mesh:
    """A compact camera: lens in two steps, view-finder hump, shutter, grip and flash."""
    width, height = rng.uniform(1.5, 1.8), rng.uniform(0.9, 1.1)
    depth, lens = rng.uniform(0.38, 0.5), rng.uniform(0.34, 0.42)
    length, front = rng.uniform(0.3, 0.5), depth / 2
    x = rng.uniform(-0.05, 0.2)
    barrel = [(1.05 * lens, 0), (1.05 * lens, 0.5 * length), (0.9 * lens, 0.55 * length)]
    barrel += [(0.9 * lens, length), (0.76 * lens, length), (0.7 * lens, 0.8 * length)]
    glass = [(0.7 * lens, 0.8 * length), (0.5 * lens, 0.86 * length), (0.0, 0.9 * length)]
    ring = [(1.06 * lens, 0.3 * length), (1.07 * lens, 0.4 * length)]
    lens_parts = [
        knob(barrel, DARK, 0.5, 40),
        knob(ring, METAL, 0.9, 40),
        knob(glass, (0.10, 0.16, 0.34), 0.95, 40),
        knob([(0.28 * lens, 0.885 * length), (0.0, 0.91 * length)], (0.02, 0.02, 0.04), 0.95),
    ]
    body = slab(width, height, depth, 0.16, 0.06, color, 0.35)
    hump = slab(0.55, 0.26, 0.8 * depth, 0.08, 0.05, np.asarray(color) * 0.9, 0.35)
    grip = slab(0.22, 0.8 * height, 0.14, 0.08, 0.06, DARK, 0.1)
    flash = slab(0.24, 0.12, 0.04, 0.03, 0.01, (0.95, 0.95, 0.9), 0.8)
    shutter = revolve([(0.09, 0), (0.09, 0.09), (0.07, 0.11), (0, 0.11)], METAL, 0.9, 24)
    dial = revolve([(0.12, 0), (0.12, 0.07), (0, 0.07)], DARK, 0.4, 24)
    top = height / 2
    parts = [body, hump.moved(x, top + 0.06), shutter.moved(-0.36 * width, top)]
    parts += [dial.moved(0.34 * width, top), grip.moved(-0.42 * width, 0, front)]
    parts += [flash.moved(0.36 * width, 0.32 * height, front)]
    parts += [part.moved(x, -0.05, front) for part in lens_parts]
    return join(parts)


def cellphone(rng: Random, color: Color) -> Mesh:
    """A phone that shows its screen with icons, or its back with a camera bump."""
    width, height, depth = rng.uniform(0.88, 1.02), rng.uniform(1.75, 2.0), rng.uniform(0.10, 0.16)
    bezel, corner, front = rng.uniform(0.10, 0.14), rng.uniform(0.10, 0.18), depth / 2
    parts = [slab(width, height, depth, corner, 0.04, color, 0.5)]
    screen_size = width - 2 * bezel, height - 2.6 * bezel
    screen = slab(*screen_size, 0.012, 0.5 * corner, 0.0, (0.07, 0.09, 0.14), 0.8)
    parts.append(screen.moved(z=front))
    rows, side = int(rng.integers(2, 6)), 0.13 * screen_size[0]
    for row in range(rows):
        for column in range(4):
            shade = rng.uniform(0.45, 0.95, 3)
            icon = slab(side, side, 0.01, 0.3 * side, 0.0, shade, 0.1)
            x = (column - 1.5) * screen_size[0] / 4.3
            y = screen_size[1] / 2 - (row + 1.1) * screen_size[0] / 3.6
            parts.append(icon.moved(x, y, front + 0.006))
    parts.append(slab(0.16, 0.02, 0.012, 0.01, 0.0, DARK).moved(0, height / 2 - 0.6 * bezel, front))
    bump = slab(0.3, 0.46, 0.05, 0.1, 0.02, np.asarray(color) * 0.8, 0.5)
    at = width / 2 - 0.24, height / 2 - 0.34
    parts.append(bump.moved(*at, -front))
    for y in (-0.1, 0.1):
        lens = slab(0.15, 0.15, 0.03, 0.075, 0.01, DARK, 0.95)
        parts.append(lens.moved(at[0], at[1] + y, -front - 0.03))
    button = slab(0.02, 0.22, 0.05, 0.01, 0.0, np.asarray(color) * 0.7)
    parts.append(button.moved(width / 2 + 0.004, 0.2 * height))
    return join(parts)


def knife(rng: Random, color: Color) -> Mesh:
    """A kitchen knife: coloured handle with rivets, bolster, blade with a curved belly."""
    handle, thickness = rng.uniform(0.80, 0.95), rng.uniform(0.22, 0.28)
    length, width = rng.uniform(1.0, 1.25), rng.uniform(0.28, 0.38)
    power = 3 * rng.uniform(0.55, 0.9)
    parts = [slab(handle, thickness, 0.15, 0.45 * thickness, 0.06, color, 0.3).moved(-handle / 2)]
    for x in (-0.3, -0.7):
        rivet = knob([(0.028, 0), (0.028, 0.006), (0, 0.01)], METAL, 0.9, 12).moved(x * handle)
        other = rivet.turned(rotation([0, 1, 0], np.pi)).moved(2 * x * handle)
        parts += [rivet.moved(z=0.075), other.moved(z=-0.075)]
    parts.append(slab(0.10, 1.06 * thickness, 0.17, 0.03, 0.03, METAL, 0.9).moved(0.02))
    t = np.linspace(0, 1, 16)
    spine = thickness / 2
    belly = np.stack([t * length, spine - width * (1 - t**power)], 1)
    outline = np.concatenate([belly, [[0.0, spine]]])
    parts.append(prism(outline, 0.03, 0.012, (0.80, 0.81, 0.83), 1.0))
    return join(parts).moved(x=(handle - length) / 2)


def remote_control(rng: Random, color: Color) -> Mesh:
    """A remote control: power button, ring of arrows, rows of buttons."""
    width, height, depth = rng.uniform(0.46, 0.58), rng.uniform(1.75, 2.05), rng.uniform(0.2, 0.3)
    front = depth / 2
    key = (0.86, 0.86, 0.84) if np.mean(color) < 0.5 else (0.16, 0.16, 0.18)
    parts = [slab(width, height, depth, 0.14, 0.07, color, 0.3)]
    dot = [(0.055, 0), (0.055, 0.03), (0.04, 0.04), (0, 0.04)]
    parts.append(knob(dot, (0.82, 0.10, 0.10), 0.3, 12).moved(-0.28 * width, 0.42 * height, front))
    ring = rng.uniform(0.14, 0.17)
    y = rng.uniform(0.20, 0.27) * height
    hoop = [(ring, 0), (ring, 0.03), (0.9 * ring, 0.04), (0.55 * ring, 0.04), (0.5 * ring, 0.01)]
    parts.append(knob(hoop, key, 0.3).moved(y=y, z=front))
    centre = [(0.4 * ring, 0), (0.4 * ring, 0.04), (0, 0.04)]
    parts.append(knob(centre, key, 0.3).moved(y=y, z=front))
    rows, square = int(rng.integers(4, 7)), chance(rng, 0.5)
    if square:
        button = slab(0.105, 0.075, 0.06, 0.02, 0.02, key, 0.3)
    else:
        button = knob([(0.05, 0), (0.05, 0.025), (0.04, 0.03), (0, 0.03)], key, 0.3, 12)
    step = 0.52 * height / rows
    for row in range(rows):
        for x in (-0.3, 0, 0.3):
            parts.append(button.moved(x * width, y - ring - 0.14 - row * step, front))
    return join(parts)


CATEGORIES: dict[str, Callable[[Random, Color], Mesh]] = {
    "bottle": bottle,
    "bowl": bowl,
    "camera": camera,
    "can": can,
    "cellphone": cellphone,
    "jar": jar,
    "knife": knife,
    "remote control": remote_control,
}

# Degrees: pitch (from, to), greatest yaw and roll either way, and whether the back may show.
VIEWS: dict[str, tuple[tuple[float, float], float, float, bool]] = {
    "bottle": ((8, 35), 70, 35, False),
    "bowl": ((18, 45), 180, 20, False),
    "camera": ((-5, 25), 40, 20, False),
    "can": ((12, 40), 70, 35, False),
    "cellphone": ((-20, 25), 35, 60, True),
    "jar": ((10, 35), 70, 35, False),
    "knife": ((-25, 25), 30, 180, True),
    "remote control": ((-10, 35), 35, 60, False),
}


def make_object(rng: Random, category: str, color_name: str) -> Mesh:
    """A new object of a category (a key of CATEGORIES) in a named colour (a key of COLORS)."""
    return CATEGORIES[category](rng, body_color(rng, color_name))


def view_rotation(rng: Random, category: str) -> np.ndarray:
    """Rotation [3, 3] that turns an object to the viewer as this category is usually seen."""
    (lowest, highest), yaw_limit, roll_limit, back = VIEWS[category]
    pitch = np.radians(rng.uniform(lowest, highest))
    yaw = np.radians(rng.uniform(-yaw_limit, yaw_limit)) + np.pi * (back and chance(rng, 0.5))
    roll = np.radians(rng.uniform(-roll_limit, roll_limit))
    return rotation([0, 0, 1], roll) @ rotation([1, 0, 0], pitch) @ rotation([0, 1, 0], yaw)
