"""The scenes of the fixtures: who stands where in which frame, and what is true of each frame.

A table with one or two objects and a hand before eight cameras. Four takes: objects that hide each
other, a hand that comes, grasps and covers, an object that leaves the scene (no pose), objects cut
by the border. The writers of the data sets take all they write from here.
"""

import dataclasses
import functools

import numpy as np
from drawn_meshes import ycb_like
from exact_renderer import Seen, View, see_capsules, see_mesh

MESHES = ycb_like()
YCB_IDS = {"003_cracker_box": 2, "005_tomato_soup_can": 5, "010_potted_meat_can": 9, "025_mug": 14}
CATEGORIES = {name: name[4:].replace("_", " ") for name in YCB_IDS}
HAND = 255
SKIN = (205, 160, 135)
# The eight cameras of DexYCB, by their serial numbers.
SERIALS = (
    "836212060125", "839512060362", "840412060917", "841412060263",
    "932122060857", "932122060861", "932122061900", "932122062010",
)  # fmt: skip


def turned(axis, degrees):
    """Rotation matrix by Rodrigues' formula."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(degrees)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


@dataclasses.dataclass(frozen=True, eq=False)
class Camera:
    """`view`, and the camera's frame in the world: x_camera = rotation @ x_world + translation."""

    serial: str
    view: View
    rotation: np.ndarray
    translation: np.ndarray

    def pose(self, pose):
        """A pose in the world, (rotation, translation), as one in this camera."""
        return self.rotation @ pose[0], self.rotation @ pose[1] + self.translation


def _camera(number):
    around, up = np.deg2rad(45 * number + 10), np.deg2rad((28, 52, 38, 60, 33, 47, 25, 56)[number])
    place = np.array([0, 0, 0.08]) + 0.85 * np.array(
        [np.cos(around) * np.cos(up), np.sin(around) * np.cos(up), np.sin(up)]
    )
    forward = (np.array([0.01, -0.02, 0.08]) - place) / 0.85
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    view = View(612.1 + number, 611.7 + 0.5 * number, 316.3 + 1.3 * number, 243.9 - 1.1 * number)
    return Camera(SERIALS[number], view, rotation, -rotation @ place)


CAMERAS = tuple(_camera(number) for number in range(8))


def grasping_hand(points, side, up):
    """Rounded segments of a hand that holds what has these points [N, 3], and of its arm.

    The fingers lie around the object, a finger's thickness before its surface, not in it.
    """
    side, up = np.asarray(side, float), np.asarray(up, float)
    side, up = side / np.linalg.norm(side), up - side * (up @ side) / (side @ side)
    up /= np.linalg.norm(up)
    front = np.cross(side, up)
    at = (points.min(0) + points.max(0)) / 2
    reach, before, behind = (((points - at) @ way).max() for way in (side, front, -front))
    palm = at + side * (reach + 0.025)
    parts = [(palm - up * 0.03, palm + up * 0.035, 0.024)]
    for k in range(4):
        rise = up * (0.04 - 0.024 * k)
        joints = [
            palm + rise,
            palm + rise + front * (before + 0.0095),
            at + rise + front * (before + 0.0095) + side * 0.012,
            at + rise + front * (before + 0.009) - side * 0.023,
        ]
        parts += [(*ends, 0.009) for ends in zip(joints[:-1], joints[1:], strict=True)]
    away = -front * (behind + 0.0115) + up * 0.02
    parts += [(palm, palm + away, 0.011), (palm + away, at + away - side * 0.01, 0.011)]
    parts.append((palm, palm + side * 0.32 - up * 0.02, 0.03))
    return parts


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """The world at one moment: poses {name: (rotation, translation)}, and the hand's parts."""

    poses: dict
    hand: list | None = None
    grasped: bool = False


@dataclasses.dataclass(frozen=True)
class Take:
    """One sequence: which objects are on the table, which is grasped, the state of each frame."""

    subject: int  # from 1
    sequence: int  # of the subject's hundred, from 0
    objects: tuple
    held: str
    states: tuple

    def frame(self, camera, number):
        return _frame(camera, self.states[number], self.objects)


@functools.lru_cache(maxsize=256)
def _frame(camera, state, objects):
    """What a camera sees of a state; drawn once, however many frames it lasts."""
    poses = {
        name: camera.pose(state.poses[name]) if name in state.poses else None for name in objects
    }
    hand = state.hand and [
        (camera.rotation @ a + camera.translation, camera.rotation @ b + camera.translation, r)
        for a, b, r in state.hand
    ]
    return Frame(camera.view, poses, hand, seed=SERIALS.index(camera.serial))


@functools.lru_cache(maxsize=256)
def _see(name, view, rotation, translation):
    """An object alone; what stands still is drawn once for each camera."""
    return see_mesh(MESHES[name], view, rotation, translation)


