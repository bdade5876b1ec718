"""What is installed: the wheel's content, found from elsewhere, and its commands."""

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from htfa_jax.common.logs import MetricWriter
from htfa_jax.config import load_config

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "htfa-train": "htfa_jax.train",
    "htfa-infer": "htfa_jax.infer",
    "htfa-eval": "htfa_jax.evaluate",
    "htfa-convert": "weights_convert.__main__",
    "htfa-demo": "htfa_jax.demo.__main__",
}


def digest(content):
    return hashlib.sha256(content).hexdigest()


def build(out, *flags, source=ROOT):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *flags]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def files_of(wheel):
    """Hashes of what a wheel installs, by name."""
    with zipfile.ZipFile(wheel) as file:
        return {name: digest(file.read(name)) for name in file.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Of the source distribution, as someone who has no repository builds it."""
    folder = tmp_path_factory.mktemp("dist")
    build(folder)
    assert len(list(folder.glob("htfa_jax-*.tar.gz"))) == 1
    (path,) = folder.glob("htfa_jax-*-py3-none-any.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with what the wheel installs, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def run_installed(installed, cwd, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    expected = {}
    for package in ("htfa_jax", "weights_convert"):
        for path in sorted((ROOT / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                expected[path.relative_to(ROOT).as_posix()] = digest(path.read_bytes())
    found = {name: value for name, value in files_of(wheel).items() if ".dist-info/" not in name}
    presets = {digest(path.read_bytes()) for path in (ROOT / "configs").glob("*.py")}
    added = {name: value for name, value in found.items() if name not in expected}
    assert {name: found.get(name) for name in expected} == expected
    assert set(added.values()) == presets and len(added) == len(presets)
    assert "htfa_jax/py.typed" in found and "weights_convert/py.typed" in found


@pytest.mark.slow
def test_sources_and_repository_make_the_same_wheel(wheel, tmp_path):
    build(tmp_path, "--wheel")
    (other,) = tmp_path.glob("*.whl")
    assert other.name == wheel.name and files_of(other) == files_of(wheel)


@pytest.mark.slow
def test_presets_and_small_weights_are_found_outside_of_the_repository(installed, tmp_path):
    program = """
import htfa_jax
from htfa_jax.config_io import load_config
from htfa_jax.checkpoints.runs import DEMO, EXAMPLES
from weights_convert.on_demand import tiny
print(htfa_jax.__file__)
for name in ("standard", "debug"):
    print(load_config(name).image_size)
print((DEMO / EXAMPLES).is_file(), all((tiny(p) / "model.safetensors").is_file()
                                       for p in ("siglip", "vq", "internlm2")))
"""
    done = run_installed(installed, tmp_path, "-c", program)
    sizes = [str(load_config(name).image_size) for name in ("standard", "debug")]
    place = str(installed / "htfa_jax" / "__init__.py")
    assert done.stdout.split() == [place, *sizes, "True", "True"], done.stderr


def test_every_dependency_has_both_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    names = [name for group in (project["dependencies"], *extras) for name in group]
    unbounded = [name for name in names if not (">" in name and "<" in name or "==" in name)]
    # JAX is bounded where it is first named. Versions of the others are dates, but for one of which
    # TFDS needs any.
    assert {re.split(r"[\[>=]", name)[0] for name in unbounded} <= {
        "jax", "fsspec", "gcsfs", "s3fs", "importlib_resources",
    }  # fmt: skip


@pytest.mark.slow
def test_commands_are_installed(installed):
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    found = {e.name: e.value for e in distribution.entry_points if e.group == "console_scripts"}
    assert found == {name: f"{module}:main" for name, module in COMMANDS.items()}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_an_installed_command_shows_its_help_and_refuses_nonsense(name, installed, tmp_path):
    """As the script that an installer writes."""
    call = f"from {COMMANDS[name]} import main; import sys; sys.exit(main())"
    script = tmp_path / name
    script.write_text(f"import sys\n{call}\n", encoding="utf-8")
    helped = run_installed(installed, tmp_path, str(script), "--help")
    assert helped.returncode == 0 and helped.stdout.startswith(f"usage: {name} "), helped.stderr
    refused = run_installed(installed, tmp_path, str(script), "--no_such_flag")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr


def test_tensorboard_is_installed_and_reads_what_a_run_writes(tmp_path):
    """The documents' `tensorboard --logdir` works after the install of the README."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert any(re.match(r"tensorboard[>=]", name) for name in project["dependencies"])
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = MetricWriter(tmp_path)
    writer.write_scalars(3, {"train/loss": 0.5, "train/learning_rate": 1e-3})
    writer.close()
    found = board.EventAccumulator(str(tmp_path))
    found.Reload()
    for name, value in (("train/loss", 0.5), ("train/learning_rate", 1e-3)):
        (event,) = found.Scalars(name)
        assert event.step == 3 and event.value == pytest.approx(value)
