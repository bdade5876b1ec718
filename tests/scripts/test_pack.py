"""A packed folder brings along what the other machine lacks, and nothing else."""

import os
import subprocess
import sys
import zipfile

import pack
import pytest

from htfa_jax.errors import ConfigError


def write_wheel(folder, name, version, needs=()):
    """A wheel without content."""
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch):
    """What pip finds: `one` needs `two`, of which there are two versions."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder, "one", "1.0", ["two>=1"])
    for version in ("1.0", "2.0"):
        write_wheel(folder, "two", version)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def there(tmp_path, text):
    path = tmp_path / "installed.txt"
    path.write_text(text)
    return pack.installed(path)


@pytest.mark.parametrize(
    "installed,wanted",
    [
        ("", ["one==1.0", "two==2.0"]),
        ("Two==1.0\nother==3 ; comment\n", ["one==1.0"]),
        ("two\n# nothing\n-e git+https://x\n", ["one==1.0"]),
        ("One==1.0\ntwo==2.0\n", []),
    ],
)
def test_what_is_missing(tmp_path, installed, wanted):
    found = pack.missing(["one"], there(tmp_path, installed), "3.12")
    assert sorted(found) == wanted


def test_what_does_not_fit_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)cannot resolve .* 3\.12.*two.*Take a package out"):
        pack.missing(["one", "two>=2"], there(tmp_path, "two==1.0"), "3.12")


@pytest.mark.slow
def test_a_packed_folder_works_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "missing", lambda *_: ["one==1.0"])
    out = tmp_path / "packed"
    assert pack.pack(pack.PackArgs(out=out)) == ["one-1.0-py3-none-any.whl"]
    environment = {**os.environ, "PYTHONPATH": str(out)}
    code = "import htfa_jax, weights_convert; print(htfa_jax.__file__)"
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert said.stdout.strip() == str(out / "htfa_jax" / "__init__.py"), said.stderr
    usage = subprocess.run([out / "measure.sh", "nothing"], capture_output=True, text=True)
    assert usage.returncode == 2 and "standard|twin|trace" in usage.stderr
    with pytest.raises(ConfigError, match="packed exists"):
        pack.pack(pack.PackArgs(out=out))


def test_an_older_pip_is_told_which_one_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(pack.importlib.metadata, "version", lambda name: "23.2.1")
    with pytest.raises(ConfigError, match=r"This pip is 23.2.1, and 25.3 or newer .*--upgrade pip"):
        pack.missing(["not-there"], {}, "3.12")
    monkeypatch.setattr(pack.importlib.metadata, "version", lambda name: "26.0")
    with pytest.raises(ConfigError) as error:
        pack.missing(["not-there"], {}, "3.12")
    assert "This pip" not in str(error.value)
