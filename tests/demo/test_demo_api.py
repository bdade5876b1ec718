"""The HTTP API over a real engine: its answers are the engine's own, its refusals are sentences."""

import contextlib
import io
import json
import tempfile
import threading

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page and the API need the extra `demo`")

from fastapi.testclient import TestClient

from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.demo.gate import Gate
from htfa_jax.demo.http import client_at
from htfa_jax.demo.options import Limits
from htfa_jax.demo.server import application
from htfa_jax.demo.serving import Serving
from htfa_jax.errors import Busy, ConfigError
from htfa_jax.inference.engine import HTFAInference
from htfa_jax.inference.options import Completion, Decoding

HOSTS = frozenset({"testserver"})


@pytest.fixture(scope="module")
def engine(run_folder):
    return HTFAInference(run_folder)


@contextlib.contextmanager
def client_with(engine, folder, **limits):
    with Serving(engine, Limits(**limits)) as serving:
        app = application(serving, "tiny", folder, HOSTS)
        with TestClient(app, raise_server_exceptions=False) as client:
            client.serving = serving
            yield client


@pytest.fixture(scope="module")
def client(engine, tmp_path_factory):
    with client_with(
        engine, tmp_path_factory.mktemp("private"), upload_mb=1, question=40
    ) as client:
        yield client


@pytest.fixture(scope="module")
def record(dataset):
    return RecordFile(dataset)[0]


@pytest.fixture
def files(record):
    """The form of a whole record."""
    fields = ("image_orig", "image_recon", "object_mask", "occluder_mask")
    return {
        field: (getattr(record, field).name, getattr(record, field).read_bytes())
        for field in fields
    }


def boxes(record):
    return {name: json.dumps(getattr(record, name)) for name in ("bbox_orig", "bbox_recon")}


