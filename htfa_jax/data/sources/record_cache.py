"""Files that cannot be read at random, copied once into one that can.

JSON arrays, compressed files and remote ones become an ArrayRecord file of their records' texts
in `data.cache_dir`/records, named by a hash of where they are, their size and their time; remote
shards are fetched there as they are. One process makes it while others wait; what an interrupted
one left is deleted.
"""

from __future__ import annotations

import contextlib
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from htfa_jax.common.files import made_once, whole_path
from htfa_jax.common.hashing import short_hash
from htfa_jax.common.json_files import check_beginning
from htfa_jax.common.logs import progress
from htfa_jax.data.sources import array_records, json_object, json_text, tables
from htfa_jax.data.storage import is_url, remote
from htfa_jax.errors import DataError

FORMAT = 2  # of what is written here
PIECE = 2**20

log = logging.getLogger(__name__)


def identity_of(name: str) -> list[Any]:
    """What tells a file's content from another's: its place, its size and its time.

    Raises DataError if there is no such file.
    """
    try:
        if is_url(name):
            with remote(name) as (files, path):
                return [name, files.ukey(path)]
        path = Path(name).expanduser().resolve()
        stat = path.stat()
        return [str(path), stat.st_size, stat.st_mtime_ns]
    except FileNotFoundError:
        raise DataError(f"no dataset at {name}: expected a JSON or JSON-lines file") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error}") from error


def copy_of_texts(name: str, cache_dir: Path) -> Path:
    """The ArrayRecord file of a JSON or JSON-lines file's records, made now if it is not there.

    Raises DataError if the file cannot be read: where, and what is wrong with it.
    """

    def write(partial: Path) -> None:
        writer, number, started = array_records.open_writer(partial), 0, time.time()
        try:
            with contextlib.closing(records_of(name)) as records:
                for number, (text, images) in enumerate(records, 1):  # noqa: B007
                    writer.write(array_records.pack(text, images))
        except (OSError, ValueError, zlib.error) as error:
            raise DataError(f"{name}: {error}") from error
        finally:
            writer.close()
        if number == 0:
            raise DataError(f"{name} holds no records")
        log.info("%s: %d records indexed in %.0f s", name, number, time.time() - started)

    return _made_once(identity_of(name), array_records.SUFFIX, cache_dir, name, write)


def copy_of_file(url: str, cache_dir: Path) -> Path:
    """A local copy of a remote file as it is. Raises DataError."""

    def write(partial: Path) -> None:
        try:
            with _opened(url) as (file, size), partial.open("wb") as copy:
                for piece in _pieces(file, size, url):
                    copy.write(piece)
        except OSError as error:
            raise DataError(f"{url} cannot be fetched: {error}") from error

    return _made_once(identity_of(url), array_records.SUFFIX, cache_dir, url, write)


def is_random_access(name: str) -> bool:
    """Whether a file can be read at random as it is: a local one of JSON lines.

    Raises DataError if it cannot be read.
    """
    if is_url(name) or tables.is_table(name):
        return False
    try:
        with _opened(name) as (file, _):
            beginning = file.read(4096)
            check_beginning(beginning)
            lines = _decompressor(beginning) is None and _is_lines(
                beginning, lambda: file.read(PIECE)
            )
    except FileNotFoundError:
        raise DataError(f"no dataset at {name}: expected a .json or .jsonl file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{name} {error}") from error
    return lines


def _is_lines(beginning: bytes, more: Callable[[], bytes]) -> bool:
    """Whether a file that begins so holds JSON lines.

    Args:
      beginning: of its content.
      more: gives what follows, piece by piece; asked until there is a second line.
    """
    if beginning.lstrip()[:1] != b"{":
        return beginning.lstrip()[:1] != b"["
    line, newline, rest = beginning.lstrip().partition(b"\n")
    while not newline and (piece := more()):
        part, newline, rest = piece.partition(b"\n")
        line += part
    while not rest.strip() and (piece := more()):
        rest = piece
    return json_object.begins_as_lines(line, not rest.strip())


