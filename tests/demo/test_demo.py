"""The command of the page: which model it takes, where it listens, what a visit leaves behind."""

import os
import socket
import sys

import pytest

from htfa_jax.checkpoints.runs import DEMO
from htfa_jax.demo import __main__ as demo
from htfa_jax.errors import ConfigError


def run_at(folder, seconds):
    """A run whose newest checkpoint is of a time."""
    step = folder / "checkpoints" / "10"
    step.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    os.utime(step, (seconds, seconds))
    return folder


def test_the_newest_run_is_taken_and_named(tmp_path, caplog):
    caplog.set_level("INFO", logger="htfa_jax")
    run_at(tmp_path / "a", 2000)
    newest = run_at(tmp_path / "b", 3000)
    run_at(tmp_path / "c", 1000)
    (tmp_path / "nothing").mkdir()
    begun = run_at(tmp_path / "d", 4000)
    (begun / "checkpoints" / "10").rmdir()
    assert demo.choose_checkpoint(demo.DemoArgs(), tmp_path) == newest
    assert f"the newest run, {newest}" in caplog.text


def test_without_runs_it_is_the_small_model_and_the_way_to_another(tmp_path, caplog):
    caplog.set_level("INFO", logger="htfa_jax")
    assert demo.choose_checkpoint(demo.DemoArgs(), tmp_path / "runs") == DEMO
    assert "python -m htfa_jax.train --config configs/debug.py" in caplog.text
    run_at(tmp_path / "a", 1)
    assert demo.choose_checkpoint(demo.DemoArgs(demo=True), tmp_path) == DEMO
    assert demo.choose_checkpoint(demo.DemoArgs(checkpoint=tmp_path), tmp_path) == tmp_path
    with pytest.raises(ConfigError, match="leave --checkpoint out"):
        demo.choose_checkpoint(demo.DemoArgs(checkpoint=tmp_path, demo=True), tmp_path)


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "htfa_jax.demo.server", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--demo"])
    told = "needs the package gradio: pip install 'htfa-jax[demo]'"
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_a_taken_port_is_a_sentence():
    server = pytest.importorskip("htfa_jax.demo.server", reason="needs the extra `demo`")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}.*another --port"):
            server.listen("127.0.0.1", port)
