"""The same models in PyTorch, fed from a checkpoint by its own names, of sizes that are given.

SigLIP and the decoder run in transformers' classes, whose code comes with that package; nothing
of the checkpoint's own code is used. All in float32. `published` builds them by a checkpoint's
config.json instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from htfa_jax.config import DecoderConfig, SigLIPConfig, VQConfig
from htfa_jax.errors import CheckpointError

Read = Callable[[str], np.ndarray]


def tensor(x: np.ndarray) -> Tensor:
    """A float32 tensor."""
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def siglip(read: Read, keys: list[str], sizes: SigLIPConfig, image_size: int) -> torch.nn.Module:
    """transformers' vision model.

    Args:
      read: from a key, without prefix, to its tensor.
      keys: those keys.
      sizes: of the encoder.
      image_size: pixels of a side; position embeddings are resized to it.
    """
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=sizes.embed_dim,
            intermediate_size=sizes.mlp_dim,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            patch_size=sizes.patch_size,
            image_size=image_size,
            layer_norm_eps=sizes.layer_norm_eps,
            hidden_act=sizes.hidden_act,
            vision_use_head=False,
        )
    ).eval()
    unused = ("head", "attn_pool", "fc_norm", "embeddings.position_ids")
    state = siglip_names({k: tensor(read(k)) for k in keys if not k.startswith(unused)})
    grid = image_size // sizes.patch_size
    positions = state["embeddings.position_embedding.weight"].reshape(-1, sizes.embed_dim)
    side = int(len(positions) ** 0.5)
    square = positions.T.reshape(1, -1, side, side)
    square = functional.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    state["embeddings.position_embedding.weight"] = square.reshape(sizes.embed_dim, -1).T
    return _loaded(model, state)


def llama_config(sizes: DecoderConfig, **options: Any) -> Any:
    """transformers' configuration of the Llama that computes what InternLM2 does.

    Args:
      sizes: of the decoder.
      **options: more of transformers' own.
    """
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": sizes.rope_theta}
    if sizes.rope_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": sizes.rope_factor}
    return LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.embed_dim,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        rope_parameters=rope,
        rms_norm_eps=sizes.rms_norm_eps,
        max_position_embeddings=sizes.max_positions or 32768,
        tie_word_embeddings=sizes.tie_head,
        **options,
    )


def decoder(read: Read, keys: list[str], sizes: DecoderConfig) -> torch.nn.Module:
    """transformers' Llama, which computes what InternLM2 does. See `siglip` for the arguments."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama_config(sizes, attn_implementation="eager")).eval()
    state = {}
    for key in keys:
        layer = re.search(r"layers\.(\d+)\.", key)
        if "inv_freq" not in key and not (layer and int(layer[1]) >= sizes.num_layers):
            state[key.replace("output.", "lm_head.")] = tensor(read(key))
    state = llama_names(state, sizes.num_kv_heads, sizes.embed_dim // sizes.num_heads)
    if sizes.tie_head:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return _loaded(model, state)


def siglip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tower's tensors under transformers' names, whether they have timm's or those already."""
    timm = {
        r"patch_embed\.proj\.(.*)": r"embeddings.patch_embedding.\1",
        r"pos_embed": "embeddings.position_embedding.weight",
        r"blocks\.(\d+)\.norm([12])\.(.*)": r"encoder.layers.\1.layer_norm\2.\3",
        r"blocks\.(\d+)\.attn\.proj\.(.*)": r"encoder.layers.\1.self_attn.out_proj.\2",
        r"blocks\.(\d+)\.mlp\.(.*)": r"encoder.layers.\1.mlp.\2",
        r"norm\.(.*)": r"post_layernorm.\1",
    }
    out = {}
    for key, value in state.items():
        if fused := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key):
            layer, kind = fused.groups()
            for name, part in zip("qkv", value.chunk(3), strict=True):
                out[f"encoder.layers.{layer}.self_attn.{name}_proj.{kind}"] = part
            continue
        renamed = [re.sub(p, r, key) for p, r in timm.items() if re.fullmatch(p, key)]
        out[renamed[0] if renamed else key] = value
    return out


