"""The model in use: answers, completed images, conversations.

from htfa_jax import HTFAInference
engine = HTFAInference.from_pretrained("runs/x")
result = engine.infer("orig.jpg", "recon.png", "What's the object in the hand?")
print(result.answer, result.confidence)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from htfa_jax.checkpoints.loading import load_run
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import DType, override
from htfa_jax.config.renamed import current_parameters, takes_old_names, takes_original_names
from htfa_jax.data.batch import Batch
from htfa_jax.data.records import Turn
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.errors import ConfigError
from htfa_jax.inference.batching import Query, in_batches
from htfa_jax.inference.chat import Chat, checked_query
from htfa_jax.inference.devices import find_device
from htfa_jax.inference.generate import Prefix, complete, read_images
from htfa_jax.inference.inputs import (
    LoadedPair,
    PairLike,
    as_record,
    load_pair,
    stack_pairs,
    to_original_frame,
    with_own_completion,
)
from htfa_jax.inference.options import ONE_PASS, Completion, Decoding, Quantize
from htfa_jax.inference.results import OWN_COMPLETION, Result, intermediates
from htfa_jax.inference.sampler import GeneratedText, Sampler
from htfa_jax.inference.weights import for_inference
from htfa_jax.models.decoding import DecodingInternLM2
from htfa_jax.models.factory import build_model
from htfa_jax.models.registration import SOURCES, denormalize_image, to_8bit
from htfa_jax.sharding.layout import Layout


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A batch of scenes, encoded; row i is scene i."""

    scenes: list[LoadedPair]
    prefix: Prefix
    source_B: np.ndarray
    own_B: np.ndarray


