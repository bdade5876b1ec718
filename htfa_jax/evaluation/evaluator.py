"""Evaluation of a run: answers by decoding, completed images against four references."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from htfa_jax.checkpoints.loading import load_run
from htfa_jax.common.compiling import compiling
from htfa_jax.common.logs import progress
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, LossConfig
from htfa_jax.data.batch import Batch
from htfa_jax.data.pipeline import Loaded, evaluation_batches
from htfa_jax.data.records import Dataset, Record, Split, Turn
from htfa_jax.data.splits import open_split
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.evaluation.image_metrics import flat_fill, image_scores, image_sums
from htfa_jax.evaluation.metrics import Prediction, score_answers
from htfa_jax.evaluation.panel import PanelRow
from htfa_jax.inference.generate import expected_image, read_images
from htfa_jax.inference.options import Decoding
from htfa_jax.inference.sampler import GeneratedText, Sampler
from htfa_jax.models.factory import Model, build_model
from htfa_jax.models.kv_cache import Cache
from htfa_jax.models.level2_spatial_attention import attention_entropy
from htfa_jax.models.losses import Counts, count, loss_and_metrics
from htfa_jax.models.registration import SOURCES, denormalize_image, normalize_image
from htfa_jax.sharding.layout import Layout, to_host

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Report:
    """Result of an evaluation.

    Attributes:
      scores: numbers, as written to JSON: losses, answers by kind and bucket, images by
        region and candidate, how samples were aligned.
      answers: every single answer.
      panel: the first scenes, to look at.
    """

    scores: dict[str, Any]
    answers: list[Prediction]
    panel: list[PanelRow]


class Evaluator:
    """Compiled functions that evaluate one model with any weights.

    Args:
      config: of the run.
      model: its structure.
      tokenizer: of the run.
      layout: where its weights are.
    """

    def __init__(self, config: Config, model: Model, tokenizer: ChatTokenizer, layout: Layout):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.layout, self._compiled = layout, False
        if config.level3.generation and not config.vq.has_decoder:
            log.warning("this VQ tokenizer has no decoder: codes are scored, images are not")
        everywhere = layout.replicated
        self._losses = jax.jit(layout.inside(self._loss_sums), out_shardings=everywhere)
        # Each device keeps the keys and values of its own samples.
        outputs = (layout.stacked_batch, everywhere, everywhere)
        self._look = jax.jit(layout.inside(self._look_at), out_shardings=outputs)
        self._sampler = Sampler(
            config, tokenizer, lambda params: model.merge(params).decoder, layout
        )

    def __call__(
        self,
        params: Flat,
        records: Dataset,
        max_samples: int | None = None,
        interrupt: Callable[[], None] = lambda: None,
    ) -> Report:
        """Evaluates weights on a dataset.

        Args:
          params: all weights.
          records: the split.
          max_samples: only so many of it, None for all.
          interrupt: called before each program of a batch, which may have to be compiled; what it
            raises ends the evaluation.
        """
        totals: collections.Counter[str] = collections.Counter()
        answers: list[Prediction] = []
        panel: list[PanelRow] = []
        num = len(records) if max_samples is None else min(max_samples, len(records))
        with progress(num, "evaluation", unit="scene") as bar:
            for loaded in self._batches(records, max_samples):
                interrupt()
                for error in loaded.errors:
                    log.warning("skipped: %s", error)
                first = contextlib.nullcontext() if self._compiled else compiling("the evaluation")
                with first:
                    found, rows, seen, sums = self._batch(params, records, loaded, interrupt)
                self._compiled = True
                answers += [answer for row in rows for answer in row]
                totals.update(sums)
                if wanted := self.config.eval.panel_samples - len(panel):
                    panel += _panel_rows(jax.device_get(seen), found, rows)[:wanted]
                bar.update(sum(record is not None for record in found))
        return Report(_scores(totals, answers, self.config.loss), answers, panel)

    def _batch(
        self, params: Flat, records: Dataset, loaded: Loaded, interrupt: Callable[[], None]
    ) -> tuple[
        list[Record | None], list[list[Prediction]], dict[str, jax.Array], collections.Counter[str]
    ]:
        """Records of a batch, their answers, images to look at, and sums."""
        batch = self.layout.put(loaded.batch)
        index_B = to_host(batch.index)  # over all processes
        found = [records[i] if i >= 0 else None for i in index_B]
        cache, sums, seen = self._look(params, batch)
        said = []
        for prompts in self._prompts(found):
            interrupt()
            said.append(self._ask(params, cache, prompts))
        interrupt()
        shares = jax.device_get(seen.pop("occlusion_ratio"))
        totals = collections.Counter(jax.device_get(self._losses(params, batch)))
        totals.update(jax.device_get(sums))
        return found, _answers(found, said, index_B, shares), seen, totals

    def _batches(self, records: Dataset, max_samples: int | None) -> Iterator[Loaded]:
        layout = self.layout
        shards, share = layout.num_shards, layout.process_share
        return evaluation_batches(self.config, records, self.tokenizer, max_samples, shards, share)

    def _loss_sums(self, params: Flat, batch: Batch) -> dict[str, jax.Array]:
        """Sums of the losses over tokens, and the tokens' number."""
        counts = count(batch, self.config)
        ones = Counts(*[jnp.float32(1)] * 3)
        _, sums = loss_and_metrics(self.model.merge(params), batch, ones, None)
        return {**sums, "text_count": counts.text, "code_count": counts.codes}

    def _look_at(
        self, params: Flat, batch: Batch
    ) -> tuple[Cache, dict[str, jax.Array], dict[str, jax.Array]]:
        """The decoder's cache, sums of what images tell, images to look at."""
        model, weight_B = self.model.merge(params), batch.weight
        prefix = read_images(model, batch, with_weights=True)
        pair = prefix.fusion.pair
        rgb = functools.partial(denormalize_image, config=self.config.data)
        seen = {
            "original": rgb(pair.orig_BHWC),
            "reconstruction": rgb(pair.own_recon_BHWC),
            "target": rgb(normalize_image(batch.image_target, batch.region_orig, self.config.data)),
            "occlusion_ratio": occlusion_ratios(batch),
        }
        source_BX = jax.nn.one_hot(pair.source_B, len(SOURCES))
        aligned_X = jnp.sum(source_BX * weight_B[:, None], axis=0)
        sums = {f"aligned/{name}": aligned_X[i] for i, name in enumerate(SOURCES)}
        sums["samples"] = weight_B.sum()
        if prefix.fusion.alpha_BHW is not None:
            seen["fused"] = rgb(prefix.fusion.fused_BHWC)
            seen["alpha"] = prefix.fusion.alpha_BHW
            entropy_B = attention_entropy(prefix.fusion.attention_BNTS)
            sums["attention_entropy"] = jnp.sum(entropy_B * weight_B)
        if prefix.code_logits_BMC is not None:
            codes_BM = model.target_codes(batch, pair)
            sums["code_usage"] = (
                jnp.zeros(self.config.vq.codebook_size).at[codes_BM].add(weight_B[:, None])
            )
        if prefix.code_logits_BMC is not None and self.config.vq.has_decoder:
            seen["completion"] = rgb(expected_image(model, prefix.code_logits_BMC))
            candidates = {
                "completed": seen["completion"],
                "original": seen["original"],
                "aligned_reconstruction": rgb(pair.aligned_recon_BHWC),
                "flat_fill": flat_fill(seen["original"], batch),
                "vq_round_trip": rgb(model.vq.decode(codes_BM)),
            }
            sums |= image_sums(candidates, seen["target"], batch)
        return prefix.cache, sums, seen

    def _prompts(self, found: Sequence[Record | None]) -> list[list[np.ndarray]]:
        """Question k of every scene, for each k; a scene with fewer gets padding."""
        if self.config.loss.text_weight == 0:
            return []
        per_scene = [
            [self.tokenizer.encode_prompt([*system_prompts(r), q]) for q, _ in questions(r)]
            if r
            else []
            for r in found
        ]
        nothing = np.array([self.tokenizer.pad_id], np.int32)
        return [
            [prompts[k] if k < len(prompts) else nothing for prompts in per_scene]
            for k in range(max(map(len, per_scene), default=0))
        ]

    def _ask(self, params: Flat, cache: Cache, prompts: list[np.ndarray]) -> list[GeneratedText]:
        decoding = Decoding(max_new_tokens=self.config.eval.max_new_tokens)
        return self._sampler.answers(params, cache, prompts, decoding)


