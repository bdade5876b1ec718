"""A PyTorch twin of the model and of its training step: the same arithmetic, eager or compiled.

SigLIP and the decoder are transformers' classes with PyTorch's fused attention, the VQ tokenizer
is that of `weights_convert.reference`, the levels are in `torch_levels`; losses and step are here.
`benchmark.py` measures against it, and `tests/scripts/test_torch_twin.py` holds its loss and
gradients against the model's.

Nothing here imports JAX, whose memory would count as PyTorch's. Images are [B, C, H, W], in
names of arrays too; the other letters are those of `htfa_jax.models.layers`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from benchmarks.torch_levels import Levels, at_cells, box_mask, cell_means, normalize, resample
from torch import Tensor, nn
from torch.nn import functional

from htfa_jax.config import Config, get
from htfa_jax.errors import ConfigError, DataError
from weights_convert import reference

Batch = Mapping[str, Tensor]

# From our parameter paths to PyTorch's: substitutions, one after the other.
NAMES = {
    "siglip": {
        r"siglip\.layers": "siglip.encoder.layers.{layer}",
        r"\.norm([12])": r".layer_norm\1",
        r"attention\.o_proj": "self_attn.out_proj",
        r"attention\.": "self_attn.",
        r"\.fc": ".mlp.fc",
        r"post_norm": "post_layernorm",
        r"patch_embed": "embeddings.patch_embedding",
        r"position_embed": "embeddings.position_embedding.weight",
    },
    "decoder": {
        r"embed\.embedding": "model.embed_tokens.weight",
        r"decoder\.layers": "decoder.model.layers.{layer}",
        r"norm1": "input_layernorm",
        r"norm2": "post_attention_layernorm",
        r"attention\.([qkvo]_)": r"self_attn.\1",
        r"\.(gate|up|down)_": r".mlp.\1_",
        r"decoder\.norm": "decoder.model.norm",
        r"decoder\.head": "decoder.lm_head",
    },
    "vq": {
        r"codebook": "quantize.embedding.weight",
        r"encoder\.quant_conv": "quant_conv",
        r"levels\.(\d+)\.blocks": r"down.\1.block",
        r"levels\.(\d+)\.attentions": r"down.\1.attn",
        r"downsamples\.(\d+)": r"down.\1.downsample.conv",
        r"middle\.block": "mid.block_",
        r"middle\.attention": "mid.attn_1",
        r"([qkv])_proj": r"\1",
        r"o_proj": "proj_out",
        r"shortcut": "nin_shortcut",
    },
}


def renamed(flat: Mapping[str, np.ndarray], config: Config) -> Iterator[tuple[str, str, Tensor]]:
    """(PyTorch's name, our path, tensor in PyTorch's layout) of our parameters or gradients.

    Stacked layers become one tensor each; the VQ's decoder, which trains nothing, stays behind.
    """
    for path, stacked in flat.items():
        if path.startswith("vq.decoder."):
            continue
        name = re.sub(r"\.(kernel|scale)$", ".weight", path)
        for pattern, name_there in NAMES.get(path.split(".")[0], {}).items():
            name = re.sub(pattern, name_there, name)
        for i, array in enumerate(stacked if "{layer}" in name else [stacked]):
            array = np.array(array, np.float32)
            if path == "siglip.patch_embed.kernel":
                size = config.siglip.patch_size
                array = array.reshape(size, size, 3, -1)
            if path.endswith(".kernel"):  # [..., in, out] -> [out, in, ...]
                array = np.moveaxis(array, (-1, -2), (0, 1))
            if path in ("decoder.embed.embedding", "decoder.head.kernel"):
                array = array[: config.decoder.vocab_size]  # ours is padded
            yield name.replace("{layer}", str(i)), path, reference.tensor(array)


class Twin:
    """The whole model with its optimizer, on one device.

    Args:
      config: of the run. Both heads, one scale, a frozen VQ and AdamW are what it knows; the
        learning rate stays at its peak, since a schedule costs no time.
      params: `{path: array}` of all our parameters.
      device: PyTorch's name of it. On a GPU the loss is compiled (`torch.compile`).

    Raises:
      ConfigError: a field that it does not know.
    """

    def __init__(self, config: Config, params: Mapping[str, np.ndarray], device: str = "cpu"):
        check(config)
        self.device = torch.device(device)
        train, optim = config.train, config.optim
        self.config, self.dtype = config, getattr(torch, train.dtype)
        paths, parts = {}, {"siglip": {}, "decoder": {}, "vq": {}, "levels": {}}
        for name, path, tensor in renamed(params, config):
            part, _, inside = name.partition(".")
            if part in NAMES:
                parts[part][inside] = tensor.numpy()
            else:
                parts["levels"][name] = tensor
            paths[name] = path

        def opened(part: str):
            return parts[part].__getitem__, list(parts[part])

        self.siglip = reference.siglip(*opened("siglip"), config.siglip, config.image_size)
        self.decoder = reference.decoder(*opened("decoder"), config.decoder)
        self.decoder.set_attn_implementation("sdpa")
        self.vq = reference.VQ(*opened("vq"), config.vq)
        self.levels = Levels(config)
        self.levels.load_state_dict(parts["levels"])
        for module in (self.siglip, self.decoder, self.levels):
            module.to(self.device)
        for name, weight in self.vq.weights.items():
            # Convolutions of bfloat16 are quickest with the channels last.
            order = torch.channels_last if weight.ndim == 4 else torch.preserve_format
            self.vq.weights[name] = weight.to(self.device, memory_format=order)
        # What "dots" recomputes, PyTorch's fused kernels never store.
        if train.remat == "full":
            for module in (self.siglip, self.decoder):
                module.train().gradient_checkpointing_enable()

        # Some releases of transformers put "vision_model." before an encoder's names.
        named = {
            f"{part}{name.removeprefix('vision_model.')}": parameter
            for part, module in (
                ("siglip.", self.siglip),
                ("decoder.", self.decoder),
                ("", self.levels),
            )
            for name, parameter in module.named_parameters()
        }
        learns = learning_parts(config)
        self.trained = {n: p for n, p in named.items() if n.split(".")[0] in learns}
        half = train.dtype == train.frozen_dtype == "bfloat16"
        for name, parameter in named.items():
            if name not in self.trained:
                parameter.requires_grad_(False)
                parameter.data = parameter.data.bfloat16() if half else parameter.data
        for name, weight in self.vq.weights.items():
            if half and not name.startswith("quantize."):
                self.vq.weights[name] = weight.bfloat16()
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [parameter],
                    "lr": optim.learning_rate * factor(optim.learning_rate_factors, paths[name]),
                    "weight_decay": 0.0
                    if re.fullmatch(optim.no_decay, paths[name])
                    else optim.weight_decay,
                }
                for name, parameter in self.trained.items()
            ],
            betas=(optim.b1, optim.b2),
            eps=optim.eps,
            fused=True,
        )
        self.loss_fn = self.loss if self.device.type == "cpu" else torch.compile(self.loss)

    def put(self, batch: Mapping[str, np.ndarray] | Batch) -> dict[str, Tensor]:
        """Arrays as tensors on the device; those that are there stay.

        Raises DataError if a sample lacks what the twin needs in all.
        """
        for flag in ("has_recon", "has_target", "has_bbox_orig", "has_bbox_recon"):
            # Tensors were looked at when they were made; asked again, they would stop the device.
            if not isinstance(batch[flag], Tensor) and not np.all(batch[flag]):
                raise DataError(f"{flag} is False in some samples; the twin needs it in all")
        return {name: torch.as_tensor(x, device=self.device) for name, x in batch.items()}

    def step(self, batch: Mapping[str, np.ndarray] | Batch) -> Tensor:
        """One update; returns its loss, which is there when the device has come to it.

        Args:
          batch: arrays or tensors of a `Batch` by name, of `train.accumulation_steps` accumulation
            steps.
        """
        loss = self.gradients(batch)
        nn.utils.clip_grad_norm_(self.trained.values(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def gradients(self, batch: Mapping[str, np.ndarray] | Batch) -> Tensor:
        """Adds to the parameters' gradients; returns the loss."""
        tensors = self.put(batch)
        counts = text_weights(tensors).sum(), code_weights(tensors, self.config).sum()
        total = torch.zeros((), device=self.device)
        for i in range(steps := self.config.train.accumulation_steps):
            micro = {name: tensor.chunk(steps)[i] for name, tensor in tensors.items()}
            half = self.dtype is torch.bfloat16
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                loss = self.loss_fn(micro, *counts)
            loss.backward()
            total += loss.detach()
        return total

    def loss(self, batch: Batch, text_count: Tensor, code_count: Tensor) -> Tensor:
        """The accumulation step's part of the loss; the counts are those of the whole update."""
        config, grid = self.config, self.config.patch_grid
        with torch.no_grad():
            orig, recon, target = (
                normalize(batch[f"image_{name}"], batch[f"region_{frame}"], config.data)
                for name, frame in (("orig", "orig"), ("recon", "recon"), ("target", "orig"))
            )
            affine = self.affine(batch)
            if config.level2.alignment == "pixels":
                recon = resample(recon, affine, config.image_size)
            use_mask_B = batch["has_object_mask"] & config.data.use_object_mask
            object_BHW = (batch["object_mask"] & use_mask_B[:, None, None]).float()
            object_BP = torch.where(use_mask_B[:, None], at_cells(object_BHW, grid), 1.0)
            region_BHW = box_mask(batch["region_recon"], config.image_size).float()
            region_BHW = resample(region_BHW[:, None], affine, config.image_size)[:, 0]
            visible_BP = (at_cells(region_BHW, grid) >= 0.5) & (object_BP >= 0.5)
            codes_BM = self.nearest(self.continuous(target))
        fused = self.levels.level1(orig, recon, object_BHW)
        read = [orig, recon] + ([fused] if config.level2.values == "fused" else [])
        orig_BPD, recon_BPD, *fused_BPD = self.features(read)
        if config.level2.alignment == "features":
            grid_BDHW = recon_BPD.transpose(1, 2).unflatten(2, (grid, grid))
            recon_BPD = resample(grid_BDHW, affine, config.image_size).flatten(2).transpose(1, 2)
        recon_BPD = recon_BPD * object_BP[..., None].to(recon_BPD.dtype)
        spatial_BPD = self.levels.level2(
            orig_BPD,
            recon_BPD,
            fused_BPD[0] if fused_BPD else recon_BPD,
            visible_BP if config.level2.mask_keys else None,
        )
        if config.level2.append_reconstruction:
            spatial_BPD = torch.cat([spatial_BPD, recon_BPD], dim=-1)
        z_BME = self.continuous(fused)
        vectors_BME = self.vq.vectors()[self.nearest(z_BME.detach())]
        vectors_BME = z_BME + (vectors_BME - z_BME).detach()
        sequence = [
            self.levels.level3["adapter_understand"](spatial_BPD),
            self.levels.level3["adapter_generate"](vectors_BME),
            self.decoder.model.embed_tokens(batch["tokens"]),
        ]
        hidden_BTD = self.decoder.model(
            inputs_embeds=torch.cat([x.to(self.dtype) for x in sequence], dim=1), use_cache=False
        ).last_hidden_state
        _, hidden_BMD, hidden_BLD = hidden_BTD.split([x.shape[1] for x in sequence], dim=1)
        text = self.cross_entropy(self.decoder.lm_head(hidden_BLD), batch["labels"])
        code = self.cross_entropy(self.levels.level3["head_generate"](hidden_BMD), codes_BM)
        text = (text * text_weights(batch)).sum() / text_count
        code = (code * code_weights(batch, config)).sum() / code_count
        return config.loss.text_weight * text + config.loss.code_weight * code

    def features(self, images: list[Tensor]) -> list[Tensor]:
        """SigLIP's features [B, P, D] of original, reconstruction and, if read, fused image."""
        if "siglip" in learning_parts(self.config):
            return [*self.siglip(torch.cat(images)).last_hidden_state.chunk(len(images))]
        with torch.no_grad():
            pair = self.siglip(torch.cat(images[:2])).last_hidden_state.chunk(2)
        return [*pair, *(self.siglip(x).last_hidden_state for x in images[2:])]

    def continuous(self, image_BCHW: Tensor) -> Tensor:
        """The VQ encoder's output [B, M, E]."""
        if (stem := self.config.vq.stem) > 1:
            x = image_BCHW.unflatten(3, (-1, stem)).unflatten(2, (-1, stem))
            image_BCHW = x.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
        return self.vq.continuous(image_BCHW).float()

    def nearest(self, z_BME: Tensor) -> Tensor:
        """Index [B, M] of the nearest code."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            vectors_CE = self.vq.vectors()
            return (vectors_CE.square().sum(dim=1) - 2 * z_BME @ vectors_CE.T).argmin(dim=-1)

    def affine(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scale and shift [B, 2] from the reconstruction's frame to the original's."""
        orig, recon = batch["bbox_orig"], batch["bbox_recon"]
        if self.config.level2.alignment == "none":
            return torch.ones_like(orig[:, :2]), torch.zeros_like(orig[:, :2])
        scale = orig[:, 2:] / recon[:, 2:].clamp(min=1.0)
        return scale, orig[:, :2] - scale * recon[:, :2]

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """In nats, of every position."""
        smoothing = self.config.loss.label_smoothing
        return functional.cross_entropy(
            logits.float().transpose(1, 2),
            labels.long(),
            reduction="none",
            label_smoothing=smoothing,
        )


