"""What the engine gives back."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

import numpy as np
from PIL import Image

from htfa_jax.answer_attention import AnswerAttention
from htfa_jax.data.preprocess import Box

OWN_COMPLETION: Final = "own completion"


@dataclasses.dataclass(frozen=True)
class Intermediates:
    """What the model saw on its way, of one pair; pictures are RGB in [0, 1].

    Attributes:
      original_HWC, fused_HWC: as the encoders get them, in the model's square.
      reconstruction_HWC: in its own frame.
      aligned_HWC: reconstruction in the original's frame.
      alpha_HW: weight of the original.
      attention_NTS: Level 2's weights, by head, query patch and key patch.
      code_probabilities_MC: of the completed picture's codes; None without codes.
      region, region_recon: where the pictures are in the square: x, y, w, h.
      box, box_recon: the object's, with which the reconstruction was aligned; None without.
      hidden_HW: the part of the object that something covers; None unless the pair has both
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
    hidden_HW: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Result:
    """What the model says of one pair.

    Attributes:
      answer: text; empty if there is an error or the run has no text head.
      confidence: mean probability of the answer's words, the one that ended it included, under
        the model itself: temperature 1, no penalty. None without an answer.
      completed: the whole object in the original's frame and size; None if the run cannot paint
        or was not asked to.
      alignment: how the reconstruction was aligned: "boxes", "mask", "intensity",
        "identity: no box", "identity: alignment off", "own completion" or
        "identity: no reconstruction".
      recon_source: "given"; "own completion" if none was given and the model looked at what it
        painted from the original alone; "none" if it cannot paint either.
      query: the question.
      intermediates: where asked for.
      attention: the decoder's, behind each word of the answer; comes with `intermediates`.
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
