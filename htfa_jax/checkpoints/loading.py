"""From the folder of a run or an export to its configuration and weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from htfa_jax.checkpoints import integrity, weights
from htfa_jax.checkpoints.runs import CHECKPOINTS, MODEL, find_run, is_export, run_config
from htfa_jax.checkpoints.tokenizer_files import check_tokenizer, tokenizer_hashes
from htfa_jax.common.hashing import block_hashes, file_sha256
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config
from htfa_jax.errors import CheckpointError


def load_run(
    path: str | Path, shapes_of: Callable[[Config], Flat], revision: str | None = None
) -> tuple[Config, Flat, int, Path]:
    """Configuration, all weights, step and folder of what `find_run` finds.

    Of a run, the best checkpoint counts if there were evaluations, else the newest. The places
    that its configuration names are left out.

    Args:
      path, revision: as in `find_run`.
      shapes_of: from the run's configuration to `{path: shape and dtype}` of all parameters.

    Raises:
      CheckpointError: no such run, or weights that are damaged or of another model.
    """
    folder, step = find_run(path, revision)
    config = run_config(folder)
    if is_export(folder):
        params, facts = weights.read_weights(folder, MODEL), weights.read_facts(folder / MODEL)
        weights.check_shapes(params, shapes_of(config), str(folder / MODEL))
        told = facts.get("step", "")
        if not (told.isascii() and told.isdigit() and len(told) < 19):
            raise CheckpointError(f"{folder / MODEL} does not say its step: export the run again")
        return config, params, int(told), folder

    from htfa_jax.checkpoints.manager import load_frozen, open_checkpoints

    with open_checkpoints(folder, config.train, read_only=True) as checkpoints:
        step = checkpoints.best_step() if step is None else step
        if step is None:
            raise CheckpointError(f"{folder / CHECKPOINTS} holds no complete checkpoint")
        meta = checkpoints.restore(step)["meta"]
        check_tokenizer(folder, meta)
        frozen = load_frozen(folder, meta["frozen"])
        trainable = {k: v for k, v in shapes_of(config).items() if k not in frozen}
        params = checkpoints.restore(step, params=trainable)["params"]
    return config, {**params, **frozen}, step, folder


def content_of(path: str | Path, revision: str | None = None) -> list[Any]:
    """What tells the model that `load_run` loads from others, by content: JSON values.

    Args:
      path, revision: as in `find_run`.

    Raises CheckpointError if there is no such model.
    """
    folder, step = find_run(path, revision)
    facts = [file_sha256(folder / "config.json"), tokenizer_hashes(folder)]
    if is_export(folder):
        return [*facts, block_hashes(folder / MODEL)]

    from htfa_jax.checkpoints.manager import open_checkpoints

    with open_checkpoints(folder, run_config(folder).train, read_only=True) as checkpoints:
        step = checkpoints.best_step() if step is None else step
    checkpoint = folder / CHECKPOINTS / str(step)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{folder / CHECKPOINTS} holds no checkpoint {step}")
    hashes = checkpoint / integrity.HASHES
    return [*facts, step, file_sha256(hashes) if hashes.is_file() else integrity.hashes(checkpoint)]
