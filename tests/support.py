"""A tiny model with all sizes different, random batches for it, and a tiny dataset on disk."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from htfa_jax.checkpoints.manager import open_checkpoints, save_frozen
from htfa_jax.common.param_paths import Flat, flatten, split
from htfa_jax.config import Config, override
from htfa_jax.config.io import SIZES, save_config
from htfa_jax.data.batch import Batch
from htfa_jax.data.records import EMBEDDED
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.data.splits import open_tokenizer
from htfa_jax.models.factory import Model, build_model
from htfa_jax.sharding import mesh
from htfa_jax.sharding.mesh import Backend
from htfa_jax.training.optim import frozen_pattern

GOLDEN = Path(__file__).parent / "golden"
# What no loss depends on: it adds the same to all logits of a query, and no softmax sees that.
KEYS_BIAS = "siglip.layers.attention.k_proj.bias"

# What the tests' model is like beside its sizes; no number a default, where a test compares.
CHOICES = {
    "vq.normalize_codes": True,
    "decoder.rope_theta": 5000.0,
    "decoder.rms_norm_eps": 1e-4,
    "level2.dropout": 0.0,
    "level3.adapter_dropout": 0.0,
    "optim.learning_rate": 1e-3,
    "optim.learning_rate_factors": (),
    "train.batch_size": 2,
    "train.accumulation_steps": 1,
    "train.dtype": "float32",
    "train.frozen_dtype": "float32",
    "train.remat": "none",
}

# A model of one layer that only answers, and completes no image: its runs take seconds.
WORDS_ONLY = {
    "decoder__num_layers": 1,
    "siglip__num_layers": 1,
    "level2__alignment": "none",
    "level3__generation": False,
    "loss__code_weight": 0.0,
}

# A record that nothing is wrong with, as a dataset holds it.
GOOD = {
    "id": "7",
    "image_orig": "a.jpg",
    "image_recon": "b.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?", "kind": "category"},
        {"from": "gpt", "value": "A cup."},
    ],
}


def compile_as_for(monkeypatch, backend: Backend) -> None:
    """Lets kernels choose their form as if the program were for another device."""
    monkeypatch.setattr(mesh, "backend", lambda: backend)


def tiny(**changes) -> Config:
    """The tiny configuration; dots in names are written as double underscores."""
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    return override(Config(), SIZES | CHOICES | changes)


def golden(name: str) -> dict[str, np.ndarray]:
    """Arrays of a file of reference vectors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def nhwc(x: np.ndarray) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, C]."""
    return x.transpose(0, 2, 3, 1)


def random_batch(config: Config, size: int = 3, length: int = 64, seed: int = 0) -> Batch:
    """Random samples, all images and masks there, boxes inside."""
    rng, side = np.random.default_rng(seed), config.image_size
    vocab = config.decoder.vocab_size

    def image() -> np.ndarray:
        return rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8)

    def blob() -> np.ndarray:
        corner, extent = (
            rng.integers(4, side // 3, (size, 2)),
            rng.integers(12, side // 2, (size, 2)),
        )
        grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1)
        inside = (grid >= corner[:, None, None]) & (grid < (corner + extent)[:, None, None])
        return inside.all(axis=-1)

    def boxes() -> np.ndarray:
        start, extent = (
            rng.integers(2, side // 3, (size, 2)),
            rng.integers(10, side // 2, (size, 2)),
        )
        return np.concatenate([start, extent], axis=1).astype(np.float32)

    region = np.tile(np.array([0, 0, side, side], np.float32), (size, 1))
    return Batch(
        image_orig=image(),
        image_recon=image(),
        image_target=image(),
        region_orig=region,
        region_recon=region.copy(),
        object_mask=blob(),
        occluder_mask=blob(),
        bbox_orig=boxes(),
        bbox_recon=boxes(),
        has_recon=np.ones(size, bool),
        has_target=np.ones(size, bool),
        has_object_mask=np.ones(size, bool),
        has_occluder_mask=np.ones(size, bool),
        has_bbox_orig=np.ones(size, bool),
        has_bbox_recon=np.ones(size, bool),
        tokens=rng.integers(0, vocab, (size, length), dtype=np.int32),
        labels=rng.integers(0, vocab, (size, length), dtype=np.int32),
        loss_mask=(rng.random((size, length)) < 0.4).astype(np.float32),
        weight=np.ones(size, np.float32),
        index=np.arange(size, dtype=np.int32),
    )


def taken_apart(module: nnx.Module) -> tuple[Model, Flat]:
    """Structure and weights of any module."""
    graphdef, state = nnx.split(module)
    flat = flatten(state)
    return Model(graphdef, flat), flat


def product_types(program: str) -> list[list[str]]:
    """Element types of the operands of each matmul in a lowered program's text."""
    operands = re.findall(r"dot_general.*: \((.*)\) ->", program)
    return [re.findall(r"tensor<[\dx]*x(\w+)>", both) for both in operands]


