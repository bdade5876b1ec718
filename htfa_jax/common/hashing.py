"""SHA-256: of files, to notice changed bytes; of values, to name what is kept in caches."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

# Bytes of a block of a large file, and how much of it is read at once.
BLOCK, PIECE = 2**26, 2**20


def file_sha256(path: Path) -> str:
    """64 hex digits of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_sha256(content: bytes) -> str:
    """64 hex digits of what a file holds."""
    return hashlib.sha256(content).hexdigest()


def block_hashes(path: Path) -> list[str]:
    """64 hex digits of each 64 MiB of a file, which several threads read. Raises OSError.

    One processor does 1.5 GB/s with SHA instructions: files of dozens of GB need more of them.
    """
    starts = range(0, path.stat().st_size, BLOCK)
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(functools.partial(_block_hash, path), starts))


def _block_hash(path: Path, start: int) -> str:
    sha, left = hashlib.sha256(), BLOCK
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (piece := file.read(min(PIECE, left))):
            sha.update(piece)
            left -= len(piece)
    return sha.hexdigest()


def short_hash(value: Any) -> str:
    """16 hex digits of a value that JSON can hold; tuples count as lists.

    Folders of caches have these names: digits that change make all of them anew.
    """
    return bytes_sha256(json.dumps(value).encode())[:16]
