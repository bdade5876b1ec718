"""Copies a run to a bucket or another disk, and back again on a machine that knows nothing of it.

    python -m htfa_jax.copy_run runs/a kept/a    # or gs://bucket/a, s3://bucket/a
    python -m htfa_jax.copy_run kept/a runs/b    # on the next machine; then go on training there

Started again it copies what is new. Nothing is deleted at the target. Names that begin with a dot
are left out; a name that leads out of its folder, or a link, and nothing is copied.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from htfa_jax.common.cli import command, parse
from htfa_jax.common.files import whole_file
from htfa_jax.common.logs import progress
from htfa_jax.common.names import checked_name, inside, links
from htfa_jax.data.storage import is_url, remote
from htfa_jax.errors import CheckpointError

# What belongs to the process that trains, or is not whole yet.
LEFT_OUT = re.compile(r"lock\.json|(.*/)?\.[^/]*(/.*)?|.*\.orbax-checkpoint-tmp.*")
# Files that are never written twice under one name.
UNCHANGING = re.compile(r"checkpoints/\d+/.*|frozen/.*")
HASHES = re.compile(r"checkpoints/\d+/hashes\.json")


@dataclasses.dataclass(frozen=True)
class Copied:
    """What a copy did.

    Attributes:
      files: that were copied.
      size: of these, in bytes.
      there: files that were at the target already.
    """

    files: int
    size: int
    there: int


def copy_run(source: str | Path, target: str | Path) -> Copied:
    """Copies a run's workdir, a training one too; either side is a folder or a URL.

    A checkpoint's hashes are copied last: one that was cut off is noticed where it arrives.

    Raises:
      CheckpointError: no run there, a name or link that leads elsewhere, a target that has gone on
        further, or a copy that fails.
      DataError: an unknown scheme, or one that needs more packages.
    """
    source, target = str(source).rstrip("/"), str(target).rstrip("/")
    try:
        with remote(source) as (files, start), remote(target) as (others, end):
            found, there = _sizes(files, start), _sizes(others, end)
            if not is_url(target):
                _refuse_elsewhere(Path(end), found)
            if "config.json" not in found:
                raise CheckpointError(f"{source} is not a run: there is no config.json in it")
            newest, beyond = _newest(found), _newest(there)
            if beyond > newest:
                raise CheckpointError(
                    f"{target} holds step {beyond} of a run, {source} only step {newest}: copy "
                    "the other way, or name another target"
                )
            new = [
                name
                for name in sorted(found, key=lambda name: (bool(HASHES.fullmatch(name)), name))
                if not UNCHANGING.fullmatch(name) or there.get(name) != found[name]
            ]
            with progress(len(new), "copy", unit="file") as bar:
                for name in new:
                    _copy(files, f"{start}/{name}", others, end, name, is_url(target))
                    bar.update(1)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be copied to {target}: {error}") from error
    return Copied(len(new), sum(found[name] for name in new), len(found) - len(new))


def _sizes(files: Any, folder: str) -> dict[str, int]:
    """{path inside: bytes} of what there is to copy.

    Raises CheckpointError for a name that leads out of the folder, and for a link.
    """
    if not files.isdir(folder):
        return {}
    if "file" in files.protocol:
        for name in links(Path(folder)):
            # Behind a hidden one may be the whole disk, which would be listed.
            if not LEFT_OUT.fullmatch(name) or Path(folder, name).is_dir():
                raise CheckpointError(
                    f"{folder}/{name} is a link, which a run does not hold: nothing was copied. "
                    "Put what it points to in its place"
                )
    start, found = folder.rstrip("/") + "/", {}
    for path, facts in files.find(folder, detail=True).items():
        if not path.startswith(start):
            raise CheckpointError(f"{folder}: {path!r} is not in it: nothing was copied")
        name = path.removeprefix(start)
        if name.endswith("/") and not facts["size"]:
            continue  # how a bucket's own page keeps an empty folder
        try:
            checked_name(name)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {name!r} {error}: nothing was copied") from error
        if not LEFT_OUT.fullmatch(name):
            found[name] = facts["size"]
    return found


def _refuse_elsewhere(folder: Path, names: dict[str, int]) -> None:
    """Raises CheckpointError if a link at the target would take a file to another place."""
    for name in names:
        try:
            inside(folder, name, str(folder))
        except ValueError as error:
            raise CheckpointError(f"{folder}: {name!r} {error}: nothing was copied") from error


def _newest(names: dict[str, int]) -> int:
    steps = [re.match(r"checkpoints/(\d+)/", name) for name in names]
    return max((int(step[1]) for step in steps if step), default=-1)


def _copy(files: Any, path: str, others: Any, folder: str, name: str, far: bool) -> None:
    """Copies one file; a local one is there whole or not at all, as it is in a bucket."""
    with files.open(path, "rb") as content:
        if far:
            with others.open(f"{folder}/{name}", "wb") as file:
                shutil.copyfileobj(content, file, 2**24)
            return
        place = Path(folder) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(place, "wb") as file:
            shutil.copyfileobj(content, file, 2**24)


@dataclasses.dataclass(frozen=True)
class CopyArgs:
    """Options of the command."""

    source: Annotated[str, tyro.conf.Positional]  # a workdir, or a URL: gs://, s3:// ...
    target: Annotated[str, tyro.conf.Positional]  # where it goes, the same


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(CopyArgs, argv, __doc__)
    copied = copy_run(args.source, args.target)
    print(
        f"{copied.files} files, {copied.size / 1e6:,.1f} MB, copied to {args.target}; "
        f"{copied.there} were there"
    )


if __name__ == "__main__":
    main()