def questions(record: Record) -> list[tuple[Turn, Turn]]:
    """Every user turn that an assistant turn answers, with it.

    Each is asked by itself: with earlier answers in view one could be read off another.
    """
    pairs = zip(record.turns, record.turns[1:], strict=False)
    return [(a, b) for a, b in pairs if a.role == "user" and b.role == "assistant"]


def system_prompts(record: Record) -> list[Turn]:
    """The system turns that a conversation begins with; they stand before every question."""
    return list(itertools.takewhile(lambda turn: turn.role == "system", record.turns))


def occlusion_ratios(batch: Batch) -> jax.Array:
    """Occlusion ratio of the object [B], from the masks; not a number where one is missing."""
    object_B = batch.object_mask.sum(axis=(1, 2))
    occluded_B = (batch.object_mask & batch.occluder_mask).sum(axis=(1, 2))
    known_B = batch.has_object_mask & batch.has_occluder_mask & (object_B > 0)
    return jnp.where(known_B, occluded_B / jnp.maximum(object_B, 1), jnp.nan)


def stated_ratio(record: Record) -> float | None:
    """Occlusion ratio of the object, as the record states it, if it does."""
    stated = record.meta.get("occlusion")
    return float(stated) if isinstance(stated, int | float) else None


def _answers(
    found: Sequence[Record | None],
    answers: list[list[GeneratedText]],
    index_B: np.ndarray,
    ratio_B: np.ndarray,
) -> list[list[Prediction]]:
    rows: list[list[Prediction]] = []
    for i, record in enumerate(found):
        if record is None or not answers:
            rows.append([])
            continue
        rows.append(
            [
                Prediction(
                    scene=int(index_B[i]),
                    kind=question.kind or "answer",
                    question=question.text,
                    answer=answers[k][i].text,
                    truth=truth.text,
                    occlusion=stated_ratio(record) if np.isnan(ratio_B[i]) else float(ratio_B[i]),
                    confidence=answers[k][i].confidence,
                )
                for k, (question, truth) in enumerate(questions(record))
            ]
        )
    return rows


