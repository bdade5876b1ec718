"""Seconds and peak memory of converting checkpoints of published sizes, made at random.

    python scripts/benchmarks/conversion.py --folder /tmp/checkpoints

SigLIP so400m (float32, one file) and InternLM2-1.8B (bfloat16, shards of 2 GB). Each conversion
runs in a process of its own; its peak counts the mapped pages of the files that it reads.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from htfa_jax.common.cli import parse

SHARD_BYTES = 2 * 10**9


def siglip_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of google/siglip-so400m-patch14-384's vision tower."""
    width, mlp = 1152, 4304
    shapes = {
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (27 * 27, width),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.mlp.fc1.weight": (mlp, width),
        "head.mlp.fc2.weight": (width, mlp),
    }
    for i in range(27):
        layer = f"encoder.layers.{i}."
        for name, out, in_ in (
            *((f"self_attn.{p}_proj", width, width) for p in ("q", "k", "v", "out")),
            ("mlp.fc1", mlp, width),
            ("mlp.fc2", width, mlp),
        ):
            shapes |= {f"{layer}{name}.weight": (out, in_), f"{layer}{name}.bias": (out,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (width,), f"{layer}{name}.bias": (width,)}
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def internlm2_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of internlm/internlm2-1_8b."""
    width, mlp, vocab = 2048, 8192, 92544
    shapes = {"model.tok_embeddings.weight": (vocab, width), "model.norm.weight": (width,)}
    for i in range(24):
        for name, shape in (
            ("attention.wqkv", (2 * width, width)),
            ("attention.wo", (width, width)),
            ("feed_forward.w1", (mlp, width)),
            ("feed_forward.w3", (mlp, width)),
            ("feed_forward.w2", (width, mlp)),
            ("attention_norm", (width,)),
            ("ffn_norm", (width,)),
        ):
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return {**shapes, "output.weight": (vocab, width)}


def make(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, config: dict) -> None:
    """Writes random tensors in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shards, size = [{}], 0
    for name, shape in shapes.items():
        tensor = rng.standard_normal(shape, np.float32).astype(dtype)
        if size + tensor.nbytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = tensor, size + tensor.nbytes
    index = {}
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"model-{i}.safetensors")
        index |= dict.fromkeys(shard, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@dataclasses.dataclass(frozen=True)
class ConversionArgs:
    """Options of the command."""

    folder: Path  # for checkpoints: 12 GB
    repeat: int = 3  # conversions of each


def main(argv: Sequence[str] | None = None) -> None:
    """Makes what is missing, converts, prints a table."""
    args = parse(ConversionArgs, argv, __doc__)
    cases = {
        "siglip": (siglip_shapes(), np.dtype(np.float32), {"num_attention_heads": 16}),
        "internlm2": (
            internlm2_shapes(),
            np.dtype(ml_dtypes.bfloat16),
            {"num_attention_heads": 16, "rope_theta": 1e6, "max_position_embeddings": 32768},
        ),
    }
    for family, (shapes, dtype, config) in cases.items():
        source = args.folder / family
        if not (source / "model.safetensors.index.json").is_file():
            make(source, shapes, dtype, config)
        largest = max(p.stat().st_size for p in source.glob("*.safetensors"))
        seconds, peaks = [], []
        for _ in range(args.repeat):
            program = (
                "import resource; from weights_convert.__main__ import main;"
                f"main([{family!r}, {str(source)!r}, {str(args.folder / 'out')!r}]);"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
            )
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", program], check=True, capture_output=True, text=True
            )
            seconds.append(time.perf_counter() - start)
            unit = 1 if sys.platform == "darwin" else 1024
            peaks.append(int(done.stdout.split()[-1]) * unit)
        parameters = sum(int(np.prod(shape)) for shape in shapes.values())
        print(
            f"{family}: {parameters / 1e6:.0f} M parameters ({dtype}), "
            f"{np.median(seconds):.1f} s (from {min(seconds):.1f} to {max(seconds):.1f}), "
            f"peak {max(peaks) / 1e9:.2f} GB, largest shard {largest / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
