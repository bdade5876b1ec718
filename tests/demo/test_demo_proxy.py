"""Page and API behind nginx, by the configuration that docs/demo.md shows."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import threading
import time

import httpx
import pytest
from documents import ROOT

pytest.importorskip("gradio", reason="the page and the API need the extra `demo`")

from fastapi.testclient import TestClient

from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.demo.options import DemoArgs, Limits
from htfa_jax.demo.server import application, http_server, listen
from htfa_jax.demo.serving import Serving
from htfa_jax.errors import ConfigError
from htfa_jax.inference.engine import HTFAInference

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")
NAME = "demo.example.org"
SET_HOST = "proxy_set_header Host $http_host;"
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@pytest.fixture(scope="module")
def serving(run_folder):
    with Serving(HTFAInference(run_folder), Limits()) as serving:
        yield serving


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextlib.contextmanager
def served(serving, folder, root_path=""):
    """The port of a server as `htfa_jax.demo --hosts NAME --proxies 127.0.0.1` runs it."""
    args = DemoArgs(hosts=(NAME,), proxies=("127.0.0.1",), root_path=root_path)
    hosts = frozenset({"127.0.0.1", NAME})
    app = application(serving, "tiny", folder, hosts, frozenset({NAME}), root_path)
    server, listener = http_server(app, args), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


def documented(root_path=""):
    """The server block of docs/demo.md; with a path, changed as the document says."""
    text = (ROOT / "docs/demo.md").read_text()
    (block,) = re.findall(r"^```nginx\n(.*?)^```", text, re.M | re.S)
    if root_path:
        block = block.replace("location / {", f"location {root_path}/ {{")
        block = block.replace(":7860;", ":7860/;")
    return block


@contextlib.contextmanager
def proxied(block, upstream, folder):
    """The address of an nginx with this server block; without TLS, which needs a certificate."""
    port = free_port()
    block = re.sub(r"^ *ssl_.*\n", "", block, flags=re.M)
    block = block.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    block = block.replace("127.0.0.1:7860", f"127.0.0.1:{upstream}")
    user = "user root;" if os.getuid() == 0 else ""
    temporary = "".join(f"{name}_temp_path {folder}/{name};\n" for name in TEMPORARY)
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary} {block} }}"
    )
    process = subprocess.Popen(
        [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")], stderr=subprocess.PIPE
    )
    try:
        for _ in range(100):
            assert process.poll() is None, process.stderr.read().decode()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.slow
@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
@pytest.mark.parametrize("root_path", ["", "/htfa"])
@pytest.mark.parametrize("set_host", [SET_HOST, SET_HOST.replace("http_host", "host"), ""])
def test_page_and_api_work_behind_nginx(serving, dataset, tmp_path, root_path, set_host):
    """With Host as the document sets it, without its port, and as nginx sends it by itself."""
    block = documented(root_path)
    assert SET_HOST in block
    block, record = block.replace(SET_HOST, set_host), RecordFile(dataset)[0]
    files = {name: getattr(record, name).read_bytes() for name in ("image_orig", "image_recon")}
    (tmp_path / "private").mkdir()
    with (
        served(serving, tmp_path / "private", root_path) as upstream,
        proxied(block, upstream, tmp_path) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}{root_path}", timeout=60) as http,
    ):
        http.headers["host"] = f"{NAME}:{port}"
        ours = {"origin": f"http://{NAME}:{port}"}
        assert http.get("/").status_code == 200
        root = http.get("/config").json()["root"]
        if set_host == SET_HOST:
            assert root == f"http://{NAME}:{port}{root_path}"
        answer = http.post("/v1/infer", files=files, headers=ours)
        assert answer.status_code == 200, answer.text
        assert answer.json()["answers"]
        stream = http.post("/v1/stream", files=files, headers=ours)
        assert stream.status_code == 200 and "data:" in stream.text
        upload = http.post("/gradio_api/upload", files={"files": ("a.png", b"x")}, headers=ours)
        # It belongs to no page, or is no image; but the gate let it in.
        assert upload.status_code != 403, upload.text
        foreign = {"origin": "http://evil.example"}
        refused = http.post("/v1/infer", files=files, headers=foreign)
        assert refused.status_code == 403 and "--hosts NAME" in refused.text


@pytest.mark.parametrize(
    "origin, status",
    [
        ("https://demo.example.org", 422),
        ("https://demo.example.org:8443", 422),
        ("https://a.wild.example", 422),
        ("http://127.0.0.1:7860", 422),
        ("http://127.0.0.1:3000", 403),  # another server of this machine
        ("https://wild.example", 403),
        ("https://evil.demo.example.org", 403),
        ("https://demo.example.org.evil.example", 403),
        ("https://evil@demo.example.org", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_pages_of_the_names_that_were_given_may_ask(serving, tmp_path, origin, status):
    """Whatever a proxy makes of Host; without images they are then told what is missing."""
    public = frozenset({"Demo.example.org", "*.wild.example"})
    app = application(serving, "tiny", tmp_path, public | {"127.0.0.1"}, public)
    with TestClient(app) as client:
        headers = {"host": "127.0.0.1:7860", "origin": origin}
        assert client.post("/v1/infer", headers=headers).status_code == status


def test_a_path_that_cannot_be_one():
    for path in ("htfa", "/htfa/", "/a//b", " /a"):
        with pytest.raises(ConfigError, match="--root_path"):
            DemoArgs(root_path=path)
