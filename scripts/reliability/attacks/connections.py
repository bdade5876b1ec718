"""Connections that hold the server up, and requests under a foreign name."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator

from attacks.target import REFUSED, SURVIVED, THROUGH, Attempt, Target, png

CONNECTIONS = 200


def headers(target: Target) -> Iterator[Attempt]:
    """Foreign Host names and origins."""
    here = f"{target.host}:{target.port}"
    for host in (
        "evil.example",
        "evil.example:80",
        f"evil.example@{here}",
        f"{here}.evil",
        "[",
        "",
    ):
        for path in ("/", "/config", "/healthz", "/gradio_api/file=x"):
            status = target.get(path, headers={"host": host}).status_code
            outcome = REFUSED if status == 400 else THROUGH
            yield Attempt(f"GET {path} under the host {host!r}", outcome, str(status))
    for origin in (
        "https://evil.example",
        "null",
        f"http://{here}.evil",
        "http://evil:[",
        "file://",
    ):
        for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/v1/infer"):
            answer = target.post(
                path, headers={"origin": origin}, files={"files": ("a.png", png())}
            )
            outcome = REFUSED if answer.status_code == 403 else THROUGH
            yield Attempt(f"POST {path} from {origin}", outcome, str(answer.status_code))


def half_heads(target: Target) -> Iterator[Attempt]:
    """Requests whose head never ends."""
    half = target.head("POST /v1/infer HTTP/1.1")[:-2] + b"X-a: "
    for what, beginning in (("half a head", half), ("nothing", b""), ("a line", b"GET /")):
        yield _held(target, f"{CONNECTIONS} connections that send {what}", beginning, b"a")


def slow_bodies(target: Target) -> Iterator[Attempt]:
    """Bodies that come byte by byte."""
    kind = "content-type: multipart/form-data; boundary=x"
    for line, *more in (
        ("POST /v1/infer HTTP/1.1", kind, "content-length: 1000000"),
        ("POST /v1/infer HTTP/1.1", kind, "transfer-encoding: chunked"),
        ("POST /gradio_api/upload HTTP/1.1", kind, "content-length: 1000000"),
        ("GET /healthz HTTP/1.1", "content-length: 1000000"),
    ):
        piece = b"1\r\nx\r\n" if "chunked" in more[-1] else b"x"
        part = b'--x\r\ncontent-disposition: form-data; name="image_orig"; filename="a"\r\n\r\n'
        if "chunked" in more[-1]:
            part = b"%x\r\n%b\r\n" % (len(part), part)
        head = target.head(line, *more) + part
        yield _held(target, f"slow body of {line} ({more[-1]})", head, piece, 4)


def _held(
    target: Target, what: str, head: bytes, piece: bytes, count: int = CONNECTIONS
) -> Attempt:
    """Opens connections and keeps sending a little; the server should end them."""
    with contextlib.ExitStack() as stack:
        held: list[socket.socket] = []
        for _ in range(count):
            try:
                connection = stack.enter_context(target.connect())
                connection.sendall(head)
            except OSError:  # it takes no more of ours
                continue
            connection.setblocking(False)
            held.append(connection)
        begun = time.monotonic()
        while held and time.monotonic() - begun < target.seconds:
            time.sleep(0.5)
            held = [connection for connection in held if _open(connection, piece)]
    took = f"{len(held)} of {count} open after {time.monotonic() - begun:.0f} s"
    return Attempt(what, THROUGH if held else SURVIVED, took)


def _open(connection: socket.socket, piece: bytes) -> bool:
    """Whether a connection is still open, to which a piece more is sent if there is one."""
    try:
        while select.select([connection], [], [], 0)[0]:
            if not connection.recv(65536):
                return False
        if piece:
            connection.send(piece)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True
