"""What the engine gives back."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

import jax
import numpy as np
from PIL import Image

from htfa_jax.config import DataConfig
from htfa_jax.config.renamed import takes_old_names
from htfa_jax.data.preprocess import Box
from htfa_jax.inference.answer_attention import AnswerAttention
from htfa_jax.inference.generate import Prefix
from htfa_jax.inference.inputs import LoadedPair
from htfa_jax.models.registration import INTENSITY, denormalize_image

OWN_COMPLETION: Final = "own completion"


@takes_old_names
@dataclasses.dataclass(frozen=True)
class Intermediates:
    """What the model saw on its way, of one pair; images are RGB in [0, 1].

    Attributes:
      original_HWC, fused_HWC: as the encoders get them, in the model's square.
      reconstruction_HWC: in its own frame.
      aligned_HWC: reconstruction in the original's frame.
      alpha_HW: weight of the original.
      attention_NTS: Level 2's weights, by head, query patch and key patch.
      code_probabilities_MC: of the completed image's codes; None without codes.
      region, region_recon: where the images are in the square: x, y, w, h.
      box, box_recon: the object's, with which the reconstruction was aligned; None without.
      occluded_HW: the part of the object that something covers; None unless the pair has both
        masks.
    """

    original_HWC: np.ndarray
    reconstruction_HWC: np.ndarray
    aligned_HWC: np.ndarray
    fused_HWC: np.ndarray
    alpha_HW: np.ndarray
    attention_NTS: np.ndarray
    code_probabilities_MC: np.ndarray | None
    region: Box
    region_recon: Box
    box: Box | None
    box_recon: Box | None
    occluded_HW: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Result:
    """What the model says of one pair.

    Attributes:
      answer: text; empty if there is an error or the run has no LM head.
      confidence: mean probability of the answer's tokens, the one that ended it included, under
        the model itself: temperature 1, no penalty. None without an answer.
      completed: the whole object in the original's frame and size; None if the run cannot
        or was not asked to.
      alignment: how the reconstruction was aligned: "boxes", "mask", "intensity",
        "identity: no box", "identity: alignment off", "own completion" or
        "identity: no reconstruction".
      recon_source: "given"; "own completion" if none was given and the model looked at what it
        completed from the original alone; "none" if it cannot do that either.
      query: the question.
      intermediates: where asked for.
      attention: the decoder's, behind each token of the answer; comes with `intermediates`.
      error: why there is no result.
    """

    answer: str = ""
    confidence: float | None = None
    completed: Image.Image | None = None
    alignment: str = ""
    recon_source: Literal["given", "own completion", "none"] = "given"
    query: str = ""
    intermediates: Intermediates | None = None
    attention: AnswerAttention | None = None
    error: str | None = None


def intermediates(data: DataConfig, prefix: Prefix, scene: LoadedPair, row: int) -> Intermediates:
    """What the model saw of one row of an encoded batch, on the host.

    Args:
      data: of the run's configuration.
      prefix: the encoded batch, with attention weights.
      scene: what the row was made from.
      row: its index.
    """
    fusion, logits = prefix.fusion, prefix.code_logits_BMC
    pair, sample = fusion.pair, scene.sample
    boxed = int(pair.source_B[row]) <= INTENSITY
    known = sample["has_object_mask"] and sample["has_occluder_mask"]

    def image(x_BHWC: jax.Array) -> np.ndarray:
        return np.asarray(denormalize_image(x_BHWC[row : row + 1], data)[0])

    return Intermediates(
        original_HWC=image(pair.orig_BHWC),
        reconstruction_HWC=image(pair.own_recon_BHWC),
        aligned_HWC=image(pair.aligned_recon_BHWC),
        fused_HWC=image(fusion.fused_BHWC),
        alpha_HW=np.asarray(fusion.alpha_BHW)[row],
        attention_NTS=np.asarray(fusion.attention_BNTS[row]),
        code_probabilities_MC=None
        if logits is None
        else np.asarray(jax.nn.softmax(logits[row], axis=-1)),
        region=tuple(sample["region_orig"].tolist()),
        region_recon=tuple(np.asarray(pair.region_B4[row]).tolist()),
        box=tuple(np.asarray(pair.box_orig_B4[row]).tolist()) if boxed else None,
        box_recon=tuple(np.asarray(pair.box_recon_B4[row]).tolist()) if boxed else None,
        occluded_HW=sample["object_mask"] & sample["occluder_mask"] if known else None,
    )
