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
from pathlib import Path

from htfa_jax.checkpoints import hub
from htfa_jax.common.names import links_out
from htfa_jax.config import Config, load_config
from htfa_jax.config.places import without_places
from htfa_jax.errors import CheckpointError

# The demo model of this package, an exported run, and the pairs in it.
DEMO, EXAMPLES = Path(__file__).parent.parent / "tiny" / "demo", "examples/pairs.jsonl"
CHECKPOINTS, MODEL = "checkpoints", "model.safetensors"
# Of a repository, what using its model takes: whole names, because `*` would match folders too.
FETCHED = (
    "config.json",
    MODEL,
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/chat_template.jinja",
)


def new_workdir(name: str) -> Path:
    """runs/NAME_TIME, not there yet."""
    return Path("runs") / f"{name}_{time.strftime('%Y%m%d_%H%M%S')}"


def make_workdir(path: Path) -> Path:
    """Makes the folder if it is not there. Raises CheckpointError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--workdir {path} cannot be a folder: {error}") from error
    refuse_links(path)
    return path


def refuse_links(run: Path) -> None:
    """Raises CheckpointError for a link out of a run, which reads and writes in itself alone."""
    if found := links_out(run):
        raise CheckpointError(
            f"{run / found[0]} is a link that leads out of {run}: a run has all its files in its "
            "own folder. Put what it points to in its place; the whole folder may be a link"
        )


def run_config(folder: Path) -> Config:
    """The configuration in a run's folder, without the places that it names (see `places`)."""
    return without_places(written_config(folder))


def written_config(folder: Path) -> Config:
    """The configuration as the run wrote it, to tell what it was made from."""
    # The file itself: a folder may be called like something else that `load_config` takes.
    return load_config(folder / "config.json")


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
