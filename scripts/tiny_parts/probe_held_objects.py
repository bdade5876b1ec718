"""Measures what each image of HeldObjects tells: a small convolutional probe per kind of input.

    python scripts/tiny_parts/probe_held_objects.py               (about four minutes on two cores)
    python scripts/tiny_parts/probe_held_objects.py --train 1000 --test 200 --kinds original aligned

Builds the scenes where they are missing, trains one probe for every kind of input, prints a table
and writes it as JSON. The pair should beat both single images when category and colour must both
be right: the original shows the colour, the reconstruction the shape.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from PIL import Image
from tqdm import tqdm

from htfa_jax.common.cli import parse
from htfa_jax.data.held_objects import CATEGORIES, COLORS, build_scenes

KINDS = ("original", "reconstruction", "pair", "aligned")
Kind = tyro.extras.literal_type_from_choices(KINDS)
SIDE = 56  # pixels of a side that the probe sees
BATCH = 32
BUCKETS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Probe(nnx.Module):
    """Four strided convolutions, mean and max over the image, a linear layer for all answers."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        widths = (channels, 32, 64, 128, 128)
        self.convs = nnx.List(
            nnx.Conv(a, b, (3, 3), strides=2, rngs=rngs)
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nnx.List(nnx.GroupNorm(b, num_groups=8, rngs=rngs) for b in widths[1:])
        self.head = nnx.Linear(2 * widths[-1], len(CATEGORIES) + len(COLORS) + 2, rngs=rngs)

    def __call__(self, image_BHWC: jax.Array) -> dict[str, jax.Array]:
        x_BHWC = image_BHWC
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BHWC = nnx.relu(norm(conv(x_BHWC)))
        pooled = jnp.concatenate([x_BHWC.mean((1, 2)), x_BHWC.max((1, 2))], axis=-1)
        category, color, share, clear = jnp.split(self.head(pooled), (8, 16, 17), axis=-1)
        return {"category": category, "color": color, "share": share[:, 0], "clear": clear[:, 0]}


def align(reconstruction: Image.Image, box_orig: list[int], box_recon: list[int]) -> Image.Image:
    """The reconstruction moved and scaled so that its box lies on the original's."""
    (xo, yo, wo, ho), (xr, yr, wr, hr) = box_orig, box_recon
    x_scale, y_scale = wr / wo, hr / ho
    inverse = (x_scale, 0, xr - x_scale * xo, 0, y_scale, yr - y_scale * yo)
    size, affine = reconstruction.size, Image.Transform.AFFINE
    return reconstruction.transform(size, affine, inverse, Image.Resampling.BILINEAR)


def load(records_file: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Images uint8 [N, SIDE, SIDE, 3] by name, and labels [N] by question."""
    records = [json.loads(line) for line in records_file.read_text().splitlines()]
    images = {name: [] for name in ("original", "reconstruction", "aligned")}
    for record in records:
        original = Image.open(records_file.parent / record["image_orig"])
        reconstruction = Image.open(records_file.parent / record["image_recon"])
        aligned = align(reconstruction, record["bbox_orig"], record["bbox_recon"])
        for name, image in zip(images, (original, reconstruction, aligned), strict=True):
            images[name].append(image.resize((SIDE, SIDE), Image.Resampling.BOX))
    share = np.array([record["meta"]["occlusion"] for record in records], np.float32)
    labels = {
        "category": np.array([list(CATEGORIES).index(r["meta"]["category"]) for r in records]),
        "color": np.array([list(COLORS).index(r["meta"]["color"]) for r in records]),
        "share": share,
        "clear": (share < 0.5).astype(np.float32),
    }
    return {name: np.stack(shown) for name, shown in images.items()}, labels


def inputs(images: dict[str, np.ndarray], kind: str) -> np.ndarray:
    """What a probe of this kind sees, uint8 [N, SIDE, SIDE, 3 or 6]."""
    names = {"pair": ("original", "reconstruction"), "aligned": ("original", "aligned")}
    return np.concatenate([images[name] for name in names.get(kind, (kind,))], axis=-1)


def loss_fn(model: Probe, images: jax.Array, labels: dict[str, jax.Array]) -> jax.Array:
    """Sum of the four losses, each a mean over the batch."""
    out = model(images)
    choice = optax.softmax_cross_entropy_with_integer_labels
    share_loss = (jax.nn.sigmoid(out["share"]) - labels["share"]) ** 2
    clear_loss = optax.sigmoid_binary_cross_entropy(out["clear"], labels["clear"])
    choices = choice(out["category"], labels["category"]) + choice(out["color"], labels["color"])
    return (choices + 4 * share_loss + clear_loss).mean()


def to_float(images: np.ndarray) -> jax.Array:
    """uint8 images as floats in -1..1."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def train(images: np.ndarray, labels: dict[str, np.ndarray], epochs: int, seed: int) -> Probe:
    """A probe trained on images and labels, mirrored at random."""
    graph, params = nnx.split(Probe(images.shape[-1], rngs=nnx.Rngs(seed)))
    steps = epochs * (len(images) // BATCH)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 20, steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-2)

    @jax.jit
    def step(params, state, images, labels):
        gradients = jax.grad(lambda p: loss_fn(nnx.merge(graph, p), images, labels))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for number in tqdm(range(steps), desc="training", disable=not sys.stderr.isatty()):
        position = number % (len(images) // BATCH)
        if position == 0:
            order = rng.permutation(len(images))
        rows = order[position * BATCH : (position + 1) * BATCH]
        batch = images[rows]
        mirrored = rng.uniform(size=len(batch)) < 0.5
        batch[mirrored] = batch[mirrored, :, ::-1]
        chosen = {name: values[rows] for name, values in labels.items()}
        params, state = step(params, state, to_float(batch), chosen)
    return nnx.merge(graph, params)


def evaluate(model: Probe, images: np.ndarray, labels: dict[str, np.ndarray]) -> dict:
    """Accuracies, mean absolute error of the occlusion ratio, and accuracies by occlusion ratio."""
    answer = jax.jit(lambda images: model(images))
    parts = [answer(to_float(images[i : i + 100])) for i in range(0, len(images), 100)]
    out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    category = out["category"].argmax(-1) == labels["category"]
    color = out["color"].argmax(-1) == labels["color"]
    share_error = np.abs(jax.nn.sigmoid(out["share"]) - labels["share"])
    hits = {
        "category": category,
        "color": color,
        "both": category & color,
        "share_error": share_error,
        "clear": (out["clear"] > 0) == (labels["clear"] > 0.5),
    }
    result = {name: round(float(values.mean()), 4) for name, values in hits.items()}
    bucket = np.digitize(labels["share"], BUCKETS[1:-1])
    result["by_occlusion_ratio"] = {
        f"{low}-{high}": {
            name: round(float(hits[name][bucket == i].mean()), 4) for name in ("category", "color")
        }
        for i, (low, high) in enumerate(zip(BUCKETS[:-1], BUCKETS[1:], strict=True))
        if (bucket == i).any()
    }
    return result


@dataclasses.dataclass(frozen=True)
class ProbeArgs:
    """Options of the command."""

    data: Path | None = None  # folder of the scenes (default: a cache folder)
    train: int = 4000  # training scenes
    test: int = 500  # test scenes
    size: int = 112  # pixels of a scene's side
    epochs: int = 6  # over the training scenes
    seed: int = 0  # of the scenes and of the probes
    kinds: tuple[Kind, ...] = KINDS  # what a probe sees
    out: Path | None = None  # JSON file (default: probe.json beside the scenes)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see --help."""
    args = parse(ProbeArgs, argv, __doc__)
    cache = Path.home() / ".cache" / "htfa_jax" / "held_objects"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder = args.data or cache / f"seed{args.seed}-{args.size}px"
    sets = {}
    for split, num in (("train", args.train), ("test", args.test)):
        sets[split] = load(build_scenes(folder, split, num, image_size=args.size, seed=args.seed))
    results = {}
    for kind in args.kinds:
        (images, labels), (test_images, test_labels) = sets["train"], sets["test"]
        model = train(inputs(images, kind), labels, args.epochs, args.seed)
        results[kind] = evaluate(model, inputs(test_images, kind), test_labels)
        logging.info("%s: %s", kind, json.dumps(results[kind]))
    columns = ("category", "color", "both", "share_error", "clear")
    print(f"{'input':16}" + "".join(f"{column:>13}" for column in columns))
    for kind, result in results.items():
        print(f"{kind:16}" + "".join(f"{result[column]:13.3f}" for column in columns))
    out = args.out or folder / "probe.json"
    settings = {"train": args.train, "test": args.test, "epochs": args.epochs, "seed": args.seed}
    out.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
