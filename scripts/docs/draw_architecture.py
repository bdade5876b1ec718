"""Draws the data flow of a configuration; sizes and parameters are read off the model itself.

    python scripts/docs/draw_architecture.py --config standard --output docs/architecture.svg

Shapes come from `jax.eval_shape` of the real model, so nothing is allocated. The small images are
an example scene of the demo model and what it makes of it.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from PIL import Image

from htfa_jax.checkpoints.runs import DEMO, EXAMPLES
from htfa_jax.common.cli import command, parse
from htfa_jax.config import Config, get, load_config, override
from htfa_jax.errors import ConfigError
from htfa_jax.inference.engine import HTFAInference
from htfa_jax.models.factory import build_model
from htfa_jax.models.htfa import HTFA
from htfa_jax.models.registration import register
from htfa_jax.training.optim import frozen_pattern
from htfa_jax.training.plan import abstract_batch

WIDTH, HEIGHT = 1560, 780
FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "'JetBrains Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
INK, SOFT, LINE = "#1b2733", "#5b6b7a", "#8a99a8"
# Of each part of the flow: its panel and its boxes.
TINTS = {
    "level1": ("#fdf1dd", "#b3700c"),
    "encoders": ("#eef2f6", "#6f8599"),
    "level2": ("#e6f4f1", "#2f9c86"),
    "level3": ("#f3ecf9", "#8d5bb5"),
    "decoder": ("#e8effa", "#3c6fb8"),
}
SHOWN = 96  # pixels of the small images


def shapes(config: Config, length: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what flows through the model, by name, without the batch axis.

    Args:
      config: of the run; it must have codes, text and a VQ decoder.
      length: tokens of text.
    """
    structure = build_model(config)

    def flow(params, batch):
        model: HTFA = structure.merge(params)
        pair = register(batch, config)
        fusion = model.fuse(batch)
        encoder = model.vq.encoder if config.is_frozen("vq") else model.vq_encoder
        vectors_BME, codes_BM = model.vq.straight_through(encoder(fusion.fused_BHWC))
        understood = model.level3.understand(fusion.spatial_BPD)
        generated = model.level3.generate(vectors_BME)
        text_BLD = model.decoder.embed(batch.tokens)
        sequence = jax.numpy.concatenate([understood, generated, text_BLD], axis=1)
        hidden_BTD, _ = model.decode(sequence, 0)
        start, end = understood.shape[1], sequence.shape[1] - length
        return {
            "image": pair.orig_BHWC,
            "alpha": fusion.alpha_BHW,
            "features": model.siglip(pair.orig_BHWC),
            "spatial": fusion.spatial_BPD,
            "codes": codes_BM,
            "vectors": vectors_BME,
            "understanding": understood,
            "generation": generated,
            "text_logits": model.decoder.logits(hidden_BTD[:, end:]),
            "code_logits": model.level3.code_logits(hidden_BTD[:, start:end]),
        }

    found = jax.eval_shape(flow, structure.shapes, abstract_batch(config, 1, length))
    return {name: x.shape[1:] for name, x in found.items()}


def parameters(config: Config) -> dict[str, tuple[int, bool]]:
    """{part: (number of its parameters, whether they are frozen)}."""
    parts = {
        "level1": r"level1\..*",
        "siglip": r"siglip\..*",
        "level2": r"level2\..*",
        "vq_encoder": r"vq\.(encoder|codebook).*",
        "vq_decoder": r"vq\.decoder.*",
        "understand": r"level3\.adapter_understand\..*",
        "generate": r"level3\.adapter_generate\..*",
        "code_head": r"level3\.head_generate\..*",
        "embedding": r"decoder\.embed\..*",
        "lm_head": r"decoder\.head\..*",
        "blocks": r"decoder\.(?!embed|head).*",
    }
    all_shapes, frozen = build_model(config).shapes, frozen_pattern(config)
    found = {}
    for part, pattern in parts.items():
        inside = [path for path in all_shapes if re.fullmatch(pattern, path)]
        number = sum(math.prod(all_shapes[path].shape) for path in inside)
        found[part] = number, all(re.fullmatch(frozen, path) for path in inside)
    return found


