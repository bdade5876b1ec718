"""Measures the pretrained components of this package, and what a run completes, on unseen scenes.

    python scripts/tiny_parts/measure.py --run runs/x

SigLIP: zero-shot names by its text tower (in transformers, `pip install -e '.[convert]'`), and a
linear probe (ridge regression on the mean of the patches). VQ: round trip and codes in use.
Language model: perplexity on conversations that it has not read. A run: how often a convolutional
probe, trained on targets, names the category in completed images; beside it the same probe on
targets, on the VQ's round trips of them, on originals, and on originals with a flat fill.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import probe_held_objects as probe
import tiny_decoder
import tiny_siglip
import tiny_text
from flax import nnx
from PIL import Image

from htfa_jax.checkpoints.weights import read_weights
from htfa_jax.common import param_paths
from htfa_jax.common.cli import command, parse, use_compilation_cache
from htfa_jax.config import Config, load_config, override
from htfa_jax.data.decode import decode_field, load_image
from htfa_jax.data.masks import load_mask
from htfa_jax.data.records import Dataset, Record
from htfa_jax.data.splits import open_split
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.inference.engine import HTFAInference
from htfa_jax.models.factory import Model
from htfa_jax.models.internlm2 import InternLM2
from htfa_jax.sharding.layout import Layout
from htfa_jax.training import vq_stage
from weights_convert.on_demand import tiny, with_weights

RIDGE = 1e-2  # of the linear probe, relative to the mean square of a feature
BATCHES = 20  # of conversations


@dataclasses.dataclass(frozen=True)
class MeasureArgs:
    """Measures the tiny parts, and a run's completed images."""

    run: Path | None = None  # a run or export that completes; none leaves this out
    probe_epochs: int = 6  # of the convolutional probe on 4,000 targets
    output: Path | None = None  # JSON file for the figures


def images(records: Dataset, field: str) -> np.ndarray:
    """A field's images, uint8 [N, H, W, 3]."""
    return np.stack([np.asarray(decode_field(r, field, load_image)) for r in every(records)])


def every(records: Dataset) -> list[Record]:
    """All records."""
    return [records[i] for i in range(len(records))]


def labels(records: Dataset, group: str) -> np.ndarray:
    """Number of each record's category or colour [N]."""
    return np.array([tiny_text.GROUPS[group].index(r.meta[group]) for r in every(records)])


