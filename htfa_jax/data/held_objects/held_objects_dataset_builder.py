"""HeldObjects as a TFDS dataset: `tfds.data_source("held_objects/448px", split="train")`.

Importing this module makes the name known. The same scenes as those of the embedded dataset are
drawn, into the same cache, then written as ArrayRecord files. `tfds.data_source` builds and reads
them without TensorFlow; the command `tfds build`, which does the same in this folder, imports
tensorflow, apache_beam and mlcroissant, whatever it builds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from htfa_jax.config import DataConfig, HeldObjectsConfig
from htfa_jax.data.held_objects.builder import drawn_scenes
from htfa_jax.data.records import SPLITS, Split

IMAGES = {"image_orig": "jpeg", "image_recon": "png", "image_target": "jpeg"}
MASKS = ("object_mask", "occluder_mask")


@dataclasses.dataclass(kw_only=True)
class SceneConfig(tfds.core.BuilderConfig):
    """Which scenes are drawn.

    Attributes:
      image_size: pixels, both sides.
      scenes: how many of each split, their seed, the answers' form.
      cache_dir: where drawn scenes are kept.
    """

    image_size: int
    scenes: HeldObjectsConfig = dataclasses.field(default_factory=HeldObjectsConfig)
    cache_dir: str = DataConfig.cache_dir


class Builder(tfds.core.GeneratorBasedBuilder):
    """Scenes in which a hand holds an object and hides part of it, with questions."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        SceneConfig(name=f"{size}px", description=f"{size} pixels", image_size=size)
        for size in (448, 224, 112)
    ]

    def __init__(self, *, file_format: Any = None, **options: Any):
        # TFDS's own default needs TensorFlow, and cannot be read at random.
        super().__init__(file_format=file_format or "array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        text = features.Text()
        number = features.Scalar(np.float32)
        images = {
            name: features.Image(shape=(None, None, 3), encoding_format=form)
            for name, form in IMAGES.items()
        }
        masks = {
            name: features.Image(shape=(None, None, 1), encoding_format="png") for name in MASKS
        }
        boxes = {
            name: features.Tensor(shape=(4,), dtype=np.float32)
            for name in ("bbox_orig", "bbox_recon")
        }
        turn = {"from": text, "value": text, "kind": text}
        meta = {"category": text, "color": text, "occlusion": number, "drawn_occlusion": number}
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "Procedural scenes in which a hand holds an object and hides part of it: the "
                "photograph, a degraded reconstruction of the object, the scene without the hand, "
                "masks, boxes (x, y, width, height in pixels), and questions with answers."
            ),
            disable_shuffling=True,  # records in the order of the embedded dataset
            features=features.FeaturesDict(
                {"id": text, **images, **masks, **boxes}
                | {"conversations": features.Sequence(turn), "meta": meta}
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
        made = self.builder_config
        folder = Path(made.cache_dir).expanduser()
        records = drawn_scenes(made.scenes, made.image_size, split, folder)
        for i in range(len(records)):
            record = records[i]
            files = {name: getattr(record, name).read_bytes() for name in (*IMAGES, *MASKS)}
            turns = [{"kind": "", **turn} for turn in record.raw["conversations"]]
            yield i, {**record.raw, **files, "conversations": turns}
