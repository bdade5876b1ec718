"""What --help loads and shows: little, and examples that work as they stand."""

import contextlib
import importlib
import re
import shlex
import subprocess
import sys

import pytest
from support import write_run

from htfa_jax.data.held_objects import __main__ as held_objects
from weights_convert.__main__ import parser

MODULES = [
    "htfa_jax.data.held_objects.__main__",
    "htfa_jax.data.check",
    "htfa_jax.data.convert",
    "htfa_jax.data.obman",
    "htfa_jax.train",
    "htfa_jax.train_vq",
    "htfa_jax.checkpoint",
    "htfa_jax.configs",
    "htfa_jax.infer",
    "htfa_jax.evaluate",
    "htfa_jax.export",
    "htfa_jax.reproduce",
    "weights_convert.__main__",
]
# What takes a good part of a second, or of a disk.
HEAVY = ["jax", "flax", "orbax", "grain", "tensorflow", "torch", "transformers", "matplotlib"]


def test_importing_the_package_imports_nothing():
    program = "import sys; old = {*sys.modules}; import htfa_jax; print({*sys.modules} - old)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "{'htfa_jax'}\n", done.stderr


def test_help_imports_nothing_heavy():
    program = f"""
import contextlib, importlib, io, sys
for name in {MODULES}:
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        importlib.import_module(name).main(["--help"])
    print(name, shown.getvalue()[:5], *(heavy for heavy in {HEAVY} if heavy in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} usage" for name in MODULES], done.stderr


def examples(module):
    """The command lines that a module's help shows: (module, arguments)."""
    text = re.sub(r"\\\n *", "", importlib.import_module(module).__doc__)
    lines = re.findall(r"^    python -m (.*)$", text, flags=re.MULTILINE)
    return [(line[0], line[1:]) for line in (shlex.split(x, comments=True) for x in lines)]


@pytest.fixture(scope="module")
def workspace(dataset, tmp_path_factory):
    """A folder with a small run, runs/a, and the scenes that examples speak of."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "runs").mkdir()
    write_run(folder / "runs/a", dataset, data__validation=str(dataset), eval__max_samples=3)
    draw = next(argv for _, argv in examples("htfa_jax.data.held_objects.__main__"))
    held_objects.main([*draw[:-1], str(folder / draw[-1])])
    return folder


def parsed(names, monkeypatch):
    """Puts a function in the place of others; returns the list of what these are called with."""
    calls = []
    for name in names:
        monkeypatch.setattr(name, lambda *args, **_: calls.append(args) or ([], []))
    return calls


# Where the work of a command begins that is not run here: it takes minutes, or files of elsewhere.
WORK = {
    "htfa_jax.train": ["htfa_jax.training.train", "htfa_jax.dry_run.dry_run"],
    "htfa_jax.train_vq": ["htfa_jax.vq_stage.train_in"],
    "htfa_jax.reproduce": ["htfa_jax.reproduction.reproduce"],
    "htfa_jax.data.obman": ["htfa_jax.data.obman.write_records"],
}


@pytest.mark.parametrize("module", MODULES)
def test_examples_work(module, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HOME", str(workspace))
    shown = examples(module)
    assert 1 <= len(shown) <= 6
    for name, argv in shown:
        if name == "weights_convert":
            assert parser().parse_args(argv).command == argv[0]
        elif name in WORK:
            calls = parsed(WORK[name], monkeypatch)
            with contextlib.suppress(SystemExit):
                importlib.import_module(name).main(argv)
            assert len(calls) == 1
        elif argv[:1] != ["--demo"]:  # which has a test of its own
            package = name == "htfa_jax.data.held_objects"
            importlib.import_module(name + ".__main__" * package).main(argv)