def llama_names(state: Mapping[str, Tensor], groups: int, head_dim: int) -> dict[str, Tensor]:
    """A decoder's tensors under Llama's names, whether they have InternLM2's or those already.

    Args:
      state: behind "model.", the head as "lm_head.weight".
      groups: heads of keys and values.
      head_dim: size of each head.
    """
    names = {
        "tok_embeddings": "embed_tokens",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    out = {}
    for key, value in state.items():
        name = key
        for theirs, llama in names.items():
            name = name.replace(theirs, llama)
        if "wqkv" not in key:
            out[name] = value
            continue
        # One group per key head: its queries, then its key, then its value.
        split = [g.split([len(g) - 2 * head_dim, head_dim, head_dim]) for g in value.chunk(groups)]
        for i, part in enumerate("qkv"):
            target = name.replace("attention.wqkv", f"self_attn.{part}_proj")
            out[target] = torch.cat([s[i] for s in split])
    return out


def _loaded(model: torch.nn.Module, state: dict[str, Tensor]) -> torch.nn.Module:
    # Some releases of transformers put "vision_model." before an encoder's names, some do not.
    if not set(state) & set(model.state_dict()):
        state = {f"vision_model.{name}": value for name, value in state.items()}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"the reference does not take these tensors: {error}") from error
    return model


