"""Runs a checkpoint in PyTorch and its conversion in JAX on the same inputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from htfa_jax.checkpoints.weights import CONFIG, load_component, read_description
from htfa_jax.common import param_paths
from htfa_jax.common.json_files import read_json
from htfa_jax.common.param_paths import Flat
from htfa_jax.errors import CheckpointError
from htfa_jax.models.internlm2 import InternLM2
from htfa_jax.models.layers import make_rngs
from htfa_jax.models.siglip import SigLIP
from htfa_jax.models.vq import VQ
from weights_convert import htfa, internlm2, published, reference, siglip, vq
from weights_convert.folder import CONVERSION
from weights_convert.source import Source

PROMPT, VQ_SIDE, SEED = 512, 128, 0
TOLERANCE = 1e-3  # relative to the largest output; float32 both


def verify(folder: Path, source: Source, decoder_from: Source | None = None) -> str:
    """Compares a weight folder with what it was made from; says how far they are apart.

    SigLIP: features of a random image. Decoder: hidden states and next-token probabilities of a
    random prompt of 512 tokens, with the Kullback-Leibler divergence per token. VQ: codes of a
    random image and the image of random codes.

    Levels of the original: each on random inputs.

    Args:
      folder: the weight folder.
      source: its checkpoint.
      decoder_from: the second checkpoint of a VQ tokenizer.

    Raises:
      CheckpointError: the checkpoint is not the one that was converted, or the outputs differ by
        more than 0.001 of their scale.
    """
    family = _family(folder)
    made_from = vq.Merged(source, decoder_from) if decoder_from else source
    same_files(folder, made_from)
    lines, worst = CHECKS[family](folder, made_from)
    if not worst <= TOLERANCE:  # so that NaN fails too
        raise CheckpointError(
            f"{folder} does not compute what {source.name} does:\n  " + "\n  ".join(lines)
        )
    return "\n".join([f"{folder} computes what {source.name} does:", *lines])


def _family(folder: Path) -> str:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"no {CONFIG} in {folder}: expected a weight folder")
    family = read_json(path, CheckpointError).get("family")
    if family not in CHECKS:
        raise CheckpointError(f"{folder} is of family {family!r}; {', '.join(CHECKS)} are compared")
    return family


def same_files(folder: Path, source: Source) -> None:
    """Raises CheckpointError unless the checkpoint's files are those that were converted."""
    path = folder / CONVERSION
    if not path.is_file():
        raise CheckpointError(f"no {CONVERSION} in {folder}: it was not made by weights_convert")
    recorded = read_json(path, CheckpointError).get("files")
    if not isinstance(recorded, list) or not all(map(_is_hashed, recorded)):
        raise CheckpointError(f"{path} does not say the hashes of the files that were converted")
    # Of a source on the hub, the other files may not be here.
    names = {file["name"] for file in recorded}
    is_one = isinstance(source, Source)
    keys = [key for key in source.keys if not is_one or source.file_of(key) in names]
    found = {f["name"]: f["sha256"] for f in source.hashes(keys)}
    for file in recorded:
        if found.get(file["name"]) != file["sha256"]:
            raise CheckpointError(
                f"{source.name}/{file['name']} is not the file that {folder} was made from "
                f"(SHA-256 {found.get(file['name'])}, converted was {file['sha256']})"
            )


def _is_hashed(file: Any) -> bool:
    return isinstance(file, dict) and {"name", "sha256"} <= set(file)


def inside(source: Source, prefix: str, ignored: dict[str, str]) -> list[str]:
    """Keys behind a prefix, without it and without those that a spec ignores."""
    return [
        key.removeprefix(prefix)
        for key in source.keys
        if key.startswith(prefix) and not any(re.fullmatch(p, key) for p in ignored)
    ]


def load(folder: Path, family: str, spec, module: nnx.Module) -> nnx.Module:
    """Our module with the folder's weights in float32."""
    arrays = load_component(folder, family, spec.sizes, spec.shapes, **spec.notes)
    weights: Flat = {path: jnp.asarray(x, jnp.float32) for path, x in arrays.items()}
    return nnx.merge(nnx.split(module)[0], param_paths.unflatten(weights))


def difference(name: str, ours: np.ndarray, theirs: torch.Tensor) -> tuple[str, float]:
    """A line and the largest difference relative to the largest output."""
    expected = theirs.detach().numpy()
    scale = float(np.abs(expected).max())
    largest = float(np.abs(np.asarray(ours) - expected).max())
    return f"{name}: largest difference {largest:.2e} of up to {scale:.3g}", largest / scale


def check_siglip(folder: Path, source: Source) -> tuple[list[str], float]:
    """Features of a random image."""
    config = read_description(folder, "siglip")
    spec = siglip.conversion_spec(source, config["image_size"])
    size = config["image_size"]
    naming = "timm" if f"{spec.prefix}patch_embed.proj.weight" in source else "transformers"
    theirs, what = published.siglip(source, spec.prefix, naming)
    ours = load(
        folder,
        "siglip",
        spec,
        nnx.eval_shape(
            lambda: SigLIP(spec.sizes, size, dtype=jnp.dtype("float32"), rngs=make_rngs(SEED))
        ),
    )
    image = np.random.default_rng(SEED).uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    with torch.no_grad(), jax.default_matmul_precision("float32"):
        pixels = torch.from_numpy(image.transpose(0, 3, 1, 2))
        expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state
        line, worst = difference("features", jax.jit(lambda x: ours(x))(image), expected)
    return [what, line], worst


