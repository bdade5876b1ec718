"""Which values of the configuration can work together."""

from __future__ import annotations

import math
import string

from htfa_jax.config import Config, get, leaves
from htfa_jax.errors import ConfigError


def validate(config: Config) -> None:
    """Raises ConfigError naming the fields, what they are and what they must be."""
    c, problems = config, list[str]()

    def refuse() -> None:
        if problems:
            raise ConfigError("the configuration cannot work:\n  " + "\n  ".join(problems))

    def need(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    def divides(small: str, large: str) -> None:
        a, b = get(c, small), get(c, large)
        need(a > 0 and b % a == 0, f"{large}={b} must be a multiple of {small}={a}")

    for name, value in leaves(c):
        if isinstance(value, float):
            need(math.isfinite(value), f"{name}={value} must be finite")
        if isinstance(value, int | float) and not isinstance(value, bool):
            rest = name in _MESH and value == -1
            need(value >= 0 or rest, f"{name}={value} must not be negative")
            need(value < _HUGE, f"{name} is {len(str(value))} digits long: too large")
    for name in _POSITIVE:
        value = get(c, name)
        need(value is None or value != 0, f"{name}={value} must be above 0")
    for name in _PROBABILITIES:
        need(0 <= get(c, name) < 1, f"{name}={get(c, name)} must be in [0, 1)")

    scales = c.level1.num_scales
    need(scales <= 16, f"level1.num_scales={scales} must be at most 16")
    levels = c.vq.channel_multipliers
    fine = 0 < len(levels) <= 16 and all(0 < m < 2**16 for m in levels)
    need(fine, f"vq.channel_multipliers={levels} must be 1 to 16 numbers above 0")
    if not fine or scales > 16 or 0 in (c.siglip.patch_size, c.vq.stem):
        refuse()  # what follows computes with these

    need(
        not c.vq_train.perceptual_weight or c.pretrained.siglip is not None,
        f"vq_train.perceptual_weight={c.vq_train.perceptual_weight} compares the features of "
        "pretrained.siglip, which is not given",
    )
    divides("siglip.patch_size", "image_size")
    divides("siglip.num_heads", "siglip.embed_dim")
    divides("level2.num_heads", "siglip.embed_dim")
    divides("decoder.num_heads", "decoder.embed_dim")
    divides("decoder.num_kv_heads", "decoder.num_heads")
    head_dim = c.decoder.embed_dim // max(c.decoder.num_heads, 1)
    need(head_dim % 2 == 0, f"decoder head size {head_dim} must be even (rotary embedding)")
    if c.level3.generation:
        need(
            c.image_size % c.vq_downsampling == 0,
            f"image_size={c.image_size} must be a multiple of the VQ downsampling "
            f"{c.vq_downsampling} (vq.stem x 2 per level of vq.channel_multipliers)",
        )
    need(
        0 < c.level1.init_alpha < 1,
        f"level1.init_alpha={c.level1.init_alpha} must be inside (0, 1)",
    )
    need(
        c.level1.num_scales == 1 or c.level1.alpha == "map",
        "level1.num_scales > 1 works with level1.alpha=map only",
    )
    shrink = 2 ** (max(c.level1.num_scales, 1) - 1)
    need(
        c.image_size % shrink == 0,
        f"image_size={c.image_size} must halve {c.level1.num_scales - 1} times (level1.num_scales)",
    )
    need(
        c.loss.text_weight + c.loss.code_weight > 0,
        "loss.text_weight and loss.code_weight are both 0: nothing to train",
    )
    need(
        c.level3.generation or c.loss.code_weight == 0,
        f"level3.generation=False has no codes: set loss.code_weight=0 "
        f"(it is {c.loss.code_weight})",
    )
    need(
        c.loss.code_weight > 0 or not c.data.cache_codes,
        "data.cache_codes=True: without code loss (loss.code_weight=0) there are no target codes",
    )
    need(
        c.is_frozen("siglip") or not c.data.cache_features,
        "data.cache_features=True needs a SigLIP that stays as it is: set freeze.siglip=True and "
        "pretrained.siglip or pretrained.run",
    )
    need(
        c.fusion == "levels" or not c.data.cache_features,
        f"data.cache_features=True keeps what Level 2 reads, and fusion={c.fusion} has no Level 2",
    )
    kept = [n for n in ("data.cache_codes", "data.cache_features") if get(c, n)]
    changed = [f"{n}={v}" for n, v in leaves(c) if n.startswith("augment.") and v]
    need(
        not kept or not changed,
        f"{' and '.join(kept)} would keep what the encoders make of unchanged pictures, while "
        f"{', '.join(changed)} changes them in every epoch: leave one of the two off",
    )
    longest = c.num_patches + c.num_codes + c.data.max_text_length + c.eval.max_new_tokens
    limit = c.decoder.max_positions
    need(
        limit is None or longest <= limit,
        f"sequences of up to {longest} tokens (patches, codes, data.max_text_length, "
        f"eval.max_new_tokens) are longer than decoder.max_positions={limit}",
    )
    pretrained = ("siglip", "vq", "decoder", "htfa")
    given = [f"pretrained.{p}" for p in pretrained if getattr(c.pretrained, p) is not None]
    need(
        c.pretrained.run is None or not given,
        f"pretrained.run={c.pretrained.run} gives all weights: leave {', '.join(given)} unset",
    )
    buckets = c.data.text_buckets
    need(
        bool(buckets) and list(buckets) == sorted(set(buckets)) and min(buckets) > 0,
        f"data.text_buckets={buckets} must be rising lengths",
    )
    need(
        bool(buckets) and buckets[-1] >= c.data.max_text_length,
        f"the last of data.text_buckets={buckets} must reach "
        f"data.max_text_length={c.data.max_text_length}",
    )
    for source, weight in c.data.sources:
        need(
            math.isfinite(weight) and weight > 0,
            f"data.sources: the weight of {source} must be above 0, it is {weight}",
        )
    need(
        c.data.recon_template is None or _is_template(c.data.recon_template),
        f"data.recon_template={c.data.recon_template!r} must name fields of a record in braces, "
        "as in recon/{id}.png; braces that are meant as such are doubled",
    )
    open_ended = [name for name in _MESH if get(c, name) == -1]
    need(
        len(open_ended) <= 1,
        f"{' and '.join(open_ended)} are both -1: one of them can take what is left",
    )
    refuse()


def _is_template(text: str) -> bool:
    """Whether it is a format string of plain names, one at least."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError:
        return False
    return bool(names) and all(name.isidentifier() for name in names)


_HUGE = 2**63
_MESH = ("sharding.data", "sharding.fsdp", "sharding.tensor")
_POSITIVE = """
    sharding.data sharding.fsdp sharding.tensor
    image_size siglip.patch_size siglip.num_layers siglip.num_heads siglip.mlp_dim vq.stem
    vq.base_channels vq.num_res_blocks vq.z_channels vq.codebook_size vq.codebook_dim
    decoder.vocab_size decoder.num_layers decoder.num_heads decoder.num_kv_heads decoder.mlp_dim
    decoder.rope_theta decoder.rope_factor decoder.max_positions level1.num_scales
    level1.head_channels level2.num_heads
    level3.adapter_mlp_dim loss.text_chunk data.max_text_length data.num_threads optim.clip_norm
    optim.num_cycles train.batch_size train.accumulation_steps train.epochs train.max_steps
    train.log_every train.save_every train.keep_checkpoints eval.every eval.batch_size
    eval.max_samples eval.max_new_tokens vq_train.num_steps vq_train.batch_size
    vq_train.revive_after vq_train.save_every
""".split()
_PROBABILITIES = """
    decoder.dropout level2.dropout level3.adapter_dropout loss.label_smoothing optim.b1 optim.b2
    optim.warmup_ratio augment.crop augment.flip augment.brightness augment.gamma augment.saturation
""".split()
