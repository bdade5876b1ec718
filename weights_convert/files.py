"""Files of a checkpoint: of a folder or of the hub, which of them are weights, what stands in them.

What people have is often not what a file is called: a pointer of git-lfs, a web page that was saved
instead of a file, the state of an optimizer. Each is a sentence here that says what to do.
"""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Protocol

from htfa_jax.checkpoints import hub
from htfa_jax.errors import CheckpointError

log = logging.getLogger("htfa_jax.weights_convert")

SAFETENSORS, PICKLES = (".safetensors",), (".bin", ".pt", ".pth", ".ckpt")

# What trainers write beside the weights: pickles of another kind.
_STATE = re.compile(
    r"training_args\.bin|optimizer.*|scheduler.*|scaler.*|rng_state.*|random_states.*|"
    r"trainer_state.*|sampler.*|.*optim_states\.pt|adapter_model\..*|"
    r"tokenizer.*|args\.(bin|pt)"
)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")


class Files(Protocol):
    """A folder's files by name."""

    names: list[str]

    def get(self, name: str) -> Path:
        """A local path of a file."""


class LocalFiles:
    """Files of a folder, or one file and what stands beside it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = sorted(p.name for p in folder.iterdir() if p.is_file())

    def get(self, name: str) -> Path:
        """A local path of a file. Raises CheckpointError for what only stands for a file."""
        check_content(self.folder / name)
        return self.folder / name


class HubFiles:
    """Files of a repository on the hub, at one commit, downloaded when asked for.

    Attributes:
      revision: the commit.
      names: of all files.
      sizes: bytes by name, as far as the hub says.
    """

    def __init__(self, repository: str, revision: str | None, sizes: bool = False):
        from huggingface_hub import HfApi

        # Sizes are only asked for where they are shown: not every mirror of the hub says them.
        ask = functools.partial(HfApi().model_info, repository, revision=revision)
        try:
            info = ask(files_metadata=True) if sizes else ask()
        except Exception as error:  # each release raises the errors of another HTTP library
            raise hub.refusal(repository, error) from error
        self.repository, self.revision = repository, info.sha
        found = [s for s in info.siblings or () if "/" not in s.rfilename]
        self.names = sorted(s.rfilename for s in found)
        self.sizes = {s.rfilename: getattr(s, "size", None) or 0 for s in found}

    def get(self, name: str) -> Path:
        """A local path of a file. Raises CheckpointError if it cannot be fetched."""
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(self.repository, name, revision=self.revision))
        except Exception as error:  # as above
            raise CheckpointError(f"{self.repository}/{name} cannot be fetched: {error}") from error
        check_content(path)
        return path


def check_content(path: Path) -> None:
    """Raises CheckpointError for a file that is only a stand-in for what it is called."""
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError:
        return  # whoever reads it says what is wrong
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise CheckpointError(
            f"{path} is a pointer of git-lfs, not the file itself: run `git lfs install` and `git "
            "lfs pull` in that folder, or give the hub id instead of the folder"
        )
    if re.match(rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html|<head)", start, re.IGNORECASE):
        raise CheckpointError(
            f"{path} is a web page that was saved under this name: download the file itself (on "
            "the hub its address says /resolve/, not /blob/), or give the hub id"
        )
    if path.suffix not in SAFETENSORS + PICKLES or not start or len(start) == 1024:
        return
    try:
        said = start.decode("utf-8").strip()
    except UnicodeDecodeError:
        return
    if said.isprintable() and said:
        raise CheckpointError(
            f"{path} cannot be read as tensors: it holds the text {said[:100]!r}; if that is a "
            "server's answer, download the file again (hf auth login, if it is not public)"
        )


def weight_files(names: list[str], where: str) -> tuple[str | None, list[str]]:
    """Which files of a folder hold the weights: an index, or the files themselves.

    As transformers it takes safetensors before pickles and the usual names before others.

    Args:
      names: of the folder's files.
      where: the folder, for messages.

    Raises:
      CheckpointError: none, two sets of weights, or shards of which some are missing.
    """
    for endings, usual in ((SAFETENSORS, "model.safetensors"), (PICKLES, "pytorch_model.bin")):
        indexes = [n for n in names for e in endings if n.endswith(f"{e}.index.json")]
        index = f"{usual}.index.json"
        if index in indexes and usual in names:
            raise CheckpointError(
                f"{where} holds {usual} and {index}, of which one is left over from before: give "
                "the file itself, or move one of them away"
            )
        if index in indexes:
            return index, []
        if len(indexes) > 1:
            raise CheckpointError(f"{where} holds {', '.join(indexes)}: move all but one away")
        if indexes:
            return indexes[0], []
        found = [n for n in names if n.endswith(endings) and not _STATE.fullmatch(n)]
        if usual in found:
            if others := [n for n in found if n != usual]:
                log.info("%s: %s is read; not %s", where, usual, ", ".join(others))
            return None, [usual]
        if found:
            _check_shards(found, where)
            return None, found
    adapters = [n for n in names if n.startswith("adapter_model.")]
    if adapters:
        return None, adapters  # of which `refuse_adapters` says what it is
    beside = [n for n in names if n.endswith(SAFETENSORS + PICKLES)]
    raise CheckpointError(
        f"no weights in {where}: expected {', '.join(SAFETENSORS + PICKLES)}"
        + (f"; {', '.join(beside)} hold a training's state, no weights" if beside else "")
        + (" (a .gguf cannot be read)" if any(n.endswith(".gguf") for n in names) else "")
    )


def _check_shards(names: list[str], where: str) -> None:
    """Raises CheckpointError if some of the shards that names tell of are not there."""
    for match in map(_SHARD.fullmatch, names):
        if match is None:
            continue
        stem, _, total, ending = match.groups()
        all_of = [f"{stem}-{i:05}-of-{total}{ending}" for i in range(1, int(total) + 1)]
        if gone := [name for name in all_of if name not in names]:
            raise CheckpointError(f"{where} lacks {', '.join(gone[:10])}: {AGAIN}")


AGAIN = "the checkpoint is incomplete; download these files again, or give the hub id"
