"""The attacks of `scripts/reliability/attack_server.py` on a server of the demo model."""

import os
import sys

import pytest

pytest.importorskip("gradio", reason="the page and the API need the extra `demo`")

import attack_server
from attacks.files import events
from attacks.target import THROUGH, Target, png
from demo_server import demo_server

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("attack")]
LIMITS = {"batch": 1, "upload_seconds": 2, "header_seconds": 2, "kept_mb": 40}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A server, with an image beside it that is private, and a Ghostscript that leaves a mark."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "private.png").write_bytes(png())
    ghostscript = folder / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {folder}/started\n")
    ghostscript.chmod(0o755)
    (folder / "tmp").mkdir()
    path = f"{ghostscript.parent}:{os.environ['PATH']}"
    with demo_server(LIMITS, 30, TMPDIR=str(folder / "tmp"), PATH=path) as url:
        target = Target(url, seconds=15, upload_mb=60, image=str(folder / "private.png"))
        target.started = folder / "started"
        yield target


def through(attempts):
    """Those that did harm."""
    attempts = list(attempts)
    assert attempts
    return [f"{a.what}: {a.detail}" for a in attempts if a.outcome == THROUGH]


@pytest.mark.parametrize("name", [name for name in attack_server.ATTACKS if name != "events"])
def test_an_attack_does_no_harm(target, name):
    assert through(attack_server.run(target, name)) == []
    assert not target.started.exists()


@pytest.mark.parametrize("elem_id, kind", [("orig", "upload"), ("run", "click"), ("ask", "click")])
def test_no_event_reads_a_file_of_the_server(target, elem_id, kind):
    assert through(events(target, [target.event_of(elem_id, kind)["id"]])) == []


def test_only_ones_own_machine_is_attacked():
    for url in ("http://127.0.0.1:1", "http://[::1]:1/", "http://localhost"):
        assert attack_server.is_loopback(url)
    for url in (
        "http://10.0.0.1",
        "http://localhost.evil",
        "http://127.0.0.1.evil",
        "x",
        "http://[",
    ):
        assert not attack_server.is_loopback(url)
    with pytest.raises(SystemExit, match="--i_own_this_server"):
        sys.argv = ["attack_server.py", "http://demo.example.org"]
        attack_server.main()