def _panel_rows(
    seen: dict[str, np.ndarray], found: Sequence[Record | None], rows: list[list[Prediction]]
) -> list[PanelRow]:
    return [
        PanelRow(record.id, {name: value[i] for name, value in seen.items()}, rows[i])
        for i, record in enumerate(found)
        if record is not None
    ]


def _scores(
    totals: Mapping[str, Any], answers: list[Prediction], loss: LossConfig
) -> dict[str, Any]:
    scores: dict[str, Any] = {"samples": int(totals["samples"])}
    samples = max(totals["samples"], 1)
    losses = {}
    for name, tokens in (("text_loss", "text"), ("code_loss", "code"), ("code_accuracy", "code")):
        if name in totals:
            losses[name] = float(totals[name] / max(totals[f"{tokens}_count"], 1))
    losses["loss"] = loss.text_weight * losses.get(
        "text_loss", 0.0
    ) + loss.code_weight * losses.get("code_loss", 0.0)
    scores["losses"] = losses
    if answers:
        scores["answers"] = score_answers(answers)
    images = image_scores(totals)
    if images:
        scores["images"] = images
    if "code_usage" in totals:
        scores["target_codes_used"] = int((totals["code_usage"] > 0).sum())
    scores["alignment"] = {s: int(totals[f"aligned/{s}"]) for s in SOURCES}
    scores["fusion"] = {
        name: float(totals[name] / samples)
        for name in ("alpha_mean", "alpha_std", "attention_entropy")
        if name in totals
    }
    return scores


def evaluate_run(config: Config, checkpoint: str | Path, split: Split) -> tuple[Report, Path]:
    """Evaluates stored weights on a split. Returns what was found, and the folder of the run.

    Args:
      config: the run's, or that with other data.
      checkpoint: as in `runs.load_run`.
      split: of the configuration's data.

    Raises CheckpointError if there is no such run, DataError if there is no such data.
    """
    model, layout = build_model(config), Layout(config)
    _, params, step, folder = load_run(checkpoint, lambda c: build_model(c).shapes)
    log.info("%s, step %d, on split %s", folder, step, split)
    evaluator = Evaluator(config, model, ChatTokenizer(folder / "tokenizer"), layout)
    result = evaluator(layout.put_parameters(params), open_split(config, split))
    result.scores["step"] = step
    return result, folder
