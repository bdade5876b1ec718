"""What of Gradio a visitor reaches, and which events come through."""

import contextlib
import json
import re
import time

import pytest

pytest.importorskip("gradio", reason="the page needs the extra `demo`")

from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse
from starlette.routing import Mount

from htfa_jax.demo import guard as guard_module
from htfa_jax.demo import ui
from htfa_jax.demo.options import Limits
from htfa_jax.demo.server import application
from htfa_jax.demo.serving import Serving
from htfa_jax.demo.sessions import AT_ONCE, Session, check_burden
from htfa_jax.errors import Busy
from htfa_jax.inference.engine import HTFAInference

REACHED = 299
# All that there is of Gradio.
OPEN = """
    GET / /config /theme.css /favicon.ico /manifest.json /robots.txt
    GET /assets/x /static/x /svelte/x /gradio_api/info /gradio_api/app_id
    GET /gradio_api/heartbeat/page
""".split()

LOOKED_THROUGH = [
    ("GET", guard_module.DATA),
    *(("POST", path) for path in (guard_module.JOIN, guard_module.CANCEL, guard_module.RESET)),
]


async def reached(scope, receive, send):
    """Stands in for Gradio: says that a request has come to it, and with what body."""
    body = b"" if scope["method"] == "GET" else (await receive())["body"]
    await PlainTextResponse(body, REACHED)(scope, receive, send)


@pytest.fixture(scope="module")
def app(run_folder, tmp_path_factory):
    serving = Serving(HTFAInference(run_folder), Limits(sessions=4))
    return application(serving, "tiny", tmp_path_factory.mktemp("private"), None)


@pytest.fixture
def guard(app, monkeypatch):
    (mount,) = (route for route in app.routes if isinstance(route, Mount))
    monkeypatch.setattr(mount.app, "app", reached)
    return mount.app


@pytest.fixture
def client(app):
    return TestClient(app)


def gradio_routes(app):
    (mount,) = (route for route in app.routes if isinstance(route, Mount))
    flat, found = [mount.app.app], set()
    while flat:
        for route in flat.pop().routes:
            if getattr(route, "methods", None):
                found |= {(m, re.sub(r"{[^}]*}", "page", route.path)) for m in route.methods}
            elif hasattr(route, "routes"):
                flat.append(route)
            elif hasattr(route, "original_router"):
                flat.append(route.original_router)
    return found


def test_nothing_of_gradio_is_open_that_is_not_on_the_list(app, client, monkeypatch):
    routes = gradio_routes(app)
    assert len(routes) > 50 and ("POST", "/gradio_api/component_server") in routes
    (mount,) = (route for route in app.routes if isinstance(route, Mount))
    monkeypatch.setattr(mount.app, "app", reached)
    ours = {route.path for route in app.routes if not isinstance(route, Mount)}
    routes |= {("GET", path) for path in OPEN if path != "GET"}
    for method, path in sorted(routes):
        if any(path.startswith(known.split("{")[0]) for known in ours):
            continue
        status = client.request(method, path).status_code
        listed = path in OPEN or path.startswith(guard_module.FOLDERS)
        if (method == "GET" and listed) or (method, path) == ("HEAD", "/"):
            expected = REACHED
        elif (method, path) in LOOKED_THROUGH:
            expected = 400
        else:
            expected = 404
        assert status == expected, (method, path)


@contextlib.contextmanager
def opened(guard, *names):
    """Pages that are open, each from an address of its own."""
    guard.sessions._clients.update({name: name for name in names})
    try:
        yield
    finally:
        for name in names:
            del guard.sessions._clients[name]


def event(guard, **changes):
    index, function = next((i, f) for i, f in guard.page.fns.items() if len(f.inputs) == 1)
    known = {"data": [None], "fn_index": index, "session_hash": "page"}
    return known | {"event_data": None, "trigger_id": 1} | changes


def test_an_event_is_put_together_anew(client, guard):
    path = guard.files.uploads / "a" / "x.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    file = {"path": str(path), "url": "http://evil.example", "orig_name": "/etc/passwd", "size": 1}
    sent = event(guard, data=[{"layers": [file]}]) | {"batched": True, "oauth_token": "x"}
    with opened(guard, "page"):
        answer = client.post(guard_module.JOIN, json=sent)
    ours = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
    assert answer.status_code == REACHED
    assert answer.json() == event(guard, data=[{"layers": [ours]}])


def deep(depth):
    return json.loads("[" * depth + "]" * depth)


@pytest.mark.parametrize(
    "changes, status, said",
    [
        ({"data": [{"path": "/etc/passwd"}]}, 400, "a file in it is not kept"),
        ({"data": [{"path": None, "url": "http://evil.example"}]}, 400, "a file in it"),
        ({"data": [[{"a": {"path": ["x"]}}]]}, 400, "a file in it"),
        ({"event_data": {"value": {"path": "/etc/passwd"}}}, 400, "a file in it"),
        ({"data": [deep(30)]}, 400, "too many brackets"),
        ({"data": ["x" * 2**16]}, 400, "more than 64 KiB"),
        ({"data": []}, 400, "more or less than it takes"),
        ({"data": 1}, 400, "more or less than it takes"),
        ({"fn_index": 10**6}, 400, "there is no such event"),
        ({"fn_index": "0"}, 400, "there is no such event"),
        ({"session_hash": None}, 400, "no name of a page"),
        ({"session_hash": "a<gradio-sep>b"}, 400, "no name of a page"),
        ({"session_hash": "another"}, 410, "this page is not open any more: reload it"),
    ],
)
def test_an_event_that_cannot_be_is_refused_with_a_sentence(client, guard, changes, status, said):
    with opened(guard, "page"):
        answer = client.post(guard_module.JOIN, json=event(guard, **changes))
    assert answer.status_code == status and said in answer.json()["error"]


def test_a_full_server_says_so_on_its_first_page(client, guard):
    with opened(guard, *"abcd"):
        for path in ("/", f"{guard_module.HEARTBEAT}fifth"):
            answer = client.get(path)
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert "4 pages are open, as many as this server takes" in answer.json()["error"]
        late = client.post(guard_module.JOIN, json=event(guard, session_hash="fifth"))
        assert late.status_code == 503
    assert client.get("/").status_code == REACHED


@pytest.mark.slow
def test_what_belongs_to_a_page_goes_when_nothing_happens_on_it(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ui, "IDLE", 0.1)
    serving = Serving(HTFAInference(run_folder), Limits())
    app = application(serving, "tiny", tmp_path, None)
    (mount,) = (route for route in app.routes if isinstance(route, Mount))
    page = mount.app.page
    state = next(i for i, block in page.blocks.items() if getattr(block, "time_to_live", 0) == 0.1)
    session = Session("page", mount.app.files)
    page.state_holder["page"][state] = session
    with TestClient(app):
        for _ in range(50):
            if session.closed:
                break
            time.sleep(0.1)
    assert session.closed and not list(mount.app.files.root.glob("session_*"))


def test_a_page_that_fetches_nothing_is_answered_no_more(guard):
    class Waiting:
        session_hash = "page"

    queue = guard.page._queue
    queue.event_ids_to_events |= {str(i): Waiting() for i in range(AT_ONCE)}
    try:
        check_burden(guard.page, "other")
        with pytest.raises(Busy, match="waits for too much already"):
            check_burden(guard.page, "page")
    finally:
        queue.event_ids_to_events.clear()
