"""What a run was made from, by content: pretrained weights and a tokenizer that the user named.

A run can be copied to another machine, where the same weights lie in another place. So their
hashes are kept in `pretrained.json`, and a run that goes on compares these, not paths.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from htfa_jax.checkpoints import integrity
from htfa_jax.checkpoints.runs import CHECKPOINTS, MODEL, find_run, is_export
from htfa_jax.checkpoints.weights import WEIGHTS
from htfa_jax.common.files import write_whole
from htfa_jax.common.hashing import file_sha256
from htfa_jax.common.json_files import read_json
from htfa_jax.config import Config, get, leaves
from htfa_jax.config.places import WEIGHTS as NAMES
from htfa_jax.errors import CheckpointError, ConfigError

ORIGINS = "pretrained.json"
RUN, TOKENIZER = "pretrained.run", "data.tokenizer"
# What decides the weights of a run, and so stays.
FIXED = ("pretrained", "freeze", "level1.learnable", TOKENIZER)
# Folders of converted weights, which are named by what they were made from.
_CONVERTED = re.compile(r"\w+-[0-9a-f]{16}")


def remember(workdir: Path, config: Config) -> None:
    """Keeps the hashes of what a new run is made from."""
    found = {name: content(config, name) for name in (*NAMES, TOKENIZER)}
    known = {name: digits for name, digits in found.items() if digits is not None}
    write_whole(workdir / ORIGINS, json.dumps(known, indent=1) + "\n", durable=True)


def refuse_others(workdir: Path, before: Config, config: Config) -> None:
    """A run with checkpoints goes on with its weights; asking for others is a mistake.

    Args:
      workdir: of the run.
      before: its configuration until now.
      config: that it should go on with.

    Raises ConfigError that names the fields, CheckpointError if the hashes cannot be read.
    """
    path, old = workdir / ORIGINS, dict(leaves(before))
    known = read_json(path, CheckpointError) if path.is_file() else {}
    changed = [
        f"{name} was {old[name]} and is now {value}"
        for name, value in leaves(config)
        if name.startswith(FIXED)
        and old[name] != value
        and not (name in (*NAMES, TOKENIZER) and _is_same(config, name, old[name], known))
    ]
    if changed:
        raise ConfigError(
            "this workdir's run has checkpoints, which decide these: " + "; ".join(changed) + ". "
            "Use another --workdir (--init_from starts from this run's weights)"
        )


def content(config: Config, name: str) -> str | None:
    """The SHA-256 of what a field names; None if it names nothing, or nothing that is there."""
    value = get(config, name)
    if value is None:
        return None
    try:
        return file_sha256(_file(name, value))
    except (OSError, CheckpointError):
        return None


def _file(name: str, value: str) -> Path:
    """The file that tells what a field names from others of its kind."""
    folder = Path(value).expanduser()
    if name == TOKENIZER:
        return folder / "tokenizer.json"
    if name != RUN:
        return folder / WEIGHTS
    run, step = find_run(value)
    if is_export(run):
        return run / MODEL
    steps = integrity.steps(run) if step is None else [step]
    return run / CHECKPOINTS / str(max(steps, default=0)) / integrity.HASHES


def _is_same(config: Config, name: str, before: str | None, known: dict[str, str]) -> bool:
    """Whether a field names in another place what it named before."""
    value = get(config, name)
    if before is None or value is None:
        return False
    if name in known:
        return content(config, name) == known[name]
    # A run of an earlier version, which kept no hashes.
    last = Path(value).name
    return last == Path(before).name and _CONVERTED.fullmatch(last) is not None