def _made_once(
    identity: list[Any], suffix: str, cache_dir: Path, name: str, write: Callable[[Path], None]
) -> Path:
    """The file of a key, which `write` makes at the path that it is given."""
    path = cache_dir / "records" / (short_hash([FORMAT, *identity]) + suffix)

    def index() -> None:
        log.info("indexing %s once, in %s", name, path)
        with whole_path(path, durable=True) as partial:
            write(partial)

    try:
        made_once(path, f"the index of {name}", index)
    except OSError as error:
        raise DataError(f"{path} cannot be written (data.cache_dir): {error}") from error
    return path


def records_of(name: str) -> Iterator[tuple[bytes, dict[str, bytes]]]:
    """The texts of a file's records, and the images that it holds itself.

    Raises OSError, and ValueError or DataError that say what is wrong with it.
    """
    if tables.is_table(name):
        yield from tables.rows(Path(name).expanduser())
    else:
        with contextlib.closing(_texts(name)) as texts:
            for text in texts:
                yield text, {}


def _texts(name: str) -> Iterator[bytes]:
    """The records' texts of a JSON file, whatever its form; blank lines left out."""
    with _opened(name) as (file, size):
        pieces = _decompressed(_pieces(file, size, name))
        beginning = next(pieces, b"")
        if not beginning:
            raise ValueError("it is empty: it has no bytes")
        check_beginning(beginning)
        seen = [beginning]

        def more() -> bytes:
            seen.append(next(pieces, b""))
            return seen[-1]

        first = beginning.lstrip()[:1]
        if first == b"{" and not _is_lines(beginning, more):
            seen.extend(pieces)
            found = json_object.texts(b"".join(seen))
            if found is not None:
                yield from found
                return
        pieces = _chain(seen, pieces)
        if first == b"[":
            for text in json_text.array_elements(pieces):
                yield text.encode()
        else:
            yield from (line for line in _lines(pieces) if line.strip())


@contextlib.contextmanager
def _opened(name: str) -> Iterator[tuple[BinaryIO, int]]:
    """A local or remote file and its size."""
    if is_url(name):
        with remote(name) as (files, path), files.open(path, "rb") as file:
            yield file, files.size(path) or 0
    else:
        path = Path(name).expanduser()
        with path.open("rb") as file:
            yield file, path.stat().st_size


def _pieces(file: BinaryIO, size: int, name: str) -> Iterator[bytes]:
    with progress(size, f"reading {name.rpartition('/')[2]}", unit="B") as bar:
        while piece := file.read(PIECE):
            yield piece
            bar.update(len(piece))


def _decompressor(beginning: bytes) -> Callable[[], Any] | None:
    """What opens a file that begins so: by its first bytes, whatever its name."""
    if beginning.startswith(b"\x1f\x8b"):
        return lambda: zlib.decompressobj(wbits=31)
    if beginning.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        return lambda: zstandard.ZstdDecompressor().decompressobj()
    return None


def _decompressed(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The content of a gzip or zstd file, of any number of members; other files as they are.

    Raises ValueError if it is damaged or cut off.
    """
    beginning = next(pieces, b"")
    pieces = _chain([beginning], pieces)
    make = _decompressor(beginning)
    if make is None:
        yield from pieces
        return
    member = None
    for piece in pieces:
        while piece:
            member = member or make()
            try:
                content = member.decompress(piece)
            except Exception as error:  # zlib's and zstandard's own
                raise ValueError(f"the compressed file is damaged: {error}") from error
            if content:
                yield content
            piece = member.unused_data if member.eof else b""
            member = None if member.eof else member
    if member is not None:
        raise ValueError("the compressed file ends in the middle: it was cut off")


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for piece in pieces:
        *whole, rest = piece.split(b"\n")
        if whole:
            yield b"".join(parts) + whole[0]
            yield from whole[1:]
            parts = []
        parts.append(rest)
    yield b"".join(parts)


def _chain(first: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    yield from first
    yield from rest
