"""What a trained model is on disk: a run, one of its checkpoints, an exported run, a hub id.

A run's workdir is described in `checkpoints`. An exported run, as `export` writes it, holds

    config.json                    the run's configuration, without places on its machine
    model.safetensors              all weights; their step among the file's facts
    tokenizer/                     what text goes through
    evaluation/SPLIT/metrics.json  how these weights did, where the run was evaluated
    README.md                      the model card
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from htfa_jax import hub, parts
from htfa_jax.config import Config
from htfa_jax.config_io import load_config
from htfa_jax.errors import CheckpointError
from htfa_jax.paths import Flat

CHECKPOINTS, MODEL = "checkpoints", "model.safetensors"
# Of a repository, what using its model takes.
FETCHED = ("config.json", MODEL, "tokenizer/*")


def new_workdir(name: str) -> Path:
    """runs/NAME_TIME, not there yet."""
    return Path("runs") / f"{name}_{time.strftime('%Y%m%d_%H%M%S')}"


def make_workdir(path: Path) -> Path:
    """Makes the folder if it is not there. Raises CheckpointError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--workdir {path} cannot be a folder: {error}") from error
    return path


def find_run(path: str | Path, revision: str | None = None) -> tuple[Path, int | None]:
    """The folder and step that a path means: a run or export, or one checkpoint of a run.

    Args:
      path: such a folder, or the hub id of an exported run, which is fetched.
      revision: of a hub repository: branch, tag or commit.

    Raises:
      CheckpointError: if it is none of these.
    """
    name, path, step = str(path), Path(path).expanduser(), None
    if hub.is_repository(name):
        path = hub.fetch(name, revision, FETCHED)
    elif path.name.isdigit() and path.parent.name == CHECKPOINTS:
        path, step = path.parent.parent, int(path.name)
    is_run = (path / "config.json").is_file() and (path / CHECKPOINTS).is_dir()
    if not is_run and not is_export(path):
        raise CheckpointError(
            f"{name} is not a run: expected config.json and {CHECKPOINTS}/ (or a folder "
            f"{CHECKPOINTS}/STEP of one), or config.json, {MODEL} and tokenizer/, as "
            "`python -m htfa_jax.export` writes"
        )
    return path, step


def is_export(folder: Path) -> bool:
    """Whether a folder is an exported run."""
    files = all((folder / name).is_file() for name in ("config.json", MODEL))
    return files and (folder / "tokenizer").is_dir()


def load_run(
    path: str | Path, shapes_of: Callable[[Config], Flat], revision: str | None = None
) -> tuple[Config, Flat, int, Path]:
    """Configuration, all weights, step and folder of what `find_run` finds.

    Of a run, the best checkpoint counts if there were evaluations, else the newest.

    Args:
      path, revision: as in `find_run`.
      shapes_of: from the run's configuration to `{path: shape and dtype}` of all parameters.

    Raises:
      CheckpointError: no such run, or weights that are damaged or of another model.
    """
    folder, step = find_run(path, revision)
    config = load_config(folder)
    if is_export(folder):
        params, facts = parts.read_weights(folder, MODEL), parts.read_facts(folder / MODEL)
        parts.check_shapes(params, shapes_of(config), str(folder / MODEL))
        if "step" not in facts:
            raise CheckpointError(f"{folder / MODEL} does not say its step: export the run again")
        return config, params, int(facts["step"]), folder

    from htfa_jax.checkpoints import load_frozen, open_checkpoints  # Orbax: exports need none

    with open_checkpoints(folder, config, read_only=True) as checkpoints:
        step = checkpoints.best_step() if step is None else step
        if step is None:
            raise CheckpointError(f"{folder / CHECKPOINTS} holds no complete checkpoint")
        frozen = load_frozen(folder, checkpoints.restore(step)["meta"]["frozen"])
        trainable = {k: v for k, v in shapes_of(config).items() if k not in frozen}
        params = checkpoints.restore(step, params=trainable)["params"]
    return config, {**params, **frozen}, step, folder
