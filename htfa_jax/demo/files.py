"""The files of the page: what visitors sent, and what was made for them; no other is ever read."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import hmac
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, Response
from starlette.datastructures import UploadFile

from htfa_jax.common.files import write_whole
from htfa_jax.data.storage import PackedImage
from htfa_jax.demo.http import client_address
from htfa_jax.demo.options import Limits
from htfa_jax.errors import Busy, DataError

API = "/gradio_api"
RASTER = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
# Whatever a visitor sent, a browser neither guesses what it is nor runs anything of it.
HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; sandbox",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "private, no-cache",
}
UNUSED = 600  # seconds that an upload is kept which no page has used
AT_ONCE = 8  # files in one request
NAME = 60  # characters of a file's name that are kept
RETRY = 60  # seconds


@dataclasses.dataclass
class Kept:
    """An upload.

    Attributes:
      client: address that sent it first.
      size: bytes.
      sent: when it was sent, in seconds; None since a page has used it.
      pages: that use it.
    """

    client: str
    size: int
    sent: float | None
    pages: set[str] = dataclasses.field(default_factory=set)


class Files:
    """Uploads, bounded in number and bytes, and the one folder that files are served from.

    Args:
      root: the folder; nothing else lies in it.
      limits: of what is kept.
    """

    def __init__(self, root: Path, limits: Limits):
        self.root, self.limits = root.resolve(), limits
        self.uploads = self.root / "uploads"
        self.uploads.mkdir(parents=True, exist_ok=True)
        # An upload lies under its content, so that the same is kept once; with the key nobody
        # can tell the place of a file that he has not sent himself.
        self._key = secrets.token_bytes(32)
        self._kept: dict[Path, Kept] = {}
        self._coming: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def room(self, client: str, size: int) -> Iterator[None]:
        """Keeps room for what an address sends. Raises Busy if there is none."""
        most, number = self.limits.kept_mb * 10**6, self.limits.kept_files
        own = [kept.size for kept in self._kept.values() if kept.client == client]
        # One address never takes more than half.
        mine = sum(own) + self._coming[client] + size
        if 2 * mine > most or 2 * len(own) >= number:
            raise Busy(
                "your uploads fill the room that there is for one address: close pages, or wait "
                f"for {UNUSED // 60} minutes",
                RETRY,
                by_this_client=True,
            )
        everybody = sum(kept.size for kept in self._kept.values()) + self._coming.total() + size
        if everybody > most or len(self._kept) >= number:
            raise Busy("uploads fill this server: try again later", RETRY)
        self._coming[client] += size
        try:
            yield
        finally:
            self._coming[client] -= size
            self._coming = +self._coming

    async def save(self, client: str, name: str, content: bytes) -> Path:
        """Keeps an upload. Its name is kept too, for messages."""
        name = "".join(c if c.isalnum() or c in " -_." else "_" for c in Path(name).name)
        name = name.strip(". ")[-NAME:] or "image"
        digest = hmac.digest(self._key, f"{name}\0".encode() + content, "sha256").hex()
        path = self.uploads / digest / name
        path.parent.mkdir(exist_ok=True)
        await asyncio.to_thread(write_whole, path, content)
        self._kept.setdefault(path, Kept(client, len(content), None)).sent = time.monotonic()
        return path

    def find(self, name: str) -> Path | None:
        """A file that may be served, None for every other place, whether there is one or not."""
        try:
            path = Path(name).resolve()
            return path if path.is_relative_to(self.root) and path.is_file() else None
        except (OSError, ValueError):  # too long, or with a zero byte
            return None

    def read(self, name: str, page: str | None = None) -> PackedImage:
        """An image that a page sent, or an example's copy. Raises DataError.

        Args:
          name: its path.
          page: as long as it is open an upload is kept from now on; None: it is read once.
        """
        path = self.find(name)
        try:
            content = None if path is None else path.read_bytes()
        except FileNotFoundError:
            content = None
        if path is None or content is None:
            raise DataError(f"{Path(name).name[:NAME]} is not kept any more: send it again")
        if page is not None and path in self._kept:
            self._kept[path].sent = None
            self._kept[path].pages.add(page)
        return PackedImage(path.name, content)

    def release(self, page: str) -> None:
        """Deletes what only this page has used."""
        for kept in self._kept.values():
            if page in kept.pages:
                kept.pages.remove(page)
        self.sweep()

    def sweep(self) -> None:
        """Deletes what no page uses."""
        now = time.monotonic()
        for path, kept in list(self._kept.items()):
            if not kept.pages and (kept.sent is None or now - kept.sent > UNUSED):
                del self._kept[path]
                shutil.rmtree(path.parent, ignore_errors=True)


def add_files(app: FastAPI, files: Files) -> None:
    """Adds the routes that the page sends and fetches files by, in place of Gradio's own.

    Args:
      app: where to.
      files: what is kept.
    """

    @app.post(f"{API}/upload", include_in_schema=False)
    async def upload(request: Request) -> list[str]:
        """Keeps the files of a form and gives their paths, as Gradio's page expects it."""
        client = client_address(request)
        told = request.headers.get("content-length", "")
        most = files.limits.upload_mb * 10**6
        with files.room(client, int(told) if told.isdecimal() else most):
            async with request.form(max_files=AT_ONCE, max_fields=AT_ONCE) as form:
                sent = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
                return [
                    str(await files.save(client, file.filename or "", await file.read()))
                    for file in sent
                ]

    @app.get(f"{API}/upload_progress", include_in_schema=False)
    async def progress() -> Response:
        """What Gradio's page listens to meanwhile; one image is soon there."""
        return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    @app.api_route(f"{API}/file={{name:path}}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(name: str) -> FileResponse:
        """A file of a visitor, as something to keep and not to run."""
        path = await asyncio.to_thread(files.find, name)
        if path is None:
            raise HTTPException(404, "there is no such file, or not any more")
        raster = path.suffix.lower() in RASTER
        kind = None if raster else "application/octet-stream"
        return FileResponse(path, media_type=kind, filename=path.name, headers=HEADERS)
