"""The Hugging Face hub: which names mean a repository, fetching one, and what a refusal means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from htfa_jax.errors import CheckpointError

# Folders that this project's commands make or read: a name in one of them is never asked for.
OWN = ("runs", "weights", "configs", "shared", "checkpoints")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_repository(name: str | Path) -> bool:
    """Whether a name means a repository, "user/name": a folder "user" here goes first."""
    folder = Path(name).expanduser().parent
    if str(folder) in OWN:
        return False
    return HUB_ID.fullmatch(str(name)) is not None and not folder.is_dir()


def fetch(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A local folder with those files of a repository that match a pattern.

    Without a connection it is the copy of an earlier call.

    Args:
      repository: "user/name".
      revision: branch, tag or commit; the main branch by default.
      patterns: such as "*.json".

    Raises:
      CheckpointError: no such repository or revision, no permission, no connection and no copy.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # each release raises the errors of another HTTP library
        raise refusal(repository, error) from error


def refusal(repository: str, error: Exception) -> CheckpointError:
    """The error for a name that is nothing here and that the hub gave an error for."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        reason = "is no file or folder here, the hub cannot be reached, and no copy of it is kept"
    elif isinstance(error, RevisionNotFoundError):
        reason = "is a repository of the hub, which has no such revision"
    else:
        reason = "is neither a file or folder here nor a repository that the hub gives out"
    return CheckpointError(f"{repository} {reason}: {error}")