def check_internlm2(folder: Path, source: Source) -> tuple[list[str], float]:
    """Hidden states and probabilities of a random prompt."""
    config = read_description(folder, "internlm2")
    spec = internlm2.conversion_spec(source, config["num_layers"])
    sizes = spec.sizes
    theirs, what = published.decoder(source, sizes.num_layers)
    ours = load(
        folder,
        "internlm2",
        spec,
        nnx.eval_shape(lambda: InternLM2(sizes, dtype=jnp.dtype("float32"), rngs=make_rngs(SEED))),
    )
    length = min(PROMPT, sizes.max_positions or PROMPT)
    ids = np.random.default_rng(SEED).integers(0, sizes.vocab_size, (1, length))

    @jax.jit
    def run(ids):
        hidden, _ = ours(ours.embed(ids), jnp.arange(length)[None])
        return hidden, ours.logits(hidden)[..., : sizes.vocab_size]

    with torch.no_grad(), jax.default_matmul_precision("float32"):
        expected = theirs(torch.from_numpy(ids), output_hidden_states=True)
        hidden, logits = run(ids)
    first, a = difference("hidden states", hidden, expected.hidden_states[-1])
    second, b = difference("logits", logits, expected.logits)
    p = torch.log_softmax(expected.logits.double(), dim=-1)
    q = torch.log_softmax(torch.from_numpy(np.array(logits)).double(), dim=-1)
    divergence = (p.exp() * (p - q)).sum(dim=-1)
    third = f"KL divergence per token: mean {divergence.mean():.2e}, largest {divergence.max():.2e}"
    return [what, first, second, third], max(a, b)


def check_vq(folder: Path, source: Source) -> tuple[list[str], float]:
    """Codes of a random image, the image of random codes."""
    spec = vq.conversion_spec(source)
    sizes = spec.sizes
    keys = inside(source, spec.prefix, spec.ignored)
    theirs = reference.VQ(_reader(source, spec.prefix), keys, sizes)
    ours = load(
        folder,
        "vq",
        spec,
        nnx.eval_shape(lambda: VQ(sizes, dtype=jnp.dtype("float32"), rngs=make_rngs(SEED))),
    )
    rng = np.random.default_rng(SEED)
    image = rng.uniform(-1, 1, (1, VQ_SIDE, VQ_SIDE, 3)).astype(np.float32)
    with torch.no_grad(), jax.default_matmul_precision("float32"):
        z, distances = theirs.encode(torch.from_numpy(image.transpose(0, 3, 1, 2)))
        line, worst = difference("continuous codes", ours.encoder(image), z)
        codes = np.asarray(ours.encode(image))
        equal = float((codes == distances.argmin(dim=-1).numpy()).mean())
        best = distances.topk(2, dim=-1, largest=False).values
        clear = ((best[..., 1] - best[..., 0]) > 1e-4 * distances.max()).numpy()
        wrong = int((codes != distances.argmin(dim=-1).numpy())[clear].sum())
        lines = [line, f"codes: {equal:.2%} equal, {wrong} differ where the nearest is clear"]
        worst = max(worst, float(wrong))
        if any(key.startswith("decoder.") for key in keys):
            some = rng.integers(0, sizes.codebook_size, codes.shape)
            theirs_image = theirs.decode(torch.from_numpy(some)).permute(0, 2, 3, 1)
            line, other = difference("decoded image", ours.decode(some), theirs_image)
            lines, worst = [*lines, line], max(worst, other)
    return lines, worst


def check_htfa(folder: Path, source: Source) -> tuple[list[str], float]:
    """Random images through Level 1, random features through Level 2 and Level 3."""
    spec = htfa.conversion_spec(source)
    sizes = spec.sizes
    keys = inside(source, spec.prefix, spec.ignored)
    theirs = reference.Levels(_reader(source, spec.prefix), keys, sizes.num_heads)
    arrays = load_component(folder, "htfa", sizes, spec.shapes)
    weights = {path: jnp.asarray(x, jnp.float32) for path, x in arrays.items()}
    ours = nnx.merge(
        nnx.split(nnx.eval_shape(lambda: htfa.levels(sizes)))[0], param_paths.unflatten(weights)
    )
    rng = np.random.default_rng(SEED)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def torch_of(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x)

    side = sizes.image_size
    pair = [draw(1, side, side, 3) for _ in range(2)]
    features = [draw(1, 16, sizes.embed_dim) for _ in range(3)]
    codes, hidden = draw(1, 16, sizes.codebook_dim), draw(1, 16, sizes.decoder_dim)
    with torch.no_grad(), jax.default_matmul_precision("float32"):
        fused = theirs.fuse(*(torch_of(x.transpose(0, 3, 1, 2)) for x in pair))
        spatial = theirs.attend(*map(torch_of, features))
        found = [
            difference("Level 1", ours.level1(*pair)[0], fused.permute(0, 2, 3, 1)),
            difference("Level 2", ours.level2(*features)[0], spatial),
            difference(
                "understanding adapter",
                ours.level3.understand(jnp.asarray(features[0])),
                theirs.adapter("understanding", torch_of(features[0])),
            ),
            difference(
                "generation adapter",
                ours.level3.generate(jnp.asarray(codes)),
                theirs.adapter("generation", torch_of(codes)),
            ),
            difference(
                "generation head",
                ours.level3.code_logits(jnp.asarray(hidden)),
                theirs.linear("prediction_heads.head_generate", torch_of(hidden)),
            ),
        ]
    return [line for line, _ in found], max(worst for _, worst in found)


def _reader(source: Source, prefix: str) -> Callable[[str], np.ndarray]:
    return lambda key: source.read(prefix + key)


CHECKS = {
    "siglip": check_siglip,
    "internlm2": check_internlm2,
    "vq": check_vq,
    "htfa": check_htfa,
}
