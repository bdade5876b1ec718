"""Small checkpoints of random weights, under the names of those that are published."""

import json

import numpy as np
import torch
from safetensors.numpy import load_file, save_file


def random(model, seed=0):
    """A model whose every weight counts."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            if p.ndim < 2:
                p.copy_((1 if "norm" in name and "weight" in name else 0) + 0.2 * noise)
            else:
                p.copy_(1.5 * noise * p[0].numel() ** -0.5)
    return model.eval()


def to_internlm2(tensors, kv_heads=2):
    """A Llama's tensors under the names that InternLM2 is published with."""
    names = {
        "embed_tokens": "tok_embeddings", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "lm_head": "output",
    }  # fmt: skip
    out = {}
    for key, value in tensors.items():
        if "q_proj" in key:
            heads = [
                tensors[key.replace("q_proj", f"{p}_proj")].reshape(kv_heads, -1, value.shape[1])
                for p in "qkv"
            ]
            name = key.replace("self_attn.q_proj", "attention.wqkv")
            out[name] = np.concatenate(heads, axis=1).reshape(-1, value.shape[1])
        elif "k_proj" not in key and "v_proj" not in key:
            for llama, theirs in names.items():
                key = key.replace(llama, theirs)
            out[key] = value
    return {key: np.ascontiguousarray(value) for key, value in out.items()}


def to_timm(tensors):
    """A SiglipVisionModel's tensors under timm's names, as Janus has them."""
    names = {
        "embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks",
        "layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj",
        "post_layernorm": "norm",
    }  # fmt: skip
    out = {}
    for key, value in tensors.items():
        key = key.removeprefix("vision_model.")
        if key.startswith("head"):
            out["attn_pool." + key] = value
        elif "position_embedding" in key:
            out["pos_embed"] = value[None]
        elif "q_proj" in key:
            parts_ = [tensors[k] for p in "qkv" for k in tensors
                      if k.endswith(key.replace("q_proj", f"{p}_proj"))]  # fmt: skip
            name = key.replace("encoder.layers", "blocks").replace("self_attn.q_proj", "attn.qkv")
            out[name] = np.concatenate(parts_)
        elif "k_proj" not in key and "v_proj" not in key:
            for theirs, timm in names.items():
                key = key.replace(theirs, timm)
            out[key] = value
    return {f"vision_model.vision_tower.{k}": np.ascontiguousarray(v) for k, v in out.items()}


def tensors_of(folder):
    """All tensors of a folder."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def written(folder, tensors, config=None):
    """A folder with tensors and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(arrays, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
