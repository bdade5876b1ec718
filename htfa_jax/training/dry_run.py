"""`train --dry_run`: what a run would do and need, as text; nothing is trained or written."""

from __future__ import annotations

from pathlib import Path

from htfa_jax.checkpoints import integrity
from htfa_jax.checkpoints.weights import WEIGHTS
from htfa_jax.config import Config, DataConfig
from htfa_jax.data.held_out import EVERY, FROM_TRAIN, held_out
from htfa_jax.data.pipeline import SampleLoader, num_steps, samples_per_step
from htfa_jax.data.records import EMBEDDED, SPLITS, Split
from htfa_jax.data.splits import open_named, open_split
from htfa_jax.sharding.layout import Layout
from htfa_jax.training.plan import describe_plan
from htfa_jax.training.vq_stage import cached_folder, needs_vq_stage

# Records of each split that are read and decoded.
TRIED = 8


def dry_run(config: Config, workdir: Path | None) -> str:
    """The plan as text: data, steps, then what `plan.describe` says.

    Args:
      config: of the run.
      workdir: of the run; None for a new one.

    Raises DataError if a split is not there or its first records would stop the run.
    """
    lines, num_train = [], 0
    for split in SPLITS:
        for source in sources_of(config.data, split):
            num, seen = _look(config, split, source)
            lines.append(f"{split:<12} {source}: {num:,} records, {seen}")
            num_train += num if split == "train" else 0
    if held_out(config.data):
        num_train = len(open_split(config, "train"))
    lines.append(_steps(config, workdir, num_train))
    if needs_vq_stage(config):
        said = "was trained before" if _has_vq(config) else f"{config.vq_train.num_steps:,} steps"
        lines.append(f"VQ stage     {said}, before the first of these")
    lines.append(describe_plan(config))
    return "\n".join(lines)


def sources_of(data: DataConfig, split: Split) -> list[str]:
    """Names of what a split is read from; none if there is no such split."""
    if split == "train" and data.sources:
        return [name for name, _ in data.sources]
    source = getattr(data, split)
    return [] if source is None else [source]


def _look(config: Config, split: Split, source: str) -> tuple[int, str]:
    """How many records a source has, and what was seen of them."""
    if source == FROM_TRAIN:
        return len(open_split(config, split)), f"one in {EVERY} of data.train"
    if source == EMBEDDED:
        return getattr(config.held_objects, f"num_{split}"), "drawn on first use"
    records = open_named(config, source, split)
    num = min(TRIED, len(records))
    loader = SampleLoader(records, None, config)
    bad = sum("error" in loader(index) for index in range(num))
    found = f"{bad} bad" if bad else "sound"
    return len(records), f"the first {num} read and decoded: {found}; htfa_jax.data.check reads all"


def _has_vq(config: Config) -> bool:
    """Whether the cache holds the stage's result, as far as that is known without drawing data."""
    mixed = config.data.sources and EMBEDDED in sources_of(config.data, "train")
    return not mixed and (cached_folder(config) / WEIGHTS).is_file()


def _steps(config: Config, workdir: Path | None, num_records: int) -> str:
    samples = samples_per_step(config.train, Layout(config).num_shards)
    done = integrity.steps(workdir)[-1:] if workdir is not None else []
    return (
        f"steps        {num_steps(config.train, num_records, samples):,} of {samples} samples, "
        f"{max(1, num_records // samples):,} an epoch; "
        + (f"{workdir} goes on after step {done[0]:,}" if done else "a new run")
    )