def labels(config: Config, length: int = 128) -> dict[str, str]:
    """Everything that the drawing says of a configuration, by place."""
    sizes, counted = shapes(config, length), parameters(config)

    def size(name: str) -> str:
        return " × ".join(f"{n:,}" for n in sizes[name])

    def weight(part: str) -> str:
        number, frozen = counted[part]
        return f"{short(number)}, {'frozen' if frozen else 'trained'}"

    drawn = ("image", "alpha", "features", "spatial", "codes", "vectors", "code_logits")
    said = {f"size {name}": size(name) for name in drawn}
    said["size text_logits"] = f"L × {sizes['text_logits'][-1]:,}"
    said |= {f"weight {part}": weight(part) for part in counted}
    said |= {f"tokens {name}": f"{sizes[name][0]:,}" for name in ("understanding", "generation")}
    said["blocks"] = f"{config.decoder.num_layers} blocks, {config.decoder.embed_dim:,} wide"
    said["siglip"] = f"{config.siglip.num_layers} blocks, patches of {config.siglip.patch_size}"
    said["level2"] = f"{config.level2.num_heads} heads"
    said["loss text"] = f"{config.loss.text_weight:g} × cross-entropy, next token"
    said["loss codes"] = f"{config.loss.code_weight:g} × cross-entropy, codes of the target"
    return said


def short(number: int) -> str:
    """428 M, 3.2 M, 200 k."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            value = number / unit
            return f"{value:.0f} {name}" if value >= 10 else f"{value:.1f} {name}"
    return str(number)


class Drawing:
    """An SVG, put together from top to bottom."""

    def __init__(self, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'role="img" font-family="{FONT}">',
            f"<title>{html.escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="8.5" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto-start-reverse">'
            f'<path d="M0 0.8 L9 5 L0 9.2 Z" fill="{LINE}"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="18" fill="#ffffff"/>',
        ]

    def text(
        self, x: float, y: float, words: str, size: float = 13, color: str = INK, **how: str
    ) -> None:
        """Words at a place; `how` has attributes with _ for -."""
        more = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in how.items())
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}"{more}>'
            f"{html.escape(words)}</text>"
        )

    def panel(self, x: float, y: float, w: float, h: float, part: str, title: str) -> None:
        """The ground of a part of the flow."""
        ground, strong = TINTS[part]
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="16" fill="{ground}"/>'
        )
        self.text(x + 14, y + 27, title, 13, strong, font_weight="700")

    def box(
        self, x: float, y: float, w: float, h: float, part: str, lines: list[str], frozen: bool
    ) -> None:
        """A module: its name, then what is to say of it. Frozen ones have a dashed rim."""
        strong = TINTS[part][1]
        dash = ' stroke-dasharray="5 4"' if frozen else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="10" fill="#ffffff" '
            f'stroke="{strong}" stroke-width="1.8"{dash}/>'
        )
        top = y + h / 2 - (len(lines) - 1) * 9.5 + 5
        for i, line in enumerate(lines):
            first = i == 0
            self.text(
                x + w / 2,
                top + 19 * i,
                line,
                14 if first else 11.5,
                INK if first else SOFT,
                text_anchor="middle",
                font_weight="650" if first else "400",
            )

    def arrow(self, *points: tuple[float, float], tip: bool = True) -> None:
        """A line through points, with round corners."""
        path = [f"M{points[0][0]} {points[0][1]}"]
        for before, at, after in zip(points, points[1:], points[2:], strict=False):
            path.append(f"L{_towards(at, before)} Q{at[0]} {at[1]} {_towards(at, after)}")
        path.append(f"L{points[-1][0]} {points[-1][1]}")
        end = ' marker-end="url(#tip)"' if tip else ""
        self.parts.append(
            f'<path d="{" ".join(path)}" fill="none" stroke="{LINE}" stroke-width="1.7"{end}/>'
        )

    def size(self, x: float, y: float, words: str, anchor: str = "middle") -> None:
        """The shape of what an arrow carries."""
        self.text(x, y, words, 11, SOFT, text_anchor=anchor, font_family=MONO)

    def image(self, x: float, y: float, shown: Image.Image, title: str) -> None:
        """A small image with its name above it."""
        buffer = io.BytesIO()
        shown.convert("RGB").resize((2 * SHOWN, 2 * SHOWN), Image.Resampling.LANCZOS).save(
            buffer, format="jpeg", quality=80
        )
        content = base64.b64encode(buffer.getvalue()).decode()
        self.text(x + SHOWN / 2, y - 9, title, 13, text_anchor="middle", font_weight="650")
        self.parts.append(
            f'<image x="{x}" y="{y}" width="{SHOWN}" height="{SHOWN}" '
            f'href="data:image/jpeg;base64,{content}"/>'
            f'<rect x="{x}" y="{y}" width="{SHOWN}" height="{SHOWN}" rx="3" fill="none" '
            f'stroke="{LINE}"/>'
        )

    def bar(self, x: float, y: float, w: float, h: float, color: str, words: list[str]) -> None:
        """A stretch of the decoder's sequence."""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{color}" rx="4"/>')
        for i, line in enumerate(words):
            self.text(
                x + w / 2,
                y + h / 2 + 5 + 16 * (i - (len(words) - 1) / 2),
                line,
                12 if i == 0 else 11,
                "#ffffff",
                text_anchor="middle",
                font_weight="650" if i == 0 else "400",
            )

    def svg(self) -> str:
        """The whole drawing."""
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def _towards(at: tuple[float, float], other: tuple[float, float], radius: float = 9) -> str:
    distance = math.dist(at, other)
    part = min(radius, distance / 2) / max(distance, 1e-9)
    return " ".join(f"{a + (b - a) * part:.1f}" for a, b in zip(at, other, strict=True))