class Frame:
    """What a camera sees: `poses` {name: (rotation, translation) or None}, all in its frame."""

    def __init__(self, view, poses, hand, seed):
        self.view, self.poses, self.hand, self.seed = view, poses, hand, seed

    @functools.cached_property
    def seen(self) -> dict[str, Seen]:
        return {
            name: _see(name, self.view, tuple(map(tuple, pose[0])), tuple(pose[1]))
            for name, pose in self.poses.items()
            if pose is not None
        }

    @functools.cached_property
    def layers(self):
        """Depth [H, W], name of what is seen as an index into `order` or -1, photograph."""
        view = self.view
        depth = np.full((view.height, view.width), np.inf)
        label = np.full(depth.shape, -1)
        photo = background(self.seed, view.height, view.width).copy()
        things = list(self.seen.items())
        if self.hand:
            things.append(("hand", see_capsules(self.hand, view, SKIN)))
        for index, (_, seen) in enumerate(things):
            z = seen.inside(view, "depth")
            nearer = seen.inside(view, "mask") & (z < depth)
            depth[nearer], label[nearer] = z[nearer], index
            photo[nearer] = seen.inside(view, "rgb")[nearer]
        order = [name for name, _ in things]
        return depth, label, np.clip(np.rint(photo), 0, 255).astype(np.uint8), order

    @property
    def photo(self):
        return self.layers[2]

    @property
    def depth(self):
        """Metres along z; the table and the wall are not measured: 0."""
        return np.where(np.isfinite(self.layers[0]), self.layers[0], 0)

    def visible(self, name):
        _, label, _, order = self.layers
        return label == order.index(name) if name in order else np.zeros(label.shape, bool)

    def whole(self, name):
        """The object's silhouette inside the image, hidden part included."""
        return self.seen[name].inside(self.view, "mask")

    def occlusion(self, name):
        whole = self.whole(name)
        return 1 - (whole & self.visible(name)).sum() / whole.sum()

    def touches(self, name):
        """Whether a pixel of the hand is beside one of the object."""
        one, two = np.pad(self.visible(name), 1), np.pad(self.visible("hand"), 1)
        return any((one & np.roll(two, step, axis)).any() for axis in (0, 1) for step in (-1, 1))

    def segmentation(self, ids):
        """DexYCB's `seg`: {name: id} where objects are seen, 255 for the hand, else 0."""
        seg = np.zeros((self.view.height, self.view.width), np.uint8)
        for name, number in ids.items():
            seg[self.visible(name)] = number
        seg[self.visible("hand")] = HAND
        return seg


@functools.lru_cache
def background(seed, height, width):
    """A textured wall and table: float [H, W, 3]."""
    rng = np.random.default_rng(100 + seed)
    coarse = rng.uniform(60, 190, (height // 40 + 2, width // 40 + 2, 3))
    rows, columns = np.arange(height) / 40, np.arange(width) / 40
    i, j = rows.astype(int), columns.astype(int)
    fi, fj = (rows - i)[:, None, None], (columns - j)[None, :, None]
    left = coarse[i][:, j] * (1 - fi) + coarse[i + 1][:, j] * fi
    right = coarse[i][:, j + 1] * (1 - fi) + coarse[i + 1][:, j + 1] * fi
    grain = rng.normal(0, 4, (height // 2, width // 2, 1)).repeat(2, 0).repeat(2, 1)
    return left * (1 - fj) + right * fj + grain


def _standing(name, x, y, yaw, lift=0.0, axis=(0, 0, 1), lean=0.0):
    """A pose in the world with the mesh's lowest point on the table, lifted and leant then."""
    rotation = turned(axis, lean) @ turned((0, 0, 1), yaw)
    points = MESHES[name].vertices @ rotation.T
    middle = (points.min(0) + points.max(0)) / 2
    return rotation, np.array([x - middle[0], y - middle[1], lift - points[:, 2].min()])


def _held(name, pose, side, up):
    return grasping_hand(MESHES[name].vertices @ pose[0].T + pose[1], side, up)


def _takes():
    box, soup, meat, mug = MESHES
    resting = {box: _standing(box, 0, 0, 25), soup: _standing(soup, 0.02, 0.16, 200)}
    lifted = _standing(box, -0.02, 0.03, 40, lift=0.08, axis=(1, 0.3, 0), lean=25)
    tilted = _standing(box, 0.03, 0.0, 120, lift=0.05, axis=(0.2, 1, 0), lean=-35)
    hold = functools.partial(_held, box, up=(0.2, 0, 1))
    before = State(resting)
    grasp = State(resting | {box: lifted}, hold(lifted, side=(1, -0.5, 0.25)), True)
    turn = State(resting | {box: tilted}, hold(tilted, side=(-0.3, -1, 0.3)), True)
    gone = State({soup: resting[soup]}, hold(tilted, side=(-0.3, -1, 0.3)))
    first = Take(1, 0, (box, soup), box, (before, before, grasp, gone, grasp, turn))

    up = _standing(soup, 0.05, -0.04, 80, lift=0.06, axis=(1, 1, 0), lean=30)
    second = Take(
        1, 16, (box, soup), soup,
        (State({box: _standing(box, -0.1, 0.02, 70), soup: up},
               _held(soup, up, (1, 0.2, 0.3), (0, 0, 1)), True),),
    )  # fmt: skip

    far = _standing(mug, 0.27, 0.22, 130, lift=0.04, axis=(0, 1, 0), lean=20)
    third = Take(
        1, 35, (meat, mug), mug,
        (State({meat: _standing(meat, 0.2, 0.31, 15), mug: far},
               _held(mug, far, (0.2, 1, 0.3), (0, 0, 1)), True),),
    )  # fmt: skip

    rest = {meat: _standing(meat, 0.0, -0.05, 60), mug: _standing(mug, -0.06, 0.1, 300)}
    taken = _standing(meat, 0.02, -0.02, 20, lift=0.09, axis=(1, 0, 0), lean=40)
    coming = State(
        rest,
        _held(meat, (np.eye(3), np.array([0.1, -0.3, -0.02])), (0.4, -1, 0.1), (0, 0, 1)),
    )
    fourth = Take(
        3, 4, (meat, mug), meat,
        (*(coming,) * 5,
         State(rest | {meat: taken}, _held(meat, taken, (-1, 0.3, 0.4), (0, 0.2, 1)), True)),
    )  # fmt: skip
    return {"first": first, "second": second, "third": third, "fourth": fourth}


TAKES = _takes()