def events(text):
    """Names and data of server-sent events."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found


@pytest.mark.slow
def test_answers_are_the_engines_own(client, engine, record, files):
    queries = ["What color is it?", "How much is hidden?"]
    options = {"temperature": 0.9, "seed": 3, "max_new_tokens": 4}
    answer = client.post(
        "/v1/infer", files=files, data={"query": queries, **boxes(record), **options}
    )
    assert answer.status_code == 200, answer.text
    expected = engine.infer(
        **{k: getattr(record, k) for k in ("image_orig", "image_recon")},
        query=queries,
        decoding=Decoding(max_new_tokens=4, temperature=0.9, seed=3),
        object_mask=record.object_mask,
        occluder_mask=record.occluder_mask,
        bbox_orig=record.bbox_orig,
        bbox_recon=record.bbox_recon,
    )
    assert answer.json() == {
        "answers": [
            {
                "query": r.query,
                "answer": r.answer,
                "confidence": pytest.approx(r.confidence, abs=1e-5),
            }
            for r in expected
        ],
        "alignment": "boxes",
        "reconstruction": "given",
    }
    # The options have reached the engine.
    plain = client.post("/v1/infer", files=files, data={"query": queries, **boxes(record)})
    assert plain.json()["answers"] != answer.json()["answers"]


@pytest.mark.slow
def test_a_stream_brings_the_answer_in_pieces(client, engine, record, files):
    answer = client.post("/v1/stream", files=files, data={"query": "What is it?"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *pieces, (name, end) = events(answer.text)
    whole = client.post("/v1/infer", files=files, data={"query": "What is it?"}).json()
    assert name == "end" and end["answer"] == "".join(data["text"] for _, data in pieces)
    assert end["answer"] == whole["answers"][0]["answer"] != ""
    assert end["confidence"] == pytest.approx(whole["answers"][0]["confidence"], abs=1e-5)


def test_a_stream_that_fails_says_so(client, engine, files, monkeypatch):
    class Talk:
        def stream(self, query, decoding):
            yield "so "
            raise RuntimeError("/secret/path")

    monkeypatch.setattr(engine, "chat", lambda pair: Talk())
    answer = client.post("/v1/stream", files=files)
    (_, piece), (name, end) = events(answer.text)
    assert piece == {"text": "so "} and name == "error"
    assert end == {"error": "the server failed at this; its log says why"}


def test_a_full_queue_has_its_status_before_a_stream_begins(client, engine, files, monkeypatch):
    def full(ticket):
        raise Busy("64 requests wait", 3)

    monkeypatch.setattr(client.serving, "_enter", full)
    answer = client.post("/v1/stream", files=files)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "3"


@pytest.mark.parametrize("name", ["refinement_steps", "passes"])  # the older one too
def test_a_completed_image_has_the_originals_size(client, engine, record, files, name):
    answer = client.post("/v1/complete", files=files, data={name: 2, "paste_back": "true"})
    assert answer.headers["content-type"] == "image/png"
    completed = np.asarray(Image.open(io.BytesIO(answer.content)))
    expected = engine.infer(
        record.image_orig,
        record.image_recon,
        completion=Completion(refinement_steps=2, paste_back=True),
        object_mask=record.object_mask,
        occluder_mask=record.occluder_mask,
    ).completed
    np.testing.assert_array_equal(completed, np.asarray(expected))


def test_a_reconstruction_is_not_needed(client, files):
    answer = client.post("/v1/infer", files={"image_orig": files["image_orig"]})
    assert answer.json()["reconstruction"] == "own completion"


def png(size=(48, 48), color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "png")
    return buffer.getvalue()


NOISE = np.random.default_rng(0).bytes(2000)


@pytest.mark.parametrize(
    "change, data, status, said",
    [
        ({"image_orig": None}, {}, 422, "image_orig: Field required"),
        ({"image_orig": ("a.png", b"no image")}, {}, 422, "image_orig: a.png is no image"),
        ({"image_orig": ("a.png", b"")}, {}, 422, "image_orig: a.png is empty"),
        ({"image_recon": ("b.png", png()[:60])}, {}, 422, "image_recon: b.png cannot be decoded"),
        (
            {"object_mask": ("m.png", png(color="#050505"))},
            {},
            422,
            "object_mask: m.png is no mask",
        ),
        (
            {"image_orig": ("big.png", png((5000, 4000)))},
            {},
            422,
            "big.png has more than 16 million pixels",
        ),
        (
            {},
            {"bbox_orig": "1, 2, three, 4"},
            422,
            "bbox_orig='1, 2, three, 4' must be four numbers",
        ),
        ({}, {"bbox_orig": "[1, 2, 3]"}, 422, "bbox_orig must be [x, y, w, h]"),
        ({}, {"bbox_orig": "[" * 50_000}, 422, "[[[[' must be four numbers"),
        ({}, {"bbox_orig": f"1, 2, 3, {'9' * 5000}"}, 422, "must be four numbers"),
        ({}, {"bbox_orig": f"1, 2, 3, {'9' * 4000}"}, 422, "must be four numbers"),
        ({}, {"bbox_orig": "1, 2, NaN, 4"}, 422, "bbox_orig='1, 2, NaN, 4' must be four numbers"),
        ({}, {"bbox_orig": "1, 2, true, 4"}, 422, "bbox_orig must be [x, y, w, h] in pixels"),
        ({}, {"bbox_orig": '"1", 2, 3, 4'}, 422, "bbox_orig must be [x, y, w, h] in pixels"),
        ({}, {"bbox_orig": "[[1, 2, 3, 4]]"}, 422, "bbox_orig must be [x, y, w, h] in pixels"),
        ({}, {"bbox_orig": "1,2,0,4", "bbox_recon": "1,2,3,4"}, 422, "has no area"),
        ({}, {"query": " "}, 422, "a question is empty"),
        ({}, {"query": "x" * 41}, 422, "41 characters, more than 40"),
        ({}, {"query": ["x"] * 9}, 422, "9 questions: expected 1 to 8"),
        ({}, {"temperature": "-1"}, 422, "temperature=-1.0 must be 0, or"),
        ({}, {"temperature": "warm"}, 422, "temperature: Input should be a valid number"),
        ({}, {"max_new_tokens": "1000"}, 422, "max_new_tokens=1000 must be at most 256"),
        ({"image_recon": ("b.png", NOISE * 2000)}, {}, 413, "more than 1 MB"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_sentence(client, files, change, data, status, said):
    sent = {k: v for k, v in (files | change).items() if v is not None}
    answer = client.post("/v1/infer", files=sent, data=data)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"] and list(answer.json()) == ["error"]


def test_a_body_of_untold_length_is_counted(client):
    def body():
        yield b'--x\r\ncontent-disposition: form-data; name="image_orig"; filename="a"\r\n\r\n'
        for _ in range(2000):
            yield NOISE

    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = client.post("/v1/infer", content=body(), headers=headers)
    assert answer.status_code == 413 and "more than 1 MB" in answer.json()["error"]


@pytest.mark.parametrize(
    "headers, status, said",
    [
        ({"host": "evil.example"}, 400, "this server is not called 'evil.example'"),
        ({"host": "["}, 400, "not called"),
        ({"origin": "https://evil.example"}, 403, "pages of https://evil.example may not"),
        ({"origin": "null"}, 403, "pages of null may not"),
        ({"origin": "http://testserver"}, 200, None),
        ({"sec-fetch-site": "cross-site"}, 403, "pages of other sites may not"),
        ({"sec-fetch-site": "same-origin"}, 200, None),
    ],
)
def test_pages_of_others_may_not_use_it(client, files, headers, status, said):
    answer = client.post("/v1/infer", files=files, headers=headers)
    assert answer.status_code == status, answer.text
    assert said is None or said in answer.json()["error"]
    # The page itself is behind the same gate.
    if "host" in headers:
        assert client.get("/", headers=headers).status_code == 400


@pytest.mark.parametrize(
    "host, status",
    [
        ("Demo.Example.org", 200),
        ("demo.example.org:80", 200),
        ("[::1]:7860", 200),
        ("a.wild.example", 200),
        ("wild.example", 400),
        ("evil.example@demo.example.org", 400),
        ("demo.example.org.evil.example", 400),
    ],
)
def test_names_of_the_server_are_in_any_case(engine, tmp_path, host, status):
    hosts = frozenset({"Demo.Example.org", "::1", "*.wild.example"})
    app = application(Serving(engine, Limits()), "tiny", tmp_path, hosts)
    with TestClient(app) as client:
        answer = client.get("/openapi.json", headers={"host": host})
    assert answer.status_code == status
    assert status == 200 or list(answer.json()) == ["error"]


def test_a_name_that_cannot_be_is_refused(engine, tmp_path):
    with pytest.raises(ConfigError, match=r"--hosts 'a\.\*\.org'"):
        application(Serving(engine, Limits()), "tiny", tmp_path, frozenset({"a.*.org"}))


def test_a_full_queue_is_told_before_anything_is_read(engine, tmp_path, files):
    with client_with(engine, tmp_path, queue=2, per_client=1) as client:
        begun, room = threading.Event(), threading.Event()
        engine_answers = engine.batch_infer

        def late(*args, **kwargs):
            begun.set()
            assert room.wait(20)
            return engine_answers(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "batch_infer", late)
            threads = []
            for waiting in (0, 1):
                thread = threading.Thread(
                    target=client.post, args=["/v1/infer"], kwargs={"files": files}
                )
                thread.start()
                threads.append(thread)
                # The second is not to share the first one's batch.
                assert begun.wait(20)
                while client.get("/healthz").json()["waiting"] < waiting:
                    pass
            refused = client.post("/v1/infer", content=b"not even a form")
            room.set()
            for thread in threads:
                thread.join()
        assert refused.status_code == 429 and "of your requests wait" in refused.json()["error"]
        assert int(refused.headers["retry-after"]) >= 1


def test_more_than_the_queue_holds_is_not_even_read(client):
    (gate,) = (layer for layer in layers(client.app) if isinstance(layer, Gate))
    # All that may wait, and what the engine works on.
    gate.answering["testclient"] = 32 + 4 + 8
    try:
        mine = client.post("/v1/infer", content=b"not even a form")
        gate.answering["another"] = 64
        del gate.answering["testclient"]
        gate.answering["a third"] = 12
        full = client.post("/v1/infer", content=b"not even a form")
    finally:
        gate.answering.clear()
    assert mine.status_code == 429 and "of yours are being read" in mine.json()["error"]
    assert full.status_code == 503 and full.headers["retry-after"] == "1"


def layers(app):
    """What a request passes through."""
    layer = app.middleware_stack
    while layer is not None:
        yield layer
        layer = getattr(layer, "app", None)


def test_pages_of_others_may_not_even_look(client):
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert client.get("/gradio_api/info", headers=headers).status_code == 403
    # A link leads to it.
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200


def test_a_visitor_is_not_many_for_having_many_addresses():
    assert client_at("192.0.2.7") == client_at("::ffff:192.0.2.7") == "192.0.2.7"
    assert client_at("2001:db8::1") == client_at("2001:db8::2:3") == "2001:db8::/64"
    assert client_at("2001:db8:0:1::1") != client_at("2001:db8::1")
    assert client_at(None) == "unknown" and client_at("testclient") == "testclient"


def test_what_fails_inside_is_no_secret_of_the_log_only(client, engine, files, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(engine, "batch_infer", broken)
    answer = client.post("/v1/infer", files=files)
    assert answer.status_code == 500
    assert answer.json() == {"error": "the server failed at this; its log says why"}
    assert "/secret/path" in caplog.text


def test_health_and_description(client, engine):
    health = client.get("/healthz").json()
    assert health == {"status": "ok", "model": "tiny", "step": 7, "waiting": 0, "streaming": 0}
    described = client.get("/openapi.json").json()
    assert {"/v1/infer", "/v1/stream", "/v1/complete", "/healthz"} <= set(described["paths"])
    infer = described["paths"]["/v1/infer"]["post"]
    assert {"200", "413", "422", "429", "503"} <= set(infer["responses"])
    form = infer["requestBody"]["content"]["multipart/form-data"]["schema"]["$ref"].split("/")[-1]
    properties = described["components"]["schemas"][form]["properties"]
    assert {"image_orig", "image_recon", "occluder_mask", "bbox_orig", "query", "seed"} <= set(
        properties
    )


def test_health_says_when_the_engine_has_stopped(engine, tmp_path):
    app = application(Serving(engine, Limits()), "tiny", tmp_path, HOSTS)
    with TestClient(app) as client:
        health = client.get("/healthz")
        assert health.status_code == 503 and health.json()["status"] == "the engine has stopped"


def test_nothing_of_a_request_stays(client, files, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    large = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(large).save(buffer, "png")
    files["image_orig"] = ("large.png", buffer.getvalue())
    assert client.post("/v1/infer", files=files).status_code == 200
    assert list(tmp_path.iterdir()) == []
