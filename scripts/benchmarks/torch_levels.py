"""The three levels in PyTorch, and the arithmetic on images that they need.

Parts of `torch_twin`; the letters are its own. See `htfa_jax.models` for what is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from htfa_jax.config import Config, DataConfig, Level1Config, Level2Config, Level3Config


class AlphaHead(nn.Module):
    """(original, reconstruction, object mask) -> what to add to raw."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(7, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, orig_BCHW: Tensor, recon_BCHW: Tensor, mask_BHW: Tensor) -> Tensor:
        x = functional.avg_pool2d(torch.cat([orig_BCHW, recon_BCHW, mask_BHW[:, None]], dim=1), 4)
        x = functional.gelu(self.conv1(x), approximate="tanh")
        x = functional.gelu(self.conv2(x), approximate="tanh")
        return resize(self.conv3(x).float(), orig_BCHW.shape[2:])


class Level1(nn.Module):
    """Blends the images by a map, or by a map and what the head sees."""

    def __init__(self, config: Level1Config, image_size: int):
        super().__init__()
        self.raw = nn.ParameterList([nn.Parameter(torch.zeros(image_size, image_size))])
        if config.alpha == "predicted":
            self.head = AlphaHead(config.head_channels)

    def forward(self, orig_BCHW: Tensor, recon_BCHW: Tensor, mask_BHW: Tensor) -> Tensor:
        raw = self.raw[0]
        if hasattr(self, "head"):
            raw = raw + self.head(orig_BCHW, recon_BCHW, mask_BHW)
        return torch.lerp(recon_BCHW, orig_BCHW, torch.sigmoid(raw))


class Level2(nn.Module):
    """Attention from the original to the reconstruction's keys, and to values of either image."""

    def __init__(self, config: Level2Config, size: int):
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(size, size))
        self.norm = nn.LayerNorm(size)

    def forward(
        self, orig_BPD: Tensor, recon_BPD: Tensor, values_BPD: Tensor, visible_BP: Tensor | None
    ) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj, x in (
                (self.q_proj, orig_BPD),
                (self.k_proj, recon_BPD),
                (self.v_proj, values_BPD),
            )
        )
        mask, some_B11 = None, None
        if visible_BP is not None:
            some_B11 = visible_BP.any(dim=1)[:, None, None]
            mask = (visible_BP[:, None] | ~some_B11)[:, None]
        out = functional.scaled_dot_product_attention(q, k, v, mask, self.dropout)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return self.norm((out if some_B11 is None else out * some_B11) + orig_BPD)


class Adapter(nn.Module):
    """An encoder's tokens to the decoder's width."""

    def __init__(self, config: Level3Config, in_features: int, out_features: int):
        super().__init__()
        hidden = config.adapter_mlp_dim or 4 * out_features
        self.fc1, self.fc2 = nn.Linear(in_features, hidden), nn.Linear(hidden, out_features)
        self.dropout = nn.Dropout(config.adapter_dropout)
        self.norm = nn.LayerNorm(out_features) if config.adapter_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(functional.gelu(self.fc1(x)))
        return self.norm(self.dropout(self.fc2(x)))


class Levels(nn.Module):
    """What is neither encoder nor decoder; parameters are named as ours are."""

    def __init__(self, config: Config):
        super().__init__()
        patch_dim, size = config.siglip.embed_dim, config.decoder.embed_dim
        self.level1 = Level1(config.level1, config.image_size)
        self.level2 = Level2(config.level2, patch_dim)
        self.level3 = nn.ModuleDict(
            {
                "adapter_understand": Adapter(config.level3, config.understand_dim, size),
                "adapter_generate": Adapter(config.level3, config.vq.codebook_dim, size),
                "head_generate": nn.Linear(size, config.vq.codebook_size, bias=False),
            }
        )


def normalize(image_BHWC: Tensor, region_B4: Tensor, config: DataConfig) -> Tensor:
    """8-bit RGB to normalised [B, C, H, W], 0 outside the region."""
    mean, std = (
        torch.tensor(x, device=image_BHWC.device)[:, None, None]
        for x in (config.image_mean, config.image_std)
    )
    x_BCHW = (image_BHWC.permute(0, 3, 1, 2).float() / 255.0 - mean) / std
    return x_BCHW * box_mask(region_B4, image_BHWC.shape[1])[:, None]


def box_mask(box_B4: Tensor, size: int) -> Tensor:
    """Pixels [B, H, W] whose centres lie in the box."""
    x, y, w, h = box_B4[:, :, None].unbind(dim=1)
    centre = (torch.arange(size, device=box_B4.device) + 0.5)[None]
    rows_BH, columns_BW = (centre >= y) & (centre < y + h), (centre >= x) & (centre < x + w)
    return rows_BH[:, :, None] & columns_BW[:, None]


def resample(x_BCHW: Tensor, affine: tuple[Tensor, Tensor], image_size: int) -> Tensor:
    """Moves a grid over the reconstruction into the original's frame: one matrix per axis."""
    cells = x_BCHW.shape[-1]
    cell_size = image_size / cells
    cell = torch.arange(cells, dtype=torch.float32, device=x_BCHW.device)
    point_T = (cell + 0.5) * cell_size
    scale_B2, shift_B2 = affine
    source_B2T = (point_T - shift_B2[..., None]) / scale_B2[..., None] / cell_size - 0.5
    weights_B2TS = (1.0 - (source_B2T[..., None] - cell).abs()).clamp(min=0.0)
    columns_B1TS, rows_B1TS = weights_B2TS[:, :1], weights_B2TS[:, 1:]
    with torch.autocast(x_BCHW.device.type, enabled=False):
        return (rows_B1TS @ x_BCHW.float() @ columns_B1TS.mT).to(x_BCHW.dtype)


def resize(x_BCHW: Tensor, size: torch.Size) -> Tensor:
    """Bilinear, half-pixel centres; [B, H, W] of one channel."""
    return functional.interpolate(x_BCHW, tuple(size), mode="bilinear", align_corners=False)


def at_cells(mask_BHW: Tensor, grid: int) -> Tensor:
    """A mask read at the centres of a grid's cells [B, P]."""
    return resize(mask_BHW[:, None], (grid, grid)).flatten(1)


def cell_means(mask_BHW: Tensor, grid: int) -> Tensor:
    """Part of each cell that a mask covers [B, M]."""
    size = mask_BHW.shape[-1] // grid
    return functional.avg_pool2d(mask_BHW.float()[:, None], size).flatten(1)