class VQ:
    """A VQGAN tokenizer as taming-transformers computes it, functions over named tensors.

    Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (2021).

    Args:
      read: from a key, without prefix, to its tensor.
      keys: those keys.
      sizes: of the tokenizer.
    """

    def __init__(self, read: Read, keys: list[str], sizes: VQConfig):
        self.sizes, levels = sizes, len(sizes.channel_multipliers)
        # In taming's count level 0 is the highest resolution, which nothing is upsampled to leave.
        run_order = any(re.fullmatch(r"decoder\.(up|conv_blocks)\.0\.upsample.*", k) for k in keys)
        self.weights = {taming_name(k, levels, run_order): tensor(read(k)) for k in keys}

    def vectors(self) -> Tensor:
        """The codebook [C, E], normalised if codes are compared so."""
        table = self.weights["quantize.embedding.weight"]
        return functional.normalize(table, dim=-1) if self.sizes.normalize_codes else table

    def continuous(self, image_BCHW: Tensor) -> Tensor:
        """Continuous codes [B, M, E], as they are compared."""
        x = self.conv("encoder.conv_in", image_BCHW)
        levels = len(self.sizes.channel_multipliers)
        for i in range(levels):
            for j in range(self.sizes.num_res_blocks):
                x = self.block(f"encoder.down.{i}.block.{j}", x)
                x = self.attention(f"encoder.down.{i}.attn.{j}", x)
            if i < levels - 1:
                x = functional.pad(x, (0, 1, 0, 1))
                x = self.conv(f"encoder.down.{i}.downsample.conv", x, stride=2, padding=0)
        x = self.normed("encoder.norm_out", self.middle("encoder", x))
        x = self.conv("encoder.conv_out", x)
        z = self.conv("quant_conv", x).flatten(2).transpose(1, 2)
        return functional.normalize(z, dim=-1) if self.sizes.normalize_codes else z

    def encode(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Continuous codes [B, M, E] and their squared distances to all codes [B, M, C]."""
        z = self.continuous(image_BCHW)
        return z, torch.cdist(z, self.vectors()[None]) ** 2

    def decode(self, codes_BM: Tensor) -> Tensor:
        """Images [B, 3, H, W] of codes."""
        side = int(codes_BM.shape[1] ** 0.5)
        x = self.vectors()[codes_BM].transpose(1, 2).unflatten(2, (side, side))
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", x)))
        for i in reversed(range(len(self.sizes.channel_multipliers))):
            for j in range(self.sizes.num_res_blocks + 1):
                x = self.block(f"decoder.up.{i}.block.{j}", x)
                x = self.attention(f"decoder.up.{i}.attn.{j}", x)
            if i:
                x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{i}.upsample.conv", x)
        return self.conv("decoder.conv_out", self.normed("decoder.norm_out", x))

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        """A convolution that keeps the size unless told otherwise."""
        weight = self.weights[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return functional.conv2d(
            x, weight, self.weights[f"{name}.bias"], stride=stride, padding=padding
        )

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Group norm."""
        weight, bias = (self.weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return functional.group_norm(x, math.gcd(32, x.shape[1]), weight, bias, eps=1e-6)

    def normed(self, name: str, x: Tensor) -> Tensor:
        """Group norm and swish."""
        return functional.silu(self.norm(name, x))

    def block(self, name: str, x: Tensor) -> Tensor:
        """A residual block."""
        y = self.conv(f"{name}.conv1", self.normed(f"{name}.norm1", x))
        y = self.conv(f"{name}.conv2", self.normed(f"{name}.norm2", y))
        shortcut = f"{name}.nin_shortcut"
        return y + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.weights else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        """Attention over all pixels; nothing where the checkpoint has none."""
        if f"{name}.q.weight" not in self.weights:
            return x
        y = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", y).flatten(2).transpose(1, 2) for part in "qkv")
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.conv(f"{name}.proj_out", out.unflatten(2, x.shape[2:]))

    def middle(self, half: str, x: Tensor) -> Tensor:
        """Block, attention, block."""
        x = self.attention(f"{half}.mid.attn_1", self.block(f"{half}.mid.block_1", x))
        return self.block(f"{half}.mid.block_2", x)


def taming_name(key: str, levels: int, run_order: bool) -> str:
    """A tensor's name in taming-transformers, from Janus's or transformers' names.

    Args:
      key: the name.
      levels: how many there are.
      run_order: the decoder's levels are counted as they run, lowest resolution first.
    """
    if m := re.fullmatch(r"(encoder|decoder)\.conv_blocks\.(\d+)\.(.*)", key):
        side, rest = {"encoder": "down", "decoder": "up"}[m[1]], m[3].replace("res.", "block.")
        key = f"{m[1]}.{side}.{m[2]}.{rest}"
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.([012])\.(.*)", key):
        return f"{m[1]}.mid.{('block_1', 'attn_1', 'block_2')[int(m[2])]}.{m[3]}"
    if run_order and (m := re.fullmatch(r"decoder\.up\.(\d+)\.(.*)", key)):
        return f"decoder.up.{levels - 1 - int(m[1])}.{m[2]}"
    return key.replace("quantize.embed.weight", "quantize.embedding.weight")


class Levels:
    """The three levels of the PyTorch original, functions over its tensors.

    Args:
      read: from a key, without prefix, to its tensor.
      keys: those keys.
      num_heads: of Level 2.
    """

    def __init__(self, read: Read, keys: list[str], num_heads: int):
        self.num_heads = num_heads
        self.weights = {key: tensor(read(key)) for key in keys}

    def fuse(self, orig_BCHW: Tensor, recon_BCHW: Tensor) -> Tensor:
        """Level 1, on one scale or summed over several."""

        def blend(name: str, orig: Tensor, recon: Tensor) -> Tensor:
            alpha = torch.sigmoid(self.weights[f"level1_fusion.{name}fusion_weight_raw"])
            return alpha * orig + (1 - alpha) * recon

        def resize(x: Tensor, size: list[int]) -> Tensor:
            return functional.interpolate(x, size, mode="bilinear", align_corners=False)

        if "level1_fusion.scale_weights" not in self.weights:
            return blend("", orig_BCHW, recon_BCHW)
        size = list(orig_BCHW.shape[2:])
        parts = []
        for i, weight in enumerate(self.weights["level1_fusion.scale_weights"].softmax(dim=0)):
            small = [length // 2**i for length in size]
            pair = [resize(x, small) for x in (orig_BCHW, recon_BCHW)]
            parts.append(weight * resize(blend(f"fusion_layers.{i}.", *pair), size))
        return sum(parts)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A linear layer, with its bias if it has one."""
        return functional.linear(
            x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        )

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Layer norm; nothing where the checkpoint has none."""
        if f"{name}.weight" not in self.weights:
            return x
        weight, bias = (self.weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return functional.layer_norm(x, x.shape[-1:], weight, bias)

    def attend(self, orig_BPD: Tensor, recon_BPD: Tensor, fused_BPD: Tensor) -> Tensor:
        """Level 2 on features that are aligned already."""
        level = "level2_fusion."
        q, k, v = (
            self.linear(f"{level}{name}_proj", x)
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)
            for name, x in (("query", orig_BPD), ("key", recon_BPD), ("value", fused_BPD))
        )
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(f"{level}layer_norm", self.linear(f"{level}output_proj", out) + orig_BPD)

    def adapter(self, branch: str, x: Tensor) -> Tensor:
        """The adapter of a branch, "understanding" or "generation"."""
        name = f"level3_fusion.{branch}_branch.adapter."
        x = self.linear(f"{name}fc2", functional.gelu(self.linear(f"{name}fc1", x)))
        return self.norm(f"{name}layer_norm", x)