def draw(config: Config, scene: dict[str, Image.Image], question: str, answer: str) -> str:
    """The drawing.

    Args:
      config: of the run.
      scene: images "original", "reconstruction", "fused", "completed".
      question: about the scene.
      answer: of the model.
    """
    say, counted = labels(config), parameters(config)
    art = Drawing("Data flow of HTFA")
    frozen = {part: still for part, (_, still) in counted.items()}

    art.panel(176, 60, 176, 420, "level1", "Level 1 · fusion")
    art.panel(376, 60, 232, 590, "encoders", "Encoders")
    art.panel(632, 60, 214, 420, "level2", "Level 2 · attention")
    art.panel(870, 60, 176, 590, "level3", "Level 3 · decoupling")
    art.panel(1070, 60, 250, 590, "decoder", "Decoder · InternLM2")
    art.text(28, 36, "HTFA: two images and a question in, an answer and an image out", 17,
             font_weight="700")  # fmt: skip

    # Inputs.
    art.image(36, 128, scene["original"], "original")
    art.image(36, 356, scene["reconstruction"], "reconstruction")
    art.size(84, 242, say["size image"])
    art.box(24, 478, 120, 62, "level2", ["affine", "by boxes"], True)
    art.arrow((84, 452), (84, 476))
    art.text(36, 594, "question", 13, font_weight="650")
    for i, line in enumerate(_wrapped(question, 16)):
        art.text(36, 614 + 17 * i, line, 12.5, SOFT)

    # Level 1.
    art.image(216, 236, scene["fused"], "fused")
    art.size(264, 350, say["size image"])
    art.box(192, 376, 144, 84, "level1", ["α", say["size alpha"], say["weight level1"]],
            frozen["level1"])  # fmt: skip
    art.arrow((264, 376), (264, 358))
    art.arrow((264, 176), (264, 212))
    art.arrow((144, 496), (164, 496), (164, 300), (214, 300))

    # Encoders.
    art.box(400, 108, 184, 344, "encoders",
            ["SigLIP", say["siglip"], say["weight siglip"], "the same for both"],
            frozen["siglip"])  # fmt: skip
    art.box(400, 500, 184, 100, "encoders",
            ["VQ encoder", f"nearest of {say['size code_logits'].split(' × ')[1]} codes",
             say["weight vq_encoder"]], frozen["vq_encoder"])  # fmt: skip
    art.arrow((134, 176), (398, 176))
    art.arrow((144, 522), (368, 522), (368, 400), (398, 400))
    art.arrow((314, 280), (362, 280), (362, 550), (398, 550))

    # Level 2.
    art.box(652, 108, 174, 344, "level2",
            ["cross-attention", say["level2"], say["weight level2"], "residual, LayerNorm",
             "reconstruction appended"],
            frozen["level2"])  # fmt: skip
    for y, name in ((176, "Q"), (380, "K"), (420, "V")):
        art.arrow((584, y), (650, y))
        art.text(
            617, y - 8, name, 12.5, TINTS["level2"][1], text_anchor="middle", font_weight="700"
        )
    art.size(492, 478, f"2 × {say['size features']}")

    # Level 3.
    art.box(888, 178, 140, 92, "level3", ["adapter", "understanding", say["weight understand"]],
            frozen["understand"])  # fmt: skip
    art.box(888, 504, 140, 92, "level3", ["adapter", "generation", say["weight generate"]],
            frozen["generate"])  # fmt: skip
    art.arrow((826, 224), (886, 224))
    art.size(958, 166, say["size spatial"])
    art.arrow((584, 550), (886, 550))
    art.size(736, 540, say["size vectors"])

    # The sequence and the decoder.
    colors = (TINTS["level2"][1], TINTS["encoders"][1], TINTS["level1"][1])
    art.bar(1086, 108, 94, 214, colors[0], ["understanding", say["tokens understanding"]])
    art.bar(1086, 328, 94, 164, colors[1], ["generation", say["tokens generation"]])
    art.bar(1086, 498, 94, 52, colors[2], ["text", "up to L"])
    art.box(1204, 108, 100, 442, "decoder",
            ["causal", say["blocks"].split(", ")[0], say["blocks"].split(", ")[1],
             *say["weight blocks"].split(", ")], frozen["blocks"])  # fmt: skip
    art.box(1086, 580, 218, 52, "decoder", ["token embedding", say["weight embedding"]],
            frozen["embedding"])  # fmt: skip
    art.arrow((1028, 224), (1084, 224))
    art.arrow((1028, 550), (1056, 550), (1056, 410), (1084, 410))
    art.arrow((84, 652), (84, 676), (1060, 676), (1060, 606), (1084, 606))
    art.arrow((1133, 580), (1133, 552))
    for y in (215, 410, 524):
        art.arrow((1180, y), (1202, y))

    # Heads and what comes out.
    art.box(1346, 368, 178, 84, "level3",
            ["code head", say["size code_logits"], say["weight code_head"]],
            frozen["code_head"])  # fmt: skip
    art.box(1346, 482, 178, 84, "decoder",
            ["LM head", say["size text_logits"],
             say["weight lm_head"]], frozen["lm_head"])  # fmt: skip
    art.box(1346, 254, 178, 74, "encoders", ["VQ decoder", say["weight vq_decoder"]],
            frozen["vq_decoder"])  # fmt: skip
    art.arrow((1304, 410), (1344, 410))
    art.arrow((1304, 524), (1344, 524))
    art.arrow((1435, 368), (1435, 330))
    art.arrow((1435, 254), (1435, 230))
    art.size(1446, 353, f"{say['size codes']} codes", "start")
    art.image(1387, 128, scene["completed"], "completed")
    art.arrow((1435, 566), (1435, 598))
    art.text(1435, 622, "answer", 13, text_anchor="middle", font_weight="650")
    art.text(1435, 642, f"“{answer}”", 13, SOFT, text_anchor="middle")

    # What it learns from, and how to read it.
    art.text(1538, 706, f"loss: {say['loss codes']}  +  {say['loss text']}", 12.5, SOFT,
             text_anchor="end")  # fmt: skip
    art.parts.append(
        f'<rect x="28" y="722" width="30" height="18" rx="5" fill="#fff" stroke="{SOFT}" '
        'stroke-width="1.8"/>'
        f'<rect x="128" y="722" width="30" height="18" rx="5" fill="#fff" stroke="{SOFT}" '
        'stroke-width="1.8" stroke-dasharray="5 4"/>'
    )
    art.text(66, 736, "trained", 12.5, SOFT)
    art.text(166, 736, "frozen, or without parameters", 12.5, SOFT)
    trained = sum(n for n, still in counted.values() if not still)
    still = sum(n for n, still in counted.values() if still)
    art.text(
        1538, 736,
        f"{short(trained)} parameters trained, {short(still)} frozen; L: text tokens",
        12.5, SOFT, text_anchor="end",
    )  # fmt: skip
    return art.svg()


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def example() -> tuple[dict[str, Image.Image], str, str]:
    """A scene of the demo model, a question, and what the model completes and answers."""
    raw = json.loads((DEMO / EXAMPLES).read_text(encoding="utf-8").splitlines()[0])
    folder = (DEMO / EXAMPLES).parent
    orig, recon = (folder / raw[name] for name in ("image_orig", "image_recon"))
    question = "What's the object in the hand?"
    result = HTFAInference.from_pretrained(DEMO).infer(
        orig,
        recon,
        question,
        bbox_orig=raw.get("bbox_orig"),
        bbox_recon=raw.get("bbox_recon"),
        return_intermediates=True,
    )
    seen = result.intermediates
    # As alpha starts.
    fused_HWC = (seen.original_HWC + seen.aligned_HWC) / 2
    with Image.open(orig) as a, Image.open(recon) as b:
        a, b = a.convert("RGB"), b.convert("RGB").resize(a.size)
        scene = {
            "original": a,
            "reconstruction": b,
            "fused": Image.fromarray(np.uint8(255 * fused_HWC.clip(0, 1))),
            "completed": result.completed,
        }
    return scene, question, result.answer


@dataclasses.dataclass(frozen=True)
class DrawArgs:
    """Options of the command."""

    config: str = "standard"  # preset or file
    output: Path = Path("docs/architecture.svg")  # file to write


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(DrawArgs, argv, __doc__)
    # As it would be with pretrained parts.
    config = override(load_config(args.config), {"pretrained.random_components": "as_configured"})
    drawn = {
        "level2.alignment": "pixels",
        "level2.values": "reconstruction",
        "level2.append_reconstruction": True,
    }
    if any(get(config, name) != value for name, value in drawn.items()):
        raise ConfigError(f"drawn is the flow of {drawn}; {args.config} has another one")
    args.output.write_text(draw(config, *example()), encoding="utf-8")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
