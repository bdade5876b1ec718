"""The way back: a run's SigLIP and decoder under their PyTorch names."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from htfa_jax.checkpoints.loading import load_run
from htfa_jax.checkpoints.runs import find_run, refuse_links
from htfa_jax.checkpoints.weights import write_json
from htfa_jax.common import param_paths
from htfa_jax.common.files import whole_folder
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, DecoderConfig, SigLIPConfig, VQConfig
from htfa_jax.errors import CheckpointError
from htfa_jax.models.factory import build_model
from weights_convert import internlm2, siglip, vq
from weights_convert.convert import Rule, conv, linear, same

Inverse = Callable[[np.ndarray], np.ndarray]


def write_run(run: str | Path, out: Path) -> list[Path]:
    """Writes `out/siglip` (for transformers' SiglipVisionModel) and `out/internlm2`.

    The decoder has InternLM2's own names (one with biases: Qwen2's); its folder holds the run's
    tokenizer too. Values are bitwise those of the run, so converting the folders again gives the
    same weights.

    Args:
      run: a run or one of its checkpoints.
      out: folder to write to.

    Returns:
      The folders.

    Raises:
      CheckpointError: no such run, or a folder that cannot be written.
    """
    refuse_links(find_run(run)[0])  # or what they lead to would be copied
    config, params, _, workdir = load_run(run, lambda c: build_model(c).shapes)
    written = []
    for component, name, tensors, description in (
        ("siglip", "siglip", siglip_tensors, siglip_config),
        ("decoder", "internlm2", internlm2_tensors, internlm2_config),
    ):
        inside, _ = param_paths.split(params, rf"{component}\..*")
        flat = {path.removeprefix(component + "."): np.asarray(v) for path, v in inside.items()}
        sizes = getattr(config, component)
        if component == "decoder" and "embed.embedding" not in flat:
            continue  # trained for images alone: it has no text
        with whole_folder(out / name, CheckpointError) as folder:
            arrays = {k: np.ascontiguousarray(v) for k, v in tensors(flat, sizes).items()}
            save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
            write_json(folder / "config.json", description(config))
            if component == "decoder":
                for file in (workdir / "tokenizer").iterdir():
                    shutil.copy(file, folder / file.name)
        written.append(out / name)
    return written


def undo(params: Flat, rules: Iterable[Rule], inverses: Mapping[Any, Inverse]) -> Flat:
    """`{tensor name: array}` of parameters, by the rules that read them, reversed."""
    tensors: Flat = {}
    for rule in rules:
        for path, value in params.items():
            if not (match := re.fullmatch(rule.path, path)):
                continue
            key, inverse = match.expand(rule.key), inverses[rule.transform]
            if "{layer}" in key:
                for i, layer in enumerate(value):
                    tensors[key.replace("{layer}", str(i))] = inverse(layer)
            else:
                tensors[key] = inverse(value)
    return tensors


def siglip_tensors(params: Flat, sizes: SigLIPConfig) -> Flat:
    """The encoder as `SiglipVisionModel` names it."""
    patch = sizes.patch_size

    def kernel(x: np.ndarray) -> np.ndarray:
        return x.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)

    inverses = {same: same, linear: linear, siglip.patch_kernel: kernel}
    tensors = undo(params, siglip.rules(), inverses)
    return {f"vision_model.{key}": value for key, value in tensors.items()}


def siglip_config(config: Config) -> dict[str, Any]:
    """config.json of the encoder."""
    sizes = config.siglip
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_act": sizes.hidden_act,
        "hidden_size": sizes.embed_dim,
        "image_size": config.image_size,
        "intermediate_size": sizes.mlp_dim,
        "layer_norm_eps": sizes.layer_norm_eps,
        "num_attention_heads": sizes.num_heads,
        "num_channels": 3,
        "num_hidden_layers": sizes.num_layers,
        "patch_size": sizes.patch_size,
        "vision_use_head": False,
    }


def vq_tensors(params: Flat) -> Flat:
    """A tokenizer as transformers' `JanusVQVAE` names it."""

    def kernel(x: np.ndarray) -> np.ndarray:
        return x.transpose(3, 2, 0, 1)

    return undo(params, vq.RULES, {same: same, conv: kernel})


def vq_config(sizes: VQConfig, image_size: int) -> dict[str, Any]:
    """config.json of `JanusVQVAE`; squares of `stem` pixels are channels of its images."""
    return {
        "architectures": ["JanusVQVAE"],
        "model_type": "janus_vqgan",
        "base_channels": sizes.base_channels,
        "channel_multiplier": list(sizes.channel_multipliers),
        "double_latent": False,
        "dropout": 0.0,
        "embed_dim": sizes.codebook_dim,
        "in_channels": 3 * sizes.stem**2,
        "latent_channels": sizes.z_channels,
        "num_embeddings": sizes.codebook_size,
        "num_patches": image_size // sizes.stem // 2 ** (len(sizes.channel_multipliers) - 1),
        "num_res_blocks": sizes.num_res_blocks,
        "out_channels": 3 * sizes.stem**2,
    }


def internlm2_tensors(params: Flat, sizes: DecoderConfig) -> Flat:
    """The decoder as `InternLM2ForCausalLM` names it; with biases as `Qwen2ForCausalLM` does."""

    def real_tokens(x: np.ndarray) -> np.ndarray:
        return x[: sizes.vocab_size]

    biased = sizes.attention_bias
    table = internlm2.llama_rules() if biased else internlm2.internlm2_rules(sizes)
    inverses: dict[Any, Inverse] = {same: same, linear: linear, internlm2.pad_vocab: real_tokens}
    head = next(rule for rule in table if rule.path.startswith("head"))
    inverses[head.transform] = lambda x: real_tokens(linear(x))
    fused = [rule for rule in table if "wqkv" in rule.key]
    tensors = undo(params, [rule for rule in table if rule not in fused], inverses)
    if biased:
        return tensors
    qkv = [params[f"layers.attention.{p}_proj.kernel"] for p in "qkv"]
    for i in range(sizes.num_layers):
        # One group per key head: its queries, then its key, then its value.
        rows = [p[i].T.reshape(sizes.num_kv_heads, -1, sizes.embed_dim) for p in qkv]
        joined = np.concatenate(rows, axis=1).reshape(-1, sizes.embed_dim)
        tensors[f"model.layers.{i}.attention.wqkv.weight"] = joined
    return tensors


def internlm2_config(config: Config) -> dict[str, Any]:
    """config.json of the decoder."""
    sizes = config.decoder
    scaling = {"type": "linear", "factor": sizes.rope_factor} if sizes.rope_factor != 1 else None
    named: dict[str, Any] = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
    named["bias"] = False
    if sizes.attention_bias:
        named = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return {
        **named,
        "hidden_act": "silu",
        "hidden_size": sizes.embed_dim,
        "intermediate_size": sizes.mlp_dim,
        "max_position_embeddings": sizes.max_positions or 32768,
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_scaling": scaling,
        "rope_theta": sizes.rope_theta,
        "tie_word_embeddings": sizes.tie_head,
        "vocab_size": sizes.vocab_size,
    }