def siglip_scores(train: Dataset, test: Dataset) -> dict[str, float]:
    """Zero-shot and linear-probe accuracy by kind of image."""
    import torch
    from tokenizers import Tokenizer
    from transformers import SiglipModel

    model = SiglipModel.from_pretrained(tiny("siglip"), dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(tiny("siglip") / "tokenizer.json"))

    @torch.no_grad()
    def see(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors and means of patches."""
        pooled, means = [], []
        for part in np.array_split(batch, -(-len(batch) // 100)):
            pixels = torch.from_numpy(part).permute(0, 3, 1, 2) / 127.5 - 1
            out = model.vision_model(pixel_values=pixels)
            pooled.append(torch.nn.functional.normalize(out.pooler_output, dim=-1))
            means.append(out.last_hidden_state.mean(dim=1))
        return torch.cat(pooled).numpy(), torch.cat(means).numpy()

    scores = {}
    fields = {"original": "image_orig", "target": "image_target", "reconstruction": "image_recon"}
    for kind, field in fields.items():
        _, seen_ND = see(images(train, field))
        unit_ND, test_ND = see(images(test, field))
        for group in ("category", "color"):
            if group not in tiny_text.KNOWN[kind]:
                continue
            words = [tiny_text.name(group, value) for value in tiny_text.GROUPS[group]]
            ids = np.stack([tiny_siglip.caption_tokens(tokenizer, text) for text in words])
            with torch.no_grad():
                text = model.text_model(input_ids=torch.from_numpy(ids)).pooler_output
            named = (unit_ND @ torch.nn.functional.normalize(text, dim=-1).numpy().T).argmax(-1)
            truth = labels(test, group)
            scores[f"{kind} {group} zero-shot"] = float((named == truth).mean())
            found = linear_probe(seen_ND, labels(train, group), test_ND)
            scores[f"{kind} {group} linear probe"] = float((found == truth).mean())
    return scores


def linear_probe(seen_ND: np.ndarray, label_N: np.ndarray, test_ND: np.ndarray) -> np.ndarray:
    """Classes of test vectors by ridge regression on one-hot labels."""
    mean, scale = seen_ND.mean(axis=0), seen_ND.std(axis=0) + 1e-6
    x_ND, y_ND = (np.pad((x - mean) / scale, ((0, 0), (0, 1)), constant_values=1)
                  for x in (seen_ND, test_ND))  # fmt: skip
    penalty = RIDGE * len(x_ND) * np.eye(x_ND.shape[1])
    one_hot_NC = np.eye(label_N.max() + 1)[label_N]
    return (y_ND @ np.linalg.solve(x_ND.T @ x_ND + penalty, x_ND.T @ one_hot_NC)).argmax(-1)


def vq_of(config: Config) -> tuple[Model, Mapping[str, np.ndarray]]:
    """The tiny tokenizer: structure and float32 weights."""
    weights = read_weights(Path(config.pretrained.vq))
    return vq_stage.build_vq(config), {k: np.asarray(v, np.float32) for k, v in weights.items()}


def decoder_scores(config: Config) -> dict[str, float]:
    """Perplexity and next-token accuracy on made-up conversations of another seed."""
    folder = Path(config.pretrained.decoder)
    tokenizer, dtype = ChatTokenizer(folder), jnp.dtype("float32")
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: InternLM2(config.decoder, dtype=dtype, rngs=nnx.Rngs(0)))
    )
    weights = {k: np.asarray(v, np.float32) for k, v in read_weights(folder).items()}
    model = nnx.merge(graphdef, param_paths.unflatten(weights))
    batches = tiny_decoder.token_batches(override(config, {"seed": 2024}), tokenizer, 0, 32)
    look = jax.jit(lambda batch: tiny_decoder.loss(model, batch))
    found = [look(next(batches).batch) for _ in range(BATCHES)]
    return {
        "perplexity": float(np.exp(np.mean([loss for loss, _ in found]))),
        "accuracy": float(np.mean([metrics["accuracy"] for _, metrics in found])),
    }


def completion_scores(
    args: MeasureArgs, config: Config, train: Dataset, test: Dataset
) -> dict[str, float]:
    """How often a probe that was trained on targets names the category, by what it is shown."""

    def small(several: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        side = (probe.SIDE, probe.SIDE)
        shown = [x if isinstance(x, Image.Image) else Image.fromarray(x) for x in several]
        return np.stack([np.asarray(x.resize(side, Image.Resampling.BOX)) for x in shown])

    def answers(records: Dataset) -> dict[str, np.ndarray]:
        share = np.array([r.meta["occlusion"] for r in every(records)], np.float32)
        clear = (share < 0.5).astype(np.float32)
        names = {group: labels(records, group) for group in ("category", "color")}
        return {**names, "share": share, "clear": clear}

    seen = small(images(train, "image_target"))
    model = probe.train(seen, answers(train), args.probe_epochs, seed=0)
    engine = HTFAInference.from_pretrained(args.run)
    vq, weights = vq_of(config)
    round_trip = jax.jit(lambda x: vq.merge(weights).decode(vq.merge(weights).encode(x)))
    targets, originals = images(test, "image_target"), images(test, "image_orig")
    decoded = [
        np.asarray(round_trip(part.astype(np.float32) / 127.5 - 1))
        for part in np.array_split(targets, 10)
    ]
    filled = originals.copy()
    for one, record in zip(filled, every(test), strict=True):
        covered = np.asarray(decode_field(record, "occluder_mask", load_mask)) > 127
        one[covered] = one[~covered].mean(axis=0)
    completed = engine.batch_infer(
        [dataclasses.replace(r, turns=()) for r in every(test)], batch_size=20
    )
    shown = {
        "targets": targets,
        "round trips": np.clip((np.concatenate(decoded) + 1) * 127.5, 0, 255).astype(np.uint8),
        "completed by the model": [r.completed for r in completed],
        "covered pixels filled with the mean colour": filled,
        "originals": originals,
    }
    return {
        name: probe.evaluate(model, small(several), answers(test))["category"]
        for name, several in shown.items()
    }


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(MeasureArgs, argv, __doc__)
    preset = load_config("debug")
    config = with_weights(preset, preset)
    use_compilation_cache()
    train, test = open_split(config, "train"), open_split(config, "test")
    layout = Layout(config)
    scores = {
        "SigLIP": siglip_scores(train, test),
        "VQ": vq_stage.evaluate(config, *vq_of(config), test, layout),
        "language model": decoder_scores(config),
    }
    if args.run is not None:
        scores["category by a probe"] = completion_scores(args, config, train, test)
    for part, figures in scores.items():
        print(f"\n{part}")
        for name, value in figures.items():
            print(f"  {name:45} {value:.3f}")
    if args.output is not None:
        args.output.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
