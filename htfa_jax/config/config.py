"""The configuration: frozen dataclasses, each field typed, with its default and a comment.

`Config.__post_init__` validates, so a `Config` that exists can work. How one is read, changed
and written is in `config.io`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from htfa_jax.config import checks
from htfa_jax.config.fields import leaves
from htfa_jax.config.sections import (
    AugmentConfig,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    FreezeConfig,
    Fusion,
    HeldObjectsConfig,
    Level1Config,
    Level2Config,
    Level3Config,
    LossConfig,
    OptimConfig,
    PretrainedConfig,
    ShardingConfig,
    SigLIPConfig,
    TrainConfig,
    VQConfig,
    VQTrainConfig,
)
from htfa_jax.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    seed: int = 0  # of weights, data order and dropout
    image_size: int = 448  # pixels, both sides
    fusion: Fusion = "levels"  # Levels 1 and 2; or, to compare with, images as they are
    siglip: SigLIPConfig = field(default_factory=SigLIPConfig)
    vq: VQConfig = field(default_factory=VQConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    level1: Level1Config = field(default_factory=Level1Config)
    level2: Level2Config = field(default_factory=Level2Config)
    level3: Level3Config = field(default_factory=Level3Config)
    loss: LossConfig = field(default_factory=LossConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    held_objects: HeldObjectsConfig = field(default_factory=HeldObjectsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    vq_train: VQTrainConfig = field(default_factory=VQTrainConfig)

    def __post_init__(self) -> None:
        problems = [*checks.numbers(self), *checks.divisors(self.level1, self.vq, self.siglip)]
        # The others divide by what these two look at.
        if checks.can_divide(self.level1, self.vq, self.siglip):
            problems += self._problems()
        if problems:
            raise ConfigError("the configuration cannot work:\n  " + "\n  ".join(problems))

    def __str__(self) -> str:
        """One field a line, `train.batch_size = 2`, as flags and messages name them."""
        return "\n".join(f"{name} = {value!r}" for name, value in leaves(self))

    def _problems(self) -> Iterator[str]:
        yield from checks.siglip(self.siglip, self.level2, self.image_size)
        if self.level3.generation:
            yield from checks.vq(self.vq, self.image_size)
        text = self.data.max_text_length + self.eval.max_new_tokens
        yield from checks.decoder(self.decoder, self.num_patches + self.num_codes + text)
        yield from checks.level1(self.level1, self.image_size)
        yield from checks.loss(self.loss, self.level3)
        yield from checks.pretrained(self.pretrained, self.vq_train)
        yield from checks.data(self.data)
        yield from checks.caches(self)
        yield from checks.optim(self.optim)
        yield from checks.best_metric(self.train.best_metric, self.data.validation)
        yield from checks.sharding(self.sharding)

    def is_frozen(self, component: Literal["siglip", "vq", "decoder"]) -> bool:
        """Whether a component that can be pretrained stays as it is.

        One that starts at random must learn, whatever its freeze flag says, unless
        `pretrained.random_components` asks for the flags as they are. The VQ never starts at
        random: its own stage comes first.
        """
        if component == "vq" or self.pretrained.random_components == "as_configured":
            return getattr(self.freeze, component)
        pretrained = getattr(self.pretrained, component) or self.pretrained.run
        return getattr(self.freeze, component) and pretrained is not None

    @property
    def patch_grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.siglip.patch_size

    @property
    def num_patches(self) -> int:
        """Understanding tokens of a sample."""
        return self.patch_grid**2 * self.images_read

    @property
    def understand_dim(self) -> int:
        """Width of the features that the understanding adapter reads."""
        appended = self.fusion == "levels" and self.level2.append_reconstruction
        return self.siglip.embed_dim * (2 if appended else 1)

    @property
    def num_codes(self) -> int:
        """Generation tokens of a sample."""
        return self.code_grid**2 * self.images_read if self.level3.generation else 0

    @property
    def has_alpha(self) -> bool:
        """Whether Level 1 has parameters: it may learn, and the fused image is read."""
        is_read = self.level2.values == "fused" or self.level3.generation
        return self.fusion == "levels" and self.level1.learnable and is_read

    @property
    def images_read(self) -> int:
        """Images that the decoder sees the tokens of."""
        return 2 if self.fusion == "tokens" else 1

    @property
    def vq_downsampling(self) -> int:
        """Pixels along one side of a code's cell."""
        return self.vq.stem * 2 ** (len(self.vq.channel_multipliers) - 1)

    @property
    def code_grid(self) -> int:
        """Codes along one side."""
        return self.image_size // self.vq_downsampling
