"""The model card of an exported run, as the Hugging Face hub reads it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from htfa_jax.config import Config, PretrainedConfig
from htfa_jax.data.records import EMBEDDED
from htfa_jax.errors import CheckpointError

# Tasks, as the hub names them.
VQA, IMAGE_TO_IMAGE = "visual-question-answering", "image-to-image"

CARD = """\
---
{front}
---

# {name}

HTFA (Hierarchical Trinity Fusion Architecture) looks at two images of a scene: the original,
where something hides part of an object, and a reconstruction of the object.
It {abilities}.

| | |
| --- | --- |
{facts}

## Use it

With the package `htfa_jax`:

```python
from htfa_jax import HTFAInference

engine = HTFAInference.from_pretrained("FOLDER")  # this folder, or its hub id
result = engine.infer("orig.jpg", "recon.png", {query!r})
result.answer, result.confidence, result.completed
```

The reconstruction may be left out, boxes and masks of the object may be given; the weights are read
as arrays and nothing in this folder is run. `python -m htfa_jax.infer --checkpoint FOLDER` does the
same from the command line.

## Training data

{data}

## Results

{results}

## Intended use

Research on images in which a hand or another thing hides part of an object. For images unlike
those of the training data, measure first:
`python -m htfa_jax.evaluate --checkpoint FOLDER --config.data.test=FILE`.

## Limits

- What it completes or says about occluded parts is a likely guess, not a measurement: nothing in
  the images shows them. It can be wrong and confident; `confidence` is the model's own probability
  of its tokens and is not calibrated.
- It knows the objects, questions and wording of its training data, and their biases.
- Answers and completions should not decide anything about the safety or the rights of people.

## Licence

{licence}
"""


def model_card(
    name: str,
    config: Config,
    step: int,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    scores: Mapping[str, Any] | None,
    table: str | None,
    license: str | None,
) -> str:
    """README.md of an exported run.

    Args:
      name: of the model.
      config: of the run, without places on its machine.
      step: of the weights.
      shapes: `{path: shape}` of all parameters.
      dtype: that they are stored in.
      scores: on the test split, as metrics.json has them; None if there are none.
      table: of the same, as text; None if there is none.
      license: as the hub names it, or None.
    """
    answers = config.loss.text_weight > 0
    completes = config.loss.code_weight > 0 and config.vq.has_decoder
    abilities = ["answers questions about the object"] * answers + [
        "completes its image"
    ] * completes
    results = _eval_results(config, scores or {})
    front = ModelCardData(
        library_name="htfa_jax",
        license=license or None,
        pipeline_tag=VQA if answers else IMAGE_TO_IMAGE,
        tags=["htfa", "jax", "flax", "amodal-completion"],
        eval_results=results or None,
        model_name=name if results else None,
    )
    return CARD.format(
        front=front.to_yaml(),
        name=name,
        abilities=" and ".join(abilities) or "predicts the codes of the whole object",
        facts="\n".join(f"| {k} | {v} |" for k, v in _facts(config, step, shapes, dtype).items()),
        query=config.data.default_query,
        data=_data(config),
        results=_results(table),
        licence=_licence(config, license),
    )


def check_scores(scores: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError that names what a metrics.json lacks of what its card tells."""
    answers, images = scores.get("answers", {}), scores.get("images")
    needed: list[tuple[str, ...]] = [("answers", "a kind of question")]
    if isinstance(answers, Mapping):
        needed = [("answers", kind, "all", "accuracy") for kind in answers]
    if images:
        needed.append(("images", "all", "completed", "psnr"))
    for names in needed:
        value: Any = scores
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        whole = isinstance(value, int) and abs(value) < 2**53
        if not whole and not isinstance(value, float):
            raise CheckpointError(
                f"{where} has no number at {' > '.join(map(str, names))}: evaluate the run again"
            )


def _eval_results(config: Config, scores: Mapping[str, Any]) -> list[EvalResult]:
    """The main scores as the hub shows them beside the card; all stand in metrics.json."""
    data = config.data.test or "test"
    scored = functools.partial(
        EvalResult,
        dataset_type=data,
        dataset_name="HeldObjects" if data == EMBEDDED else data,
        dataset_split="test",
    )
    found = [
        scored(
            task_type=VQA,
            metric_type="accuracy",
            metric_name=f"accuracy of {kind}",
            metric_value=round(rows["all"]["accuracy"], 4),
        )
        for kind, rows in scores.get("answers", {}).items()
    ]
    # Evaluations that are kept may have the older name.
    if images := scores.get("images"):
        found.append(
            scored(
                task_type=IMAGE_TO_IMAGE,
                metric_type="psnr",
                metric_name="PSNR of the completed image, dB",
                metric_value=round(images["all"]["completed"]["psnr"], 2),
            )
        )
    return found


def _facts(
    config: Config, step: int, shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> dict[str, str]:
    def sizes(of: Any) -> str:
        return f"{of.embed_dim} wide, {of.num_layers} layers, {of.num_heads} heads"

    facts = {
        "parameters": f"{sum(map(math.prod, shapes.values())):,}, stored in {dtype}",
        "training steps": f"{step:,}",
        "images": f"{config.image_size} x {config.image_size} pixels",
        "SigLIP": sizes(config.siglip),
        "decoder (InternLM2)": sizes(config.decoder),
    }
    if config.level3.generation:
        vq = config.vq
        facts["VQ tokenizer"] = f"{vq.codebook_size:,} codes of {vq.codebook_dim} dimensions"
    return facts


def _data(config: Config) -> str:
    if config.data.train == "held_objects":
        held = config.held_objects
        text = (
            f"HeldObjects, which htfa_jax draws by itself: {held.num_train:,} rendered scenes of "
            f"hands that hold objects (seed {held.seed})."
        )
    else:
        text = f"`{config.data.train}`, image pairs with conversations."
    if given := _started_from(config.pretrained):
        text += f" It started from other weights: {', '.join(given)}."
    return text


def _started_from(pretrained: PretrainedConfig) -> list[str]:
    components = ("run", "siglip", "vq", "decoder", "htfa")
    return [f"{c} (`{name}`)" for c in components if (name := getattr(pretrained, c)) is not None]


def _results(table: str | None) -> str:
    if table is None:
        return "These weights were not evaluated on a test split."
    return (
        "On the test split, answers by decoding and scored by exact match; all numbers are in "
        f"`evaluation/test/metrics.json`.\n\n```\n{table.rstrip()}\n```"
    )


def _licence(config: Config, license: str | None) -> str:
    text = f"`{license}`." if license else "Not stated: ask whoever made this model."
    if _started_from(config.pretrained):
        text += " Weights that it started from and data have licences of their own."
    return text