def count_matmuls(function, *arguments) -> int:
    """Matmuls in a function's program, those of the functions in it each time they are called."""

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            total += equation.primitive.name == "dot_general"
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    total += count(inner) if hasattr(inner, "eqns") else 0
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def random_weights(model: Model, seed: int = 0, scale: float = 0.3) -> Flat:
    """Random weights, none of them zero: where a test compares, everything must count."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> jax.Array:
        x = rng.standard_normal(shape)
        if path.endswith("scale"):
            return jnp.asarray(1 + 0.2 * x, jnp.float32)
        fan_in = np.prod(shape[-2:-1]) if len(shape) > 1 else 1
        return jnp.asarray(scale * x if len(shape) < 2 else x / np.sqrt(fan_in), jnp.float32)

    return {path: draw(path, s.shape) for path, s in model.shapes.items()}


def write_dataset(folder: Path, num: int, size: int = 48, seed: int = 0) -> Path:
    """A JSON-lines dataset of random images with every optional field; two questions each."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(num):
        for name in ("orig", "recon", "target"):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(
                folder / f"{name}{i}.png"
            )
        for name in ("mask", "hand"):
            mask = np.zeros((size, size), np.uint8)
            a = rng.integers(4, size // 2, 2)
            mask[a[0] : a[0] + size // 3, a[1] : a[1] + size // 3] = 255
            Image.fromarray(mask).save(folder / f"{name}{i}.png")
        color, share = rng.choice(["red", "blue"]), 10 * int(rng.integers(1, 9))
        turns = [
            ("human", "<image>\nWhat color is it?", "color"),
            ("gpt", str(color), None),
            ("human", "How much is hidden?", "occlusion_ratio"),
            ("gpt", f"{share} percent", None),
        ]
        lines.append(
            {
                "id": f"r{i}",
                "image_orig": f"orig{i}.png",
                "image_recon": f"recon{i}.png",
                "image_target": f"target{i}.png",
                "object_mask": f"mask{i}.png",
                "occluder_mask": f"hand{i}.png",
                "bbox_orig": [4, 5, 20, 22],
                "bbox_recon": [8, 6, 18, 30],
                "conversations": [
                    {"from": f, "value": v} | ({"kind": k} if k else {}) for f, v, k in turns
                ],
                "meta": {"occlusion": share / 100},
            }
        )
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_run(folder: Path, dataset: Path, **changes) -> Path:
    """A workdir as training leaves it, with random weights."""
    config = tiny(data__train=str(dataset), data__test=str(dataset), **changes)
    structure = build_model(config)
    params = random_weights(structure)
    if "decoder.head.kernel" in params:
        params["decoder.head.kernel"] *= 3  # answers that waver would differ by rounding
    frozen, trainable = split(params, frozen_pattern(config))
    folder.mkdir(exist_ok=True)
    save_config(config, folder / "config.json")
    open_tokenizer(config, folder, RecordFile(dataset))
    state = {"step": 7, "params": trainable, "opt_state": {"count": jnp.int32(7)}}
    with open_checkpoints(folder, config.train) as checkpoints:
        checkpoints.save(state, {"frozen": save_frozen(folder, config, frozen)})
    return folder


def write_kill_config(path: Path, dataset: Path) -> Path:
    """A run of words only that takes seconds, saves often and logs means across its saves."""
    config = tiny(
        data__train=str(dataset),
        data__validation=None,
        data__test=None,
        data__cache_dir=str(path.parent / "cache"),
        data__drop_recon=0.3,
        decoder__dropout=0.1,
        **WORDS_ONLY,
        train__max_steps=12,
        train__save_every=2,
        train__log_every=3,
    )
    save_config(config, path)
    return path


def write_whole_kill_config(path: Path) -> Path:
    """A run of all that a run can be doing when it is killed: on drawn scenes, with a VQ stage."""
    config = tiny(
        data__validation=EMBEDDED,
        data__test=EMBEDDED,
        data__cache_dir=str(path.parent / "cache"),
        data__cache_codes=True,
        data__drop_recon=0.3,
        decoder__dropout=0.1,
        decoder__num_layers=1,
        siglip__num_layers=1,
        vq_train__num_steps=6,
        vq_train__save_every=2,
        train__max_steps=8,
        train__save_every=3,
        train__log_every=1,
        eval__during_training="steps",
        eval__every=4,
        eval__batch_size=1,
        eval__panel_samples=1,
    )
    save_config(config, path)
    return path


# What a file may hold instead of a JSON object, each of which `json` answers in its own way.
DAMAGED_JSON = {
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "text": b'"x"',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "Latin-1": '{"a": "ü"}'.encode("latin-1"),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "half": b'{"a": ',
    "empty": b"",
    "zeros": b"\0" * 9,
    "half a character": b'{"a": "\\ud800"}',
}
