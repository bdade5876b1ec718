"""A hand that closes around an object and hides a wanted share of it.

Hand frame: fingers to +y, thumb to -x, back of the hand to +z, palm about the origin and 0.9 wide.
Hands come in batches of O, one for every place of the palm that the search tries.
"""

import dataclasses

import numpy as np

from htfa_jax.data.held_objects.capsules import Capsules, Part
from htfa_jax.data.held_objects.meshes import rotation
from htfa_jax.data.held_objects.render import FAR, image_points

SKINS = np.array([(238, 200, 172), (224, 176, 142), (198, 146, 108), (150, 102, 72), (98, 66, 48)])
SLEEVES = np.array([(70, 74, 84), (196, 192, 184), (52, 58, 78), (120, 108, 96)])

# Fingers from index to little, then the thumb: where they start, how they spread (radians, to +x),
# the lengths of their three bones and the radii at their four joints.
ROOTS = np.array([[-0.33, 0.40], [-0.11, 0.46], [0.11, 0.43], [0.32, 0.34], [-0.30, -0.28]])
SPREADS = np.array([-0.10, -0.02, 0.06, 0.15, -0.62])
BONES = np.array(
    [
        [0.36, 0.24, 0.19],
        [0.40, 0.27, 0.20],
        [0.37, 0.25, 0.19],
        [0.29, 0.19, 0.17],
        [0.40, 0.32, 0.25],
    ]
)
RADII = np.array(
    [
        [0.135, 0.115, 0.105, 0.085],
        [0.140, 0.120, 0.108, 0.088],
        [0.135, 0.115, 0.103, 0.085],
        [0.120, 0.100, 0.090, 0.075],
        [0.190, 0.145, 0.130, 0.105],
    ]
)
THUMB = 4
THUMB_TURNS = (0.0, 0.35, 0.25)  # radians: the thumb's bones turn back towards the fingers
WRIST = np.array([[-0.13, -0.55], [0.13, -0.55]])
ARM = np.array([[-0.16, -1.1], [0.16, -1.1], [0.0, -1.0], [0.0, -1.05], [0.0, -9.0]])

BENDS = 9  # angles tried for a joint, from its limit down
LAST_BEND = -0.25  # radians: the most a joint stretches backwards to stay in front of the object
PALM_HEIGHT = 0.11  # of the palm's middle above the object

PROBE_SIZE = 64  # the search sees the object at this resolution, whatever the image's
PROBE_POINTS = 200
OFFSETS = 26  # places tried along the fingers' direction
MAX_ATTEMPTS = 8
GOOD_ENOUGH = 0.025  # error in occlusion ratio that ends the search


@dataclasses.dataclass(frozen=True)
class Pose:
    """One hand before it is placed: size, orientation [3, 3], greatest bends [3, 5], colours."""

    scale: float
    orientation: np.ndarray
    limits: np.ndarray
    skin: np.ndarray
    sleeve: np.ndarray | None

    def in_plane(self, points: np.ndarray) -> np.ndarray:
        """Points [N, 2] of the hand's plane as they lie in the scene, from the palm: [N, 3]."""
        return points @ self.orientation[:, :2].T * self.scale


def draw_pose(
    rng: np.random.Generator, axes: np.ndarray, spreads: np.ndarray, share: float
) -> Pose:
    """A hand for an object whose outline has principal axes [2, 2] (rows, longest first)."""
    if spreads[0] > 1.6 * spreads[1]:
        # A small part of a long thing is held across, a large part only fits under a hand along it.
        across = share < 0.45
        angle = np.arctan2(axes[0, 1], axes[0, 0]) + (np.pi / 2 if across else 0)
        angle += rng.normal(0, 0.35 if across else 0.15)
        if np.sin(angle) < 0 and rng.uniform() < 0.85:
            angle += np.pi  # forearms rarely come from above
    else:
        angle = rng.uniform(-0.2, np.pi + 0.2)
    turn = rotation([0, 0, 1], angle - np.pi / 2)
    tilt = rotation([1, 0, 0], np.radians(rng.uniform(-12, 12)))
    roll = rotation([0, 1, 0], np.radians(rng.uniform(-20, 20)))
    mirror = np.diag([rng.choice([-1.0, 1.0]), 1, 1])
    relaxed = rng.uniform([0.5, 0.5, 0.3], [1.0, 1.2, 0.7])
    limits = relaxed[:, None] * rng.uniform(0.85, 1.15, (3, 5))
    limits[:, THUMB] *= 0.5
    size = 1.7 * np.sqrt(spreads[0] * spreads[1]) * rng.uniform(1.0, 1.4)
    return Pose(
        scale=float(np.clip(size * (1 + 0.5 * max(0.0, share - 0.5)), 0.4, 1.1)),
        orientation=turn @ tilt @ roll @ mirror,
        limits=limits,
        skin=SKINS[rng.integers(len(SKINS))] / 255 * rng.uniform(0.92, 1.06),
        sleeve=SLEEVES[rng.integers(len(SLEEVES))] / 255 if rng.uniform() < 0.5 else None,
    )


