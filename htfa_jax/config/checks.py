"""Which values of the configuration can work: one function a section, each gives its problems.

Every problem is a sentence that names the field, its value and what it must be.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from htfa_jax.common.templates import check_template
from htfa_jax.config.fields import get, leaves
from htfa_jax.config.sections import (
    DataConfig,
    DecoderConfig,
    Level1Config,
    Level2Config,
    Level3Config,
    LossConfig,
    OptimConfig,
    PretrainedConfig,
    ShardingConfig,
    SigLIPConfig,
    VQConfig,
    VQTrainConfig,
)

Problems = Iterator[str]

HUGE = 2**63
MAX_SCALES = 16  # that an image is halved to
MESH_AXES = ("sharding.data", "sharding.fsdp", "sharding.tensor")
# What an evaluation gives by short names (`evaluation.report.scalars`), and the kinds of questions
# about drawn scenes.
METRICS = (
    *("loss", "text_loss", "code_loss", "code_accuracy"),
    *("alpha_mean", "alpha_std", "attention_entropy"),
    *(f"psnr/{region}" for region in ("all", "occluder", "occluded")),
    *(f"ssim/{region}" for region in ("all", "occluder", "occluded")),
)
KINDS = ("category", "clear", "color", "occlusion_ratio", "joint")
POSITIVE = """
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
PROBABILITIES = """
    decoder.dropout level2.dropout level3.adapter_dropout loss.label_smoothing optim.b1 optim.b2
    optim.warmup_ratio augment.crop augment.flip augment.brightness augment.gamma augment.saturation
""".split()


def numbers(config: Any) -> Problems:
    """Of every field of a `Config`: finite, not negative, not huge, in its range."""
    for name, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name}={value} must be finite"
        if isinstance(value, int | float) and not isinstance(value, bool):
            takes_the_rest = name in MESH_AXES and value == -1
            if value < 0 and not takes_the_rest:
                yield f"{name}={value} must not be negative"
            if value >= HUGE:
                yield f"{name}={_short(value)} is too large"
    for name in POSITIVE:
        if get(config, name) == 0:
            yield f"{name}=0 must be above 0"
    for name in PROBABILITIES:
        if not 0 <= get(config, name) < 1:
            yield f"{name}={get(config, name)} must be in [0, 1)"


def _short(value: int | float) -> str:
    """A number as it is, or of a long one how long it is."""
    text = str(value)
    return text if len(text) <= 24 else f"{text[:6]}... ({len(text)} digits)"


def divisors(level1: Level1Config, vq: VQConfig, siglip: SigLIPConfig) -> Problems:
    """What image sizes are divided by; that a field is above 0 is among `numbers`."""
    if level1.num_scales > MAX_SCALES:
        yield f"level1.num_scales={level1.num_scales} must be at most {MAX_SCALES}"
    multipliers = vq.channel_multipliers
    if not (0 < len(multipliers) <= MAX_SCALES and all(0 < m < 2**16 for m in multipliers)):
        yield f"vq.channel_multipliers={multipliers} must be 1 to {MAX_SCALES} numbers above 0"


def can_divide(level1: Level1Config, vq: VQConfig, siglip: SigLIPConfig) -> bool:
    """Whether the other checks can be computed."""
    return siglip.patch_size > 0 and vq.stem > 0 and not any(divisors(level1, vq, siglip))


def siglip(siglip: SigLIPConfig, level2: Level2Config, image_size: int) -> Problems:
    """Patches fill the image, heads the width."""
    yield from _multiple("image_size", image_size, "siglip.patch_size", siglip.patch_size)
    for name, heads in (("siglip", siglip.num_heads), ("level2", level2.num_heads)):
        yield from _multiple("siglip.embed_dim", siglip.embed_dim, f"{name}.num_heads", heads)


def vq(vq: VQConfig, image_size: int) -> Problems:
    """Cells of the codes fill the image."""
    cell = vq.stem * 2 ** (len(vq.channel_multipliers) - 1)
    if image_size % cell:
        yield (
            f"image_size={image_size} must be a multiple of the VQ downsampling {cell} "
            "(vq.stem x 2 per level of vq.channel_multipliers)"
        )


def decoder(decoder: DecoderConfig, longest: int) -> Problems:
    """Heads fill the width; the longest sequence has positions."""
    yield from _multiple(
        "decoder.embed_dim", decoder.embed_dim, "decoder.num_heads", decoder.num_heads
    )
    yield from _multiple(
        "decoder.num_heads", decoder.num_heads, "decoder.num_kv_heads", decoder.num_kv_heads
    )
    head_dim = decoder.embed_dim // max(decoder.num_heads, 1)
    if head_dim % 2:
        yield f"decoder head size {head_dim} must be even (rotary embedding)"
    limit = decoder.max_positions
    if limit is not None and longest > limit:
        yield (
            f"sequences of up to {longest} tokens (patches, codes, data.max_text_length, "
            f"eval.max_new_tokens) are longer than decoder.max_positions={limit}"
        )


def level1(level1: Level1Config, image_size: int) -> Problems:
    """Alpha and its scales."""
    if not 0 < level1.init_alpha < 1:
        yield f"level1.init_alpha={level1.init_alpha} must be inside (0, 1)"
    if level1.num_scales > 1 and level1.alpha != "map":
        yield "level1.num_scales > 1 works with level1.alpha=map only"
    if image_size % 2 ** (max(level1.num_scales, 1) - 1):
        halvings = level1.num_scales - 1
        yield f"image_size={image_size} must halve {halvings} times (level1.num_scales)"


