"""One run of `ablations.py`: a variant and a seed, trained, then evaluated on four test sets.

    python scripts/ablation/one_run.py OUT VARIANT SEED

A stopped one is resumed. Its last file is `result.json`: a run that has one is finished.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from htfa_jax.checkpoints.loading import load_run
from htfa_jax.common.cli import command, use_compilation_cache
from htfa_jax.common.files import write_whole
from htfa_jax.common.logs import log_to_file
from htfa_jax.config import Config, load_config, override
from htfa_jax.config.io import preset_changes
from htfa_jax.data.records import Dataset
from htfa_jax.data.sources.open import open_source
from htfa_jax.data.splits import open_split
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.errors import ConfigError
from htfa_jax.evaluation import report
from htfa_jax.evaluation.evaluator import Evaluator
from htfa_jax.models.factory import build_model
from htfa_jax.sharding.layout import Layout
from htfa_jax.training.trainer import train
from weights_convert.on_demand import with_weights

TEXT_ONLY = {"loss.text_weight": 1.0, "loss.code_weight": 0.0}
FULL = "full"
# What each variant changes of the base configuration.
ABLATIONS: dict[str, dict[str, Any]] = {
    FULL: {},
    "no_level1": {"level1.learnable": False},
    "no_level2_affine": {"level2.alignment": "none"},
    "single_encoder": {"level3.generation": False} | TEXT_ONLY,
    "understanding_only": TEXT_ONLY,
    "generation_only": {"loss.text_weight": 0.0, "loss.code_weight": 1.0},
}
# No levels: one image, moved as in the full structure, or both as they are.
BASELINES: dict[str, dict[str, Any]] = {
    "original_only": {"fusion": "original"},
    "reconstruction_only": {"fusion": "reconstruction"},
    "concatenation": {"fusion": "tokens", "level2.alignment": "none"},
}
# Not run unless asked for by name.
OPTIONS: dict[str, dict[str, Any]] = {
    "concatenation_aligned": {"fusion": "tokens"},
    "original_as_fused": {"level1.learnable": False, "level1.init_alpha": 0.999},
    "values_of_fused": {"level2.values": "fused"},
    "nothing_appended": {"level2.append_reconstruction": False},
    "alpha_map": {"level1.alpha": "map"},
    "affine_on_features": {"level2.alignment": "features"},
    "pytorch_original": preset_changes("pytorch_original"),
    "all_keys": {"level2.mask_keys": False},
    "all_cells_alike": {"loss.occluded_cell_weight": 1.0},
}
VARIANTS = ABLATIONS | BASELINES | OPTIONS

BUDGET, RESULT, STRESS = "budget.json", "result.json", "stress"
STRESSES = ("missing", "other_object", "misaligned")

log = logging.getLogger("htfa_jax.ablations")


def workdir_of(out: Path, variant: str, seed: int) -> Path:
    """Where a run is."""
    return out / "runs" / variant / f"seed_{seed}"


def configuration(base: str, variant: str, seed: int, steps: int | None) -> Config:
    """What a run trains: all variants share data, pretrained parts and budget.

    Args:
      base: name of the configuration that the variants change.
      variant: one of `VARIANTS`.
      seed: of weights, data order and dropout; the scenes are the same.
      steps: updates; None for as many as the base has.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"no variant {variant}; there are {', '.join(VARIANTS)}")
    config = override(load_config(base), {"seed": seed, **VARIANTS[variant]})
    shared = {
        "data.validation": None,
        "data.cache_codes": config.loss.code_weight > 0,
        "eval.during_training": "no",
        "train.save_every": 100,
    }
    config = override(config, shared | ({"train.max_steps": steps} if steps else {}))
    return with_weights(config, config)


def stressed(raw: Sequence[dict[str, Any]], stress: str) -> list[dict[str, Any]]:
    """Records whose reconstruction is missing, of another object, or moved by a wrong box.

    Args:
      raw: records as they are stored, with categories.
      stress: one of `STRESSES`.
    """
    if stress == "missing":
        return [{k: v for k, v in r.items() if not k.endswith("_recon")} for r in raw]
    if stress == "misaligned":
        boxes = [r["bbox_recon"] for r in raw]
        return [
            {**r, "bbox_recon": [x + w / 2, y + h / 2, w, h]}
            for r, (x, y, w, h) in zip(raw, boxes, strict=True)
        ]
    out = []
    for i, record in enumerate(raw):
        others = (raw[(i + k) % len(raw)] for k in range(1, len(raw)))
        other = next(o for o in others if o["meta"]["category"] != record["meta"]["category"])
        out.append({**record, **{k: v for k, v in other.items() if k.endswith("_recon")}})
    return out


def write_stressed(out: Path, records: Dataset) -> None:
    """The stressed test sets as files, where they are missing."""
    raw = [dict(records[i].raw) for i in range(len(records))]
    (out / STRESS).mkdir(parents=True, exist_ok=True)
    for stress in STRESSES:
        # Not written twice: another run may be reading it.
        if not (path := out / STRESS / f"{stress}.jsonl").is_file():
            write_whole(path, "".join(json.dumps(r) + "\n" for r in stressed(raw, stress)))


def run(out: Path, variant: str, seed: int, budget: dict[str, Any]) -> bool:
    """Trains and evaluates, as far as that is not done. False if a signal stopped it.

    Args:
      out: of `ablations.py`.
      variant, seed: which run.
      budget: what all runs share.
    """
    config = configuration(budget["base"], variant, seed, budget["steps"])
    use_compilation_cache()
    workdir = workdir_of(out, variant, seed)
    scores = {"test": train(config, workdir)}
    if scores["test"] is None:
        return False
    test, layout = open_split(config, "test"), Layout(config)
    write_stressed(out, test)
    _, params, step, _ = load_run(workdir, lambda c: build_model(c).shapes)
    params = layout.put_parameters(params)
    evaluator = Evaluator(config, build_model(config), ChatTokenizer(workdir / "tokenizer"), layout)
    data = override(config, {"data.image_root": str(test.path.parent)}).data
    for stress in STRESSES:
        records = open_source(str(out / STRESS / f"{stress}.jsonl"), data, "test")
        result = evaluator(params, records, budget["stress_scenes"])
        result.scores["step"] = step
        report.write(result, workdir / "evaluation" / stress)
        scores[stress] = result.scores
        log.info("%s, seed %d: %s done", variant, seed, stress)
    write_whole(workdir / RESULT, json.dumps(scores, indent=2) + "\n")
    return True


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    out, variant, seed = argv
    budget = json.loads((Path(out) / BUDGET).read_text(encoding="utf-8"))
    workdir = workdir_of(Path(out), variant, int(seed))
    with log_to_file(workdir / "logs" / "ablation.log"):
        if not run(Path(out), variant, int(seed), budget):
            sys.exit(1)


if __name__ == "__main__":
    main()