def depth_below(object_depth: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The object's depth at the image position of points [..., 3]."""
    cell = ((points[..., :2] * [1, -1] + 1) * (PROBE_SIZE / 2)).astype(int)
    inside = ((cell >= 0) & (cell < PROBE_SIZE)).all(-1)
    column, row = np.moveaxis(np.clip(cell, 0, PROBE_SIZE - 1), -1, 0)
    return np.where(inside, object_depth[row, column], FAR)


def rest_palm(pose: Pose, places: np.ndarray, object_depth: np.ndarray) -> np.ndarray:
    """Palms [O, 3] at places [O, 2], as deep as the object under the flat hand lets them."""
    pointing = np.stack([np.sin(SPREADS), np.cos(SPREADS)], axis=1)
    joints = ROOTS + pointing * np.cumsum(BONES, axis=1).T[..., None]
    middle = 0.5 * (ROOTS[:THUMB] + WRIST[0])
    spots = pose.in_plane(np.concatenate([ROOTS, WRIST, middle, joints.reshape(-1, 2)]))
    palm = np.concatenate([places, np.zeros((len(places), 1))], axis=1)
    touch = (depth_below(object_depth, palm[:, None] + spots) - spots[:, 2]).max(1)
    beside = np.median(object_depth[object_depth > FAR])
    palm[:, 2] = np.where(touch > FAR / 2, touch, beside) + PALM_HEIGHT * pose.scale
    return palm


def bend_fingers(
    pose: Pose, palm: np.ndarray, object_depth: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Four joints [O, 5, 3] of every finger, each bent until its bone meets the object.

    Beyond the object a finger meets nothing, so it bends around the object's edge. Also gives the
    direction of the last bones and of their backs, [O, 5, 3].
    """
    joints = [palm[:, None] + pose.in_plane(ROOTS)]
    bend, spread = np.zeros(joints[0].shape[:2]), SPREADS.copy()
    for bone in range(3):
        spread[THUMB] += THUMB_TURNS[bone]
        tries = bend[..., None] + np.linspace(pose.limits[bone], LAST_BEND, BENDS, axis=-1)
        x, y, z = np.sin(spread)[:, None], np.cos(spread)[:, None], np.sin(tries)
        along = np.stack([np.cos(tries) * x, np.cos(tries) * y, -z], -1) @ pose.orientation.T
        half = along * (0.5 * pose.scale * BONES[:, bone, None, None])
        slack = 0.6 * pose.scale * RADII[:, bone + 1, None]
        free = np.ones(tries.shape, bool)
        for point in (joints[-1][:, :, None] + half, joints[-1][:, :, None] + 2 * half):
            free &= point[..., 2] - slack > depth_below(object_depth, point)
        free[..., -1] = True
        first = free.argmax(-1)[..., None]
        bend = np.take_along_axis(tries, first, -1)[..., 0]
        joints.append(joints[-1] + 2 * np.take_along_axis(half, first[..., None], 2)[:, :, 0])
    along = np.take_along_axis(along, first[..., None], 2)[:, :, 0]
    back = np.stack([np.sin(bend) * x[:, 0], np.sin(bend) * y[:, 0], np.cos(bend)], -1)
    return joints, along, back @ pose.orientation.T


def close_hand(pose: Pose, places: np.ndarray, object_depth: np.ndarray) -> Capsules:
    """A batch of hands with their palms at places [O, 2] of the image, closed on the object.

    object_depth [P, P] is the object's depth on the probe grid, FAR where it is not.
    """
    size, skin = pose.scale, pose.skin
    palm = rest_palm(pose, places, object_depth)
    joints, along, back = bend_fingers(pose, palm, object_depth)
    wrist = [palm + side for side in pose.in_plane(WRIST)]
    parts: list[Part] = []

    def add(start: np.ndarray, end: np.ndarray, radii: tuple[float, float], color: np.ndarray):
        parts.append((start, end, radii[0] * size, radii[1] * size, color))

    for finger in range(THUMB):
        for side in wrist:
            add(side, joints[0][:, finger], (0.17, 1.05 * RADII[finger, 0]), skin)
    thumb_root = joints[0][:, THUMB]
    add(wrist[0], thumb_root, (0.17, RADII[THUMB, 0]), skin)
    add(thumb_root, joints[0][:, 0], (0.16, 0.12), skin)

    flush = skin * [1.01, 0.96, 0.95]
    nail = 0.55 * skin + 0.45 * np.array([1.0, 0.86, 0.82])
    for finger in range(len(ROOTS)):
        for bone in range(3):
            radii = RADII[finger, bone], RADII[finger, bone + 1]
            ends = joints[bone][:, finger], joints[bone + 1][:, finger]
            add(*ends, radii, skin if bone < 2 else flush)
        radius = RADII[finger, 3]
        bed = joints[3][:, finger] + back[:, finger] * (0.5 * radius * size)
        length = along[:, finger] * (radius * size)
        add(bed - 0.75 * length, bed + 0.25 * length, (0.6 * radius, 0.62 * radius), nail)

    *elbow, cuff, hem, far = (palm + spot for spot in pose.in_plane(ARM))
    for side, end in zip(wrist, elbow, strict=True):
        add(side, end, (0.18, 0.19), skin)
    if pose.sleeve is None:
        add(cuff, far, (0.30, 0.75), skin)
    else:
        add(cuff, far, (0.36, 1.0), pose.sleeve)
        add(cuff, hem, (0.38, 0.38), 0.85 * pose.sleeve)
    return Capsules.of(parts)


def grip(
    rng: np.random.Generator, object_depth: np.ndarray, share: float
) -> tuple[Capsules, float]:
    """A hand that hides about `share` of an object, and the hand's scale.

    object_depth [P, P] is the object's depth on the probe grid, FAR where it is not.
    """
    points = image_points(PROBE_SIZE)[object_depth.ravel() > FAR]
    thin = slice(None, None, max(1, len(points) // PROBE_POINTS))
    some, depth = points[thin], object_depth[object_depth > FAR][thin]
    centre = points.mean(0)
    variances, columns = np.linalg.eigh(np.cov(points.T))
    spreads, axes = np.sqrt(variances[::-1]), columns.T[::-1]
    best_error, best = np.inf, None
    for attempt in range(MAX_ATTEMPTS):
        pose = draw_pose(rng, axes, spreads, share)
        pose = dataclasses.replace(pose, scale=min(pose.scale * (1 + 0.12 * attempt), 1.2))
        pointing = pose.orientation[:2, 1] / np.hypot(*pose.orientation[:2, 1])
        across = np.array([-pointing[1], pointing[0]])
        extent = np.abs((points - centre) @ pointing).max()
        slide = np.linspace(-extent - 1.2 * pose.scale, 0.3 * extent, OFFSETS)
        aside = rng.uniform(-0.8, 0.8) * np.std(points @ across)
        places = centre + aside * across + (slide + rng.uniform(0, 0.03))[:, None] * pointing
        hands = close_hand(pose, places, object_depth)
        error = np.abs((hands.depth(some) > depth).mean(-1) - share)
        if error.min() < best_error:
            best_error, best = error.min(), (hands.member(error.argmin()), pose.scale)
        if best_error < GOOD_ENOUGH:
            break
    return best