# Fields that the twin knows with one value only.
FIXED = {
    "optim.name": "adamw",
    "fusion": "levels",
    "level1.num_scales": 1,
    "level1.learnable": True,
    "level3.generation": True,
    "freeze.vq": True,
    "decoder.dropout": 0.0,
}


def check(config: Config) -> None:
    """Raises ConfigError for what the twin does not know."""
    for name, value in FIXED.items():
        if get(config, name) != value:
            raise ConfigError(f"{name}={get(config, name)}: the PyTorch twin knows only {value}")
    for name in ("loss.text_weight", "loss.code_weight"):
        if get(config, name) == 0:
            raise ConfigError(f"{name}=0: the PyTorch twin always has both heads")


def learning_parts(config: Config) -> set[str]:
    """First names of the paths that learn."""
    freeze = config.freeze
    frozen = {
        "siglip": config.is_frozen("siglip"),
        "decoder": config.is_frozen("decoder"),
        "level1": freeze.level1,
        "level2": freeze.level2,
        "level3": freeze.adapters,
    }
    return {part for part, stays in frozen.items() if not stays}


def factor(table: tuple[tuple[str, float], ...], path: str) -> float:
    """Of the learning rate of a parameter."""
    return next((value for pattern, value in table if re.fullmatch(pattern, path)), 1.0)


def text_weights(batch: Batch) -> Tensor:
    """Weight of each text position [B, L]."""
    return batch["loss_mask"] * batch["weight"][:, None]


def code_weights(batch: Batch, config: Config) -> Tensor:
    """Weight of each cell [B, M]: none in padding, more where something covers the image."""
    inside = cell_means(box_mask(batch["region_orig"], config.image_size), config.code_grid) > 0.5
    covered = cell_means(batch["occluder_mask"], config.code_grid)
    weight = 1.0 + (config.loss.occluded_cell_weight - 1.0) * covered
    return inside * weight * batch["weight"][:, None]
