"""Floating-point operations counted from the architecture, a multiply-add as two.

Matrix products and convolutions only. With T tokens of width D and N heads, a transformer block
costs 2 T (parameters of its matrices) + 4 T S D for attention over S keys (half of it if
causal). Training costs a part three times its forward pass if it learns, twice if gradients only
pass through it, once if not even that; what rematerialisation computes again is not counted.
"""

from __future__ import annotations

from htfa_jax.config import Config, VQConfig


def block_params(width: int, mlp: int, kv_width: int, mlp_matrices: int) -> int:
    """Parameters of a transformer block's matrices."""
    return 2 * width * width + 2 * width * kv_width + mlp_matrices * width * mlp


def siglip(config: Config) -> float:
    """One SigLIP pass over one image."""
    c, tokens = config.siglip, config.patch_grid**2
    block = 2 * tokens * block_params(c.embed_dim, c.mlp_dim, c.embed_dim, 2)
    block += 4 * tokens * tokens * c.embed_dim
    return c.num_layers * block + 2 * tokens * c.patch_size**2 * 3 * c.embed_dim


def vq_encoder(config: VQConfig, image_size: int) -> float:
    """One pass of the VQ encoder over one image."""
    side = image_size // config.stem
    widths = [config.base_channels * m for m in config.channel_multipliers]
    total = side**2 * 9 * 3 * config.stem**2 * config.base_channels
    before = config.base_channels
    for i, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            total += side**2 * (9 * (before * width + width * width))
            total += side**2 * before * width * (before != width)
            before = width
            if config.attention == "lowest" and i == len(widths) - 1:
                total += 4 * side**2 * width**2 + 2 * side**4 * width
        if i < len(widths) - 1:
            side //= 2
            total += side**2 * 9 * width * width
    total += side**2 * 9 * 4 * before**2 + 4 * side**2 * before**2 + 2 * side**4 * before
    total += side**2 * config.z_channels * (9 * before + config.codebook_dim)
    total += side**2 * config.codebook_size * config.codebook_dim
    return 2.0 * total


def decoder(config: Config, text_length: int) -> float:
    """One causal pass over the joint sequence, LM head included."""
    c = config.decoder
    tokens = sequence_length(config, text_length)
    kv_width = c.num_kv_heads * (c.embed_dim // c.num_heads)
    block = 2 * tokens * block_params(c.embed_dim, c.mlp_dim, kv_width, 3)
    block += 2 * tokens * tokens * c.embed_dim
    head = 2 * text_length * c.embed_dim * c.vocab_size if config.loss.text_weight else 0
    return c.num_layers * block + head


def levels(config: Config) -> float:
    """Level 2, the adapters and the generation head (Level 1 is too small to count)."""
    patches, codes, width = config.num_patches, config.num_codes, config.siglip.embed_dim
    read, out = config.understand_dim, config.decoder.embed_dim
    hidden = config.level3.adapter_mlp_dim or 4 * out
    total = patches * hidden * (read + out) + codes * hidden * (config.vq.codebook_dim + out)
    if config.fusion == "levels":
        total += patches * 4 * width**2 + 2 * patches**2 * width
    total += config.code_grid**2 * out * config.vq.codebook_size if config.loss.code_weight else 0
    return 2.0 * total


def sequence_length(config: Config, text_length: int) -> int:
    """Tokens of a sample that the decoder sees."""
    text = text_length if config.loss.text_weight else 0
    return config.num_patches + config.num_codes + text


def training_step(config: Config, text_length: int) -> dict[str, float]:
    """Operations of one sample in one training step, by part."""
    # Only the fused image's pass carries gradients past a frozen encoder, if Level 1 learns.
    is_fused, read = config.fusion == "levels", config.images_read
    learns = config.has_alpha and not config.freeze.level1
    passes = 2 if learns else read
    unlearned = 2 if is_fused and not config.data.cache_features else 0
    of_fused = 1 if config.level2.values == "fused" or not is_fused else 0
    if config.is_frozen("siglip"):
        siglip_passes = unlearned + of_fused * passes
    else:
        siglip_passes = 3 * (2 + of_fused if is_fused else read)
    parts = {
        "siglip": siglip_passes * siglip(config),
        "levels": 3 * levels(config),
        "decoder": (2 if config.is_frozen("decoder") else 3) * decoder(config, text_length),
    }
    if config.level3.generation:
        once = vq_encoder(config.vq, config.image_size)
        targets = 1 if config.loss.code_weight and not config.data.cache_codes else 0
        parts["vq"] = ((passes if config.is_frozen("vq") else 3 * read) + targets) * once
    return parts
