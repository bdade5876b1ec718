"""What options of inference cost and bring, on the test split of a run.

    python scripts/benchmarks/inference_options.py --checkpoint runs/x --num 200

Answers right and PSNR of the occluded part with the run's own weights and with int8 ones (`pip
install 'htfa-jax[int8]'`), PSNR after several passes of completion, and pairs per second in
batches and one by one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from htfa_jax import Completion, HTFAInference
from htfa_jax.common.cli import parse
from htfa_jax.data.decode import load_image
from htfa_jax.data.masks import load_mask
from htfa_jax.data.records import Record
from htfa_jax.data.splits import open_split
from htfa_jax.evaluation.evaluator import questions
from htfa_jax.evaluation.metrics import is_right, psnr


def occluded_psnr(records: list[Record], completed: list[Image.Image]) -> float:
    """Of all occluded pixels together, in dB."""
    errors = []
    for record, image in zip(records, completed, strict=True):
        masks = (load_mask(m) for m in (record.object_mask, record.occluder_mask))
        hidden = np.logical_and(*(np.asarray(m) > 127 for m in masks))
        target = np.asarray(load_image(record.image_target), np.float32)
        errors.append(((np.asarray(image, np.float32) - target) ** 2).mean(axis=-1)[hidden])
    return psnr(float(np.concatenate(errors).mean()))


@dataclasses.dataclass(frozen=True)
class OptionsArgs:
    """Options of the command."""

    checkpoint: str  # a run on the embedded dataset
    num: int = 200  # scenes
    refinement_steps: tuple[int, ...] = (1, 2, 4, 8)  # of completion


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a few lines."""
    args = parse(OptionsArgs, argv, __doc__)
    engine = HTFAInference(args.checkpoint)
    data = open_split(engine.config, "test")
    records = [data[i] for i in range(min(args.num, len(data)))]
    asked = [[question.text for question, _ in questions(r)] for r in records]
    truths = [[answer.text for _, answer in questions(r)] for r in records]

    said = {}
    for name, quantize in (("own weights", None), ("int8", "int8")):
        results = HTFAInference(args.checkpoint, quantize=quantize).batch_infer(records, asked)
        said[name] = [r.answer for rows in results for r in rows]
        right = np.mean([is_right(*x) for x in zip(said[name], sum(truths, []), strict=True)])
        score = occluded_psnr(records, [rows[0].completed for rows in results])
        print(f"{name}: {right:.4f} accuracy of {len(said[name])} answers, {score:.2f} dB occluded")
    same = np.mean([a == b for a, b in zip(*said.values(), strict=True)])
    print(f"int8 gives the same answer {100 * same:.1f}% of the time")
    for passes in args.refinement_steps:
        results = engine.batch_infer(records, "?", completion=Completion(refinement_steps=passes))
        score = occluded_psnr(records, [r.completed for r in results])
        print(f"{passes} passes: {score:.2f} dB occluded")
    for size in (1, 8, 1, 8, 1, 8):
        start = time.perf_counter()
        engine.batch_infer(records, batch_size=size)
        rate = len(records) / (time.perf_counter() - start)
        print(f"batches of {size}: {rate:.1f} pairs/s")


if __name__ == "__main__":
    main()