@takes_old_names
class HTFAInference:
    """A model ready to be used.

    Args:
      checkpoint_path: a run, one of its checkpoints, an exported run, or the hub id of one.
      device: JAX device, or a name that `find_device` knows ("cpu", "gpu" or "cuda", "gpu:1");
        JAX's own choice by default.
      dtype: of the computation; the run's by default.
      quantize: "int8" keeps the decoder's weights in 8 bits, one scale per output (the package
        Qwix); the computation stays in `dtype`.
      revision: of a hub repository: branch, tag or commit.

    Raises:
      CheckpointError: if there is no such run, or it is damaged.
      ConfigError: if this machine has no such device.
    """

    def __init__(
        self,
        checkpoint_path: str | Path,
        device: jax.Device | str | None = None,
        *,
        dtype: DType | None = None,
        quantize: Quantize | None = None,
        revision: str | None = None,
    ):
        device = find_device(device)  # before gigabytes are read
        config, params, step, workdir = load_run(
            checkpoint_path, lambda c: build_model(c).shapes, revision
        )
        if dtype is not None:
            config = override(config, {"train.dtype": dtype})
        # One device, however many the run was spread over.
        config = override(config, {f"sharding.{axis}": 1 for axis in ("data", "fsdp", "tensor")})
        layout = Layout(config, [device])
        self.config, self.step = config, step
        self.tokenizer = ChatTokenizer(workdir / "tokenizer")
        self.params = jax.device_put(
            for_inference(config.train, params, quantize), layout.replicated
        )
        model = self._model = build_model(config, DecodingInternLM2)
        self.can_complete = config.loss.code_weight > 0 and config.vq.has_decoder
        self.can_answer = config.loss.text_weight > 0

        def encode(params: Flat, batch: Batch, with_weights: bool) -> Prefix:
            return read_images(model.merge(params), batch, with_weights=with_weights)

        self._encode_images = jax.jit(layout.inside(encode), static_argnums=2)
        self._complete = jax.jit(layout.inside(self._complete_images))
        self.sampler = Sampler(
            config, self.tokenizer, lambda params: model.merge(params).decoder, layout
        )

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> HTFAInference:
        """The same as the constructor, under the name that other libraries use."""
        return cls(name, **options)

    @takes_original_names
    def infer(
        self,
        image_orig: Any,
        image_recon: Any = None,
        query: Query = None,
        *,
        decoding: Decoding | None = None,
        completion: Completion | None = ONE_PASS,
        return_intermediates: bool = False,
        **fields: Any,
    ) -> Result | list[Result]:
        """Answers one question about a pair (or several: a list of results), and completes it.

        Args:
          image_orig: the original: a path, PIL image or uint8 array.
          image_recon: the reconstruction; without one the model completes the original first.
          query: `data.default_query` by default.
          decoding: options; greedy by default.
          completion: options; None completes nothing.
          return_intermediates: whether results hold what the model saw.
          **fields: object_mask, occluder_mask, bbox_orig, bbox_recon, as in a dataset's records.

        Raises:
          DataError: for images or boxes that cannot be used, naming the field.
        """
        encoded = self._encode_pair(image_orig, image_recon, fields, return_intermediates)
        return self._results(encoded, [query], decoding, completion, return_intermediates)[0]

    @takes_original_names
    def batch_infer(
        self,
        pairs: Sequence[PairLike | LoadedPair],
        queries: Sequence[Query] | str | None = None,
        *,
        batch_size: int = 8,
        decoding: Decoding | None = None,
        completion: Completion | None = ONE_PASS,
        return_intermediates: bool = False,
    ) -> list[Result | list[Result]]:
        """`infer` for many pairs, in order; a bad pair's result holds its error.

        Args:
          pairs: (original, reconstruction or None), mappings with a record's field names,
            records, or pairs of `inputs.load_pair`.
          queries: one for each pair (several questions: a list), or one for all.
          batch_size: pairs at a time.
          decoding, completion, return_intermediates: as in `infer`.
        """
        return list(
            self.iterate(
                pairs,
                queries,
                batch_size=batch_size,
                decoding=decoding,
                completion=completion,
                return_intermediates=return_intermediates,
            )
        )

    def iterate(
        self,
        pairs: Sequence[PairLike | LoadedPair],
        queries: Sequence[Query] | str | None = None,
        *,
        batch_size: int = 8,
        decoding: Decoding | None = None,
        completion: Completion | None = ONE_PASS,
        return_intermediates: bool = False,
    ) -> Iterator[Result | list[Result]]:
        """`batch_infer`, result by result as they come."""

        def work(
            scenes: list[LoadedPair], asked: list[Query], rows: int
        ) -> list[Result | list[Result]]:
            encoded = self._encode(scenes, rows, return_intermediates)
            return self._results(encoded, asked, decoding, completion, return_intermediates)

        yield from in_batches(self.config, pairs, queries, batch_size, work)

    def stream(
        self,
        image_orig: Any,
        image_recon: Any = None,
        query: str | None = None,
        *,
        decoding: Decoding | None = None,
        **fields: Any,
    ) -> Iterator[str]:
        """The answer piece by piece; together the pieces are the answer of `infer`."""
        yield from self.chat(image_orig, image_recon, **fields).stream(query, decoding=decoding)

    def chat(self, image_orig: Any, image_recon: Any = None, **fields: Any) -> Chat:
        """A conversation about a pair, which is encoded once.

        In place of the original there may be the whole pair as `inputs.load_pair` gives it.
        """
        self.need_text()
        encoded = self._encode_pair(image_orig, image_recon, fields)
        return Chat(self.sampler, self.params, encoded.prefix.cache)

    def complete(
        self,
        image_orig: Any,
        image_recon: Any = None,
        *,
        num_samples: int = 1,
        temperature: float = 0.0,
        refinement_steps: int = 1,
        paste_back: bool = False,
        seed: int = 0,
        **fields: Any,
    ) -> list[Image.Image]:
        """Completed images, in the original's frame and size; sample i has seed + i.

        Args:
          image_orig, image_recon, **fields: as in `infer`.
          num_samples: how many; with temperature 0 all would be the same.
          temperature, refinement_steps, paste_back, seed: as in `Completion`.

        Raises:
          ConfigError: if the run has no codes or its tokenizer has no decoder.
        """
        self.need_completion()
        fields = current_parameters(fields)
        steps = fields.pop("refinement_steps", refinement_steps)
        encoded = self._encode_pair(image_orig, image_recon, fields)
        options = Completion(temperature, steps, paste_back, seed)
        return [
            self._completed(encoded, dataclasses.replace(options, seed=seed + i))[0]
            for i in range(num_samples)
        ]

    def need_text(self) -> None:
        """Raises ConfigError if the run cannot answer."""
        if not self.can_answer:
            raise ConfigError("this run has no LM head (loss.text_weight=0): it only completes")

    def need_completion(self) -> None:
        """Raises ConfigError if the run cannot complete an image."""
        if not self.can_complete:
            raise ConfigError(
                "this run cannot complete images: it was trained without codes "
                "(loss.code_weight=0), or its VQ tokenizer has no decoder (vq.has_decoder=False)"
            )

    def _encode_pair(
        self, orig: Any, recon: Any, fields: dict[str, Any], with_weights: bool = False
    ) -> _Encoded:
        pair = {"image_orig": orig, "image_recon": recon, **fields}
        is_read = isinstance(orig, LoadedPair)
        scene = orig if is_read else load_pair(as_record(pair, "this pair"), self.config)
        return self._encode([scene], 1, with_weights)

    def _encode(self, scenes: list[LoadedPair], rows: int, with_weights: bool = False) -> _Encoded:
        """Encodes the images; completes them first where there is no reconstruction."""
        if with_weights and self.config.fusion != "levels":
            raise ConfigError(
                f"this run has no Levels 1 and 2 to look into (fusion={self.config.fusion})"
            )
        batch = stack_pairs(scenes, rows)
        prefix = self._encode_images(self.params, batch, with_weights)
        own_B = ~np.asarray(batch.has_recon) & self.can_complete
        if own_B.any():
            completed = np.asarray(
                self._complete(self.params, prefix, **_completion_arrays(ONE_PASS))
            )
            batch = with_own_completion(batch, own_B, completed)
            prefix = self._encode_images(self.params, batch, with_weights)
        return _Encoded(scenes, prefix, np.asarray(prefix.fusion.pair.source_B), own_B)

    def _results(
        self,
        encoded: _Encoded,
        queries: Sequence[Query],
        decoding: Decoding | None,
        completion: Completion | None,
        return_intermediates: bool,
    ) -> list[Result | list[Result]]:
        asked = [
            [
                checked_query(self.config.data, q)
                for q in ([query] if query is None or isinstance(query, str) else query)
            ]
            for query in queries
        ]
        answers = self._answers(
            encoded, asked, (decoding or Decoding()).for_run(self.config.eval), return_intermediates
        )
        completed: Sequence[Image.Image | None] = [None] * len(asked)
        if completion is not None and self.can_complete:
            completed = self._completed(encoded, completion)
        out: list[Result | list[Result]] = []
        for i, questions in enumerate(asked):
            shared: dict[str, Any] = {
                "completed": completed[i],
                "alignment": OWN_COMPLETION if encoded.own_B[i] else SOURCES[encoded.source_B[i]],
                "recon_source": self._recon_source(encoded, i),
                "intermediates": intermediates(
                    self.config.data, encoded.prefix, encoded.scenes[i], i
                )
                if return_intermediates
                else None,
            }
            rows = [
                Result(s.text, s.confidence, query=q, attention=s.attention, **shared)
                if s is not None
                else Result(query=q, **shared)
                for q, s in zip(questions, answers[i], strict=True)
            ]
            several = queries[i] is not None and not isinstance(queries[i], str)
            out.append(rows if several else rows[0])
        return out

    def _answers(
        self, encoded: _Encoded, asked: list[list[str]], decoding: Decoding, with_attention: bool
    ) -> list[list[GeneratedText | None]]:
        """Of every row, one answer for each of its questions; None in a run without text."""
        out: list[list[GeneratedText | None]] = [[] for _ in asked]
        for questions in itertools.zip_longest(*asked):
            if not self.can_answer:
                answers: Sequence[GeneratedText | None] = [None] * len(asked)
            else:
                rows = len(encoded.source_B)
                prompts = [
                    self.tokenizer.encode_prompt([Turn("user", q)]) if q else None
                    for q in questions
                ]
                spare = next(p for p in prompts if p is not None)
                filled = [spare if p is None else p for p in prompts]
                filled += [spare] * (rows - len(filled))
                texts = self.sampler.answers(self.params, encoded.prefix.cache, filled, decoding)
                if with_attention:
                    texts = self.sampler.with_attention(self.params, encoded.prefix, filled, texts)
                answers = texts
            for row, question, answer in zip(out, questions, answers, strict=False):
                if question is not None:
                    row.append(answer)
        return out

    def _completed(self, encoded: _Encoded, options: Completion) -> list[Image.Image]:
        completed = np.asarray(
            self._complete(self.params, encoded.prefix, **_completion_arrays(options))
        )
        return [
            to_original_frame(image, scene, options.paste_back)
            for image, scene in zip(completed, encoded.scenes, strict=False)
        ]

    def _complete_images(
        self, params: Flat, prefix: Prefix, seed: Any, temperature: Any, steps: Any
    ) -> jax.Array:
        """Completed images [B, H, W, 3], uint8."""
        model = self._model.merge(params)
        seed_B = jnp.full(len(prefix.fusion.pair.source_B), seed, jnp.uint32)
        vectors_BME = complete(model, prefix, seed_B, temperature, steps)
        rgb_BHWC = denormalize_image(model.vq.decode_vectors(vectors_BME), self.config.data)
        return to_8bit(rgb_BHWC).astype(jnp.uint8)

    def _recon_source(
        self, encoded: _Encoded, row: int
    ) -> Literal["given", "own completion", "none"]:
        if encoded.own_B[row]:
            return OWN_COMPLETION
        return "given" if encoded.scenes[row].sample["has_recon"] else "none"


def _completion_arrays(options: Completion) -> dict[str, Any]:
    return {
        "seed": np.uint32(options.seed),
        "temperature": np.float32(options.temperature),
        "steps": None if options.refinement_steps == 1 else np.int32(options.refinement_steps),
    }
