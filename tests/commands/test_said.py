"""What commands say on their way and where they cannot go on: no silence, no bare system errors."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from PIL import Image
from support import tiny

from htfa_jax import infer, train
from htfa_jax.common import cli
from htfa_jax.common.compiling import without_alarms
from htfa_jax.common.files import write_whole, writing
from htfa_jax.config.io import save_config
from htfa_jax.errors import ConfigError
from htfa_jax.inference.devices import find_device

ROOT = Path(__file__).parents[2]
HEBREW = "\u05e2\u05d8 \u65e5\u672c"


def start(argv, folder, **env):
    """A command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run([sys.executable, *argv], capture_output=True, env=env, cwd=folder)


@cli.command
def speaks(argv):
    print(HEBREW)
    print(HEBREW, file=sys.stderr)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_is_not_utf_8_gets_escapes(monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    speaks([])
    for stream in (out, err):
        stream.flush()
        assert "\\u05e2" in stream.buffer.getvalue().decode(encoding)


def test_every_command_has_a_terminal_that_can_show_everything():
    """Of the package, the converters and the scripts: each `main` goes through `command`."""
    without = []
    for path in [*ROOT.glob("htfa_jax/**/*.py"), *ROOT.glob("weights_convert/*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                wrapped = [ast.unparse(d) for d in node.decorator_list]
                without += [] if any("command" in d for d in wrapped) else [path.name]
    assert without == []


@pytest.mark.slow
def test_data_check_on_an_ascii_terminal(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    record = {"id": HEBREW, "image_orig": "a.png", "conversations": [{"from": "human"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    arguments = ["x.jsonl", "--config", "debug:tiny", "--report", "report.json"]
    done = start(["-m", "htfa_jax.data.check", *arguments], tmp_path, PYTHONIOENCODING="ascii")
    assert b"Traceback" not in done.stderr and (tmp_path / "report.json").is_file()


def test_a_full_disk_names_the_file_and_the_remedy(tmp_path):
    code = f"""if True:
        import resource, sys
        from pathlib import Path
        from htfa_jax.common.cli import command
        from htfa_jax.common.files import whole_folder, write_whole, writing
        from htfa_jax.errors import CheckpointError
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        place, big = Path({str(tmp_path)!r}), b"x" * 9999

        def plain():
            with writing(place / "plain") as path, path.open("wb") as file:
                file.write(big)

        def folder():
            with whole_folder(place / "folder", CheckpointError) as partial:
                (partial / "inside").write_bytes(big)

        for write in (plain, folder, lambda: write_whole(place / "whole", big)):
            try:
                command(lambda argv: write())([])
            except SystemExit as ended:
                print(ended.code)
    """
    done = start(["-c", code], tmp_path)
    plain, folder, whole = done.stderr.decode().splitlines()
    for line, name in ((plain, "plain"), (folder, "folder"), (whole, "whole")):
        assert line.startswith(f"error: {tmp_path / name} cannot be written: File too large")
        assert "free space there" in line and "the same command again" in line
    assert done.stdout.split() == [b"1", b"2", b"1"]
    assert not (tmp_path / "whole").exists() and not (tmp_path / "folder").exists()


def test_every_writer_names_its_file():
    """What is opened to be written is opened in `writing`, or by the helpers of `common.files`."""
    bare = []
    for path in [*ROOT.glob("htfa_jax/**/*.py"), *ROOT.glob("weights_convert/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("write_text", "write_bytes"):
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert bare == []


def test_an_error_of_the_system_begins_with_its_file(tmp_path):
    @cli.command
    def main(argv):
        with writing(tmp_path / "a/b") as path:
            path.open("w")

    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1
    write_whole(tmp_path / "file", "x")
    with pytest.raises(SystemExit):
        infer.main(["--demo", "--output_dir", str(tmp_path / "file")])


@pytest.mark.parametrize("name", ["tpu", "cuda", "gpu:3", "abacus", "cpu:99", "cpu:x"])
def test_a_device_that_is_not_there_is_a_sentence(name, tmp_path, capsys):
    with pytest.raises(ConfigError, match="There is: cpu"):
        find_device(name)
    with pytest.raises(SystemExit) as ended:
        infer.main(["--demo", "--output_dir", str(tmp_path / "out"), "--device", name])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"device={name}" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_device_by_name_is_that_device():
    assert find_device(None) == find_device("cpu") == find_device("cpu:0") == jax.devices()[0]
    assert find_device(jax.devices()[0]) is jax.devices()[0]


def test_a_name_to_start_from_is_looked_up_before_anything_is_drawn(tmp_path, capsys):
    save_config(tiny(data__cache_dir=str(tmp_path / "cache")), tmp_path / "c.json")
    for arguments in (["--init_from", "nothere"], ["--config.pretrained.run", "runs/gone"]):
        with pytest.raises(SystemExit) as ended:
            train.main(["--config", str(tmp_path / "c.json"), "--workdir", str(tmp_path / "run"),
                        *arguments])  # fmt: skip
        assert ended.value.code == 2 and f"{arguments[1]} is not a run" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json"]


def test_xla_s_alarms_are_off_before_jax_is_there(monkeypatch):
    code = """if True:
        import os, sys
        from htfa_jax.training import dry_run
    """
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    without_alarms()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"
    code = "import sys, htfa_jax.train; sys.exit('jax' in sys.modules)"
    assert start(["-c", code], ROOT).returncode == 0
