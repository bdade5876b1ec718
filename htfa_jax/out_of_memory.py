"""What to change when a device has too little memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import jax

from htfa_jax.config import Config
from htfa_jax.errors import TrainingError
from htfa_jax.plan import describe

log = logging.getLogger(__name__)


@contextlib.contextmanager
def out_of_memory_explained(config: Config, workdir: Path) -> Iterator[None]:
    """Raises TrainingError with the values that help, where a device runs out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).removeprefix("RESOURCE_EXHAUSTED: ").split("\n")[0][:300]
        raise TrainingError(
            f"a device has too little memory: {said}\nWhat needs less of it:\n  "
            + "\n  ".join(remedies(config))
            + f"\nWhat `python scripts/plan.py --config {workdir / 'config.json'}` says of this "
            f"configuration:\n{_planned(config)}"
        ) from error


def remedies(config: Config) -> list[str]:
    """Fields of the configuration that can still help, those that cost least first."""
    train, found = config.train, []
    if train.dtype == "float32":
        found.append("train.dtype=bfloat16 (is float32)")
    if train.frozen_dtype == "float32":
        found.append("train.frozen_dtype=bfloat16 (is float32)")
    if train.remat != "full":
        found.append(f"train.remat=full (is {train.remat})")
    if config.sharding.reduce_dtype == "float32":
        found.append("sharding.reduce_dtype=compute (is float32)")
    if train.batch_size > 1:
        found.append(
            f"train.batch_size (is {train.batch_size}), with train.accumulation_steps "
            f"(is {train.accumulation_steps}) raised for as many samples per update"
        )
    found.append(f"eval.batch_size (is {config.eval.batch_size}), if an evaluation was under way")
    found.append(
        f"data.max_text_length and the last of data.text_buckets (are "
        f"{config.data.max_text_length} and {config.data.text_buckets[-1]})"
    )
    if jax.device_count() > 1 and config.sharding.mode != "fsdp":
        found.append(f"sharding.mode=fsdp (is {config.sharding.mode})")
    if config.optim.name == "adamw":
        found.append("optim.name=adamw_8bit (is adamw), in a new --workdir")
    if not config.is_frozen("decoder"):
        found.append("freeze.decoder=True, with a pretrained decoder, in a new --workdir")
    return found


def _planned(config: Config) -> str:
    try:
        return describe(config)
    except Exception as error:  # a device without memory may not even compile
        return f"  nothing now: {str(error)[:300]}"
