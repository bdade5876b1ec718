"""Files of drawn scenes with the hashes of what was drawn: a damaged one is drawn again.

A scene's sidecar holds the SHA-256 of each of its images and of itself. An image is compared with
it when it is read, which takes 0.4 ms a record where decoding takes 10: a start reads none of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htfa_jax.common.files import write_whole
from htfa_jax.common.hashing import file_sha256, short_hash, text_sha256
from htfa_jax.common.json_files import read_json
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.data.storage import StoredImage
from htfa_jax.errors import DataError

log = logging.getLogger(__name__)

HASHES, SEAL = "sha256", "seal"
# Draws scenes of these numbers, and yields each when its files are there; can be sent to workers.
Draw = Callable[[Iterable[int]], Iterable[int]]


def sealed(sidecar: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """A sidecar's text with the hashes of its scene's files.

    Args:
      sidecar: what a record needs to know.
      images: contents of the files by their folder.
    """
    hashes = {name: text_sha256(content) for name, content in images.items()}
    whole = {**sidecar, HASHES: hashes}
    return json.dumps({**whole, SEAL: short_hash(whole)})


def read_sidecar(path: Path) -> dict[str, Any]:
    """What a sidecar says. Raises DataError if it is not what was written."""
    content = read_json(path, DataError)
    seal = content.pop(SEAL, None)
    # Those of older versions have none.
    if seal is not None and short_hash(content) != seal:
        raise DataError(f"{path} is damaged: its hash differs")
    return content


def sound_sidecar(split: Path, index: int, draw: Draw) -> dict[str, Any]:
    """What the sidecar of a scene says, which is drawn again if it is damaged.

    Args:
      split: folder.
      index: number of the scene.
      draw: draws scenes of this folder.

    Raises DataError if it still cannot be read.
    """
    path = split / "meta" / f"{index:06d}.json"
    try:
        return read_sidecar(path)
    except DataError as error:
        _draw_again(index, draw, str(error))
    return read_sidecar(path)


@dataclass(frozen=True)
class SceneImage(StoredImage):
    """An image of a drawn scene.

    Attributes:
      name: path of its file: SPLIT/FOLDER/NUMBER.ENDING.
      draw: draws scenes of this folder.
    """

    name: str
    draw: Draw

    @property
    def path(self) -> Path:
        """Of its file."""
        return Path(self.name)

    def is_file(self) -> bool:
        return self.path.is_file()

    def read_bytes(self) -> bytes:
        kind, index = self.path.parent, int(self.path.stem)
        try:
            content = self.path.read_bytes()
            hashes = read_sidecar(kind.parent / "meta" / f"{self.path.stem}.json").get(HASHES, {})
            expected = hashes.get(kind.name)
            if expected is None or text_sha256(content) == expected:
                return content
            problem = f"{self.path} is damaged: its hash differs"
        except (FileNotFoundError, DataError) as error:
            problem = str(error)
        _draw_again(index, self.draw, problem)
        return self.path.read_bytes()


def _draw_again(index: int, draw: Draw, problem: str) -> None:
    log.warning("%s: scene %d is drawn again", problem, index)
    try:
        list(draw([index]))
    except OSError as error:
        raise DataError(f"{problem}, and scene {index} cannot be drawn again: {error}") from error


@dataclass(frozen=True)
class ScenePlace:
    """Finds a record's images, as `ImageRoot` does.

    Attributes:
      folder: of the scenes.
      draw: draws scenes of this folder.
    """

    folder: Path
    draw: Draw

    def __call__(self, name: str) -> SceneImage:
        """The image of that path."""
        return SceneImage(str(self.folder / name), self.draw)


class SceneRecords(RecordFile):
    """The records of drawn scenes.

    Args:
      path: of their JSON lines.
      draw: draws scenes of that folder.
    """

    def __init__(self, path: Path, draw: Draw):
        super().__init__(path)
        self.place = ScenePlace(path.parent, draw)


def write_records(path: Path, lines: str) -> None:
    """Writes JSON lines, and their hash beside them. Raises OSError."""
    write_whole(path, lines.encode())
    write_whole(_hash_of(path), file_sha256(path))


def are_sound(path: Path) -> bool:
    """Whether JSON lines are there, and what was written; of older versions, whether there."""
    if not path.exists():
        return False
    if not _hash_of(path).exists():
        return True
    if same := _hash_of(path).read_bytes() == file_sha256(path).encode():
        return same
    log.warning("%s is damaged: its hash differs. It is written again", path)
    return False


def _hash_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