def loss(loss: LossConfig, level3: Level3Config) -> Problems:
    """There is something to train, and what it needs exists."""
    if loss.text_weight + loss.code_weight <= 0:
        yield "loss.text_weight and loss.code_weight are both 0: nothing to train"
    if loss.code_weight and not level3.generation:
        yield (
            "level3.generation=False has no codes: set loss.code_weight=0 "
            f"(it is {loss.code_weight})"
        )


def pretrained(pretrained: PretrainedConfig, vq_train: VQTrainConfig) -> Problems:
    """Weights come from one place."""
    components = ("siglip", "vq", "decoder", "htfa")
    given = [f"pretrained.{c}" for c in components if getattr(pretrained, c) is not None]
    if pretrained.run is not None and given:
        yield (f"pretrained.run={pretrained.run} gives all weights: leave {', '.join(given)} unset")
    if vq_train.perceptual_weight and pretrained.siglip is None:
        yield (
            f"vq_train.perceptual_weight={vq_train.perceptual_weight} compares the features of "
            "pretrained.siglip, which is not given"
        )


def data(data: DataConfig) -> Problems:
    """Images, lengths, sources, templates."""
    for name in ("image_mean", "image_std"):
        values = getattr(data, name)
        if not all(math.isfinite(x) for x in values):
            yield f"data.{name}={values} must be finite"
    if not all(x > 0 for x in data.image_std):
        yield f"data.image_std={data.image_std} must be above 0: images are divided by it"
    buckets = data.text_buckets
    if not buckets or list(buckets) != sorted(set(buckets)) or min(buckets) <= 0:
        yield f"data.text_buckets={buckets} must be rising lengths"
    if not buckets or buckets[-1] < data.max_text_length:
        yield (
            f"the last of data.text_buckets={buckets} must reach "
            f"data.max_text_length={data.max_text_length}"
        )
    for source, weight in data.sources:
        if not math.isfinite(weight) or weight <= 0:
            yield f"data.sources: the weight of {source} must be above 0, it is {weight}"
    if data.recon_template is not None:
        try:
            check_template(data.recon_template)
        except ValueError as error:
            yield (
                f"data.recon_template={data.recon_template!r} must name fields of a record in "
                "braces, as in recon/{id}.png; braces that are meant as such are doubled: "
                f"{error}"
            )


def caches(config: Any) -> Problems:
    """What is kept on disk is wanted, and the same in every epoch."""
    data = config.data
    if data.cache_codes and not config.loss.code_weight:
        yield (
            "data.cache_codes=True: without code loss (loss.code_weight=0) there are no target "
            "codes"
        )
    if data.cache_features and not config.is_frozen("siglip"):
        yield (
            "data.cache_features=True needs a SigLIP that stays as it is: set freeze.siglip=True "
            "and pretrained.siglip or pretrained.run"
        )
    if data.cache_features and config.fusion != "levels":
        yield (
            "data.cache_features=True keeps what Level 2 reads, and "
            f"fusion={config.fusion} has no Level 2"
        )
    cached = [f"data.{n}" for n in ("cache_codes", "cache_features") if getattr(data, n)]
    changes = [f"augment.{n}={v}" for n, v in leaves(config.augment) if v]
    if cached and changes:
        yield (
            f"{' and '.join(cached)} would keep what the encoders make of unchanged images, while "
            f"{', '.join(changes)} changes them in every epoch: leave one of the two off"
        )


def optim(optim: OptimConfig) -> Problems:
    """Its regular expressions compile, its factors are numbers."""
    patterns = [("optim.no_decay", optim.no_decay)]
    patterns += [("optim.learning_rate_factors", p) for p, _ in optim.learning_rate_factors]
    for name, pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{name}: {pattern!r} is no regular expression: {error}"
    for pattern, factor in optim.learning_rate_factors:
        if not math.isfinite(factor) or factor < 0:
            yield (
                f"optim.learning_rate_factors: the factor of {pattern!r} must not be negative, "
                f"it is {factor}"
            )


def best_metric(metric: str, validation: str | None) -> Problems:
    """`train.best_metric` names what an evaluation gives; kinds of own questions are not known."""
    if validation is None or metric in METRICS:
        return
    kind = metric.removeprefix("accuracy/")
    if kind != metric and (validation != DataConfig.train or kind in KINDS):
        return
    known = [*METRICS, *(f"accuracy/{name}" for name in KINDS)]
    near = difflib.get_close_matches(metric, known, n=1)
    yield (
        f"train.best_metric={metric} is not a validation metric"
        + (f"; did you mean {near[0]}?" if near else "")
        + f" There are: {', '.join(METRICS)}, accuracy/KIND of question "
        + f"(of drawn scenes: {', '.join(KINDS)})"
    )


def sharding(sharding: ShardingConfig) -> Problems:
    """At most one axis takes the devices that are left."""
    open_ended = [n for n in MESH_AXES if getattr(sharding, n.removeprefix("sharding.")) == -1]
    if len(open_ended) > 1:
        yield f"{' and '.join(open_ended)} are both -1: one of them can take what is left"


def _multiple(large: str, b: int, small: str, a: int) -> Problems:
    if a <= 0 or b % a:
        yield f"{large}={b} must be a multiple of {small}={a}"
