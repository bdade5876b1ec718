"""What --help loads and shows: little, and examples that work as they stand."""

import contextlib
import importlib
import itertools
import re
import shlex
import subprocess
import sys

import pytest

from htfa_jax.checkpoints.runs import DEMO
from htfa_jax.data.held_objects import __main__ as held_objects
from weights_convert.__main__ import options

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
    "htfa_jax.copy_run",
    "htfa_jax.reproduce",
    "htfa_jax.demo.__main__",
    "weights_convert.__main__",
]
# What takes a good part of a second, or of a disk.
HEAVY = [
    "jax",
    "flax",
    "orbax",
    "grain",
    "tensorflow",
    "torch",
    "transformers",
    "matplotlib",
    "gradio",
]


def test_importing_the_package_imports_nothing():
    program = "import sys; old = {*sys.modules}; import htfa_jax; print(*{*sys.modules} - old)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    packages = {name.partition(".")[0] for name in done.stdout.split()}
    assert {"htfa_jax"} <= packages <= {"htfa_jax", "importlib", "warnings"}, done.stderr


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
    lines = re.findall(r"^ *python -m (.*)$", text, flags=re.MULTILINE)
    return [(line[0], line[1:]) for line in (shlex.split(x, comments=True) for x in lines)]


@pytest.fixture(scope="module")
def workspace(run_folder, tmp_path_factory):
    """A folder with a run, runs/a, and the scenes that examples speak of."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "runs").mkdir()
    (folder / "runs/a").symlink_to(run_folder)
    (folder / "shared").mkdir()
    (folder / "shared/a").symlink_to(DEMO)
    draw = examples("htfa_jax.data.held_objects.__main__")[0][1]
    held_objects.main([*draw[:-1], str(folder / draw[-1])])
    return folder


# Where the work begins that other tests do, or that needs files of elsewhere.
WORK = {
    "htfa_jax.train": ["htfa_jax.training.trainer.train", "htfa_jax.training.dry_run.dry_run"],
    "htfa_jax.train_vq": ["htfa_jax.training.vq_stage.train_in"],
    "htfa_jax.configs": ["htfa_jax.training.plan.preset_table"],
    "htfa_jax.infer": ["htfa_jax.infer.predict"],
    "htfa_jax.evaluate": ["htfa_jax.evaluation.evaluator.evaluate_run"],
    "htfa_jax.export": ["htfa_jax.inference.export.export_run"],
    "htfa_jax.reproduce": ["htfa_jax.training.reproduction.reproduce"],
    "htfa_jax.demo": ["htfa_jax.demo.__main__.open_page"],
    "htfa_jax.data.obman": ["htfa_jax.data.obman.write_records"],
}


class Begun(Exception):
    """The command has read its options, and would begin its work."""


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_examples_work(module, workspace, monkeypatch):
    """They name options and files that are there; data commands run, others up to their work."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HOME", str(workspace))
    begun = []

    def work(*args, **options):
        begun.append(name)
        raise Begun

    for place in itertools.chain(*WORK.values()):
        monkeypatch.setattr(place, work)
    shown = examples(module)
    assert 1 <= len(shown) <= 7
    for name, argv in shown:
        if name == "weights_convert":
            assert options(argv).command == argv[0]
            continue
        package = name in ("htfa_jax.data.held_objects", "htfa_jax.demo")
        with contextlib.suppress(Begun):
            importlib.import_module(name + ".__main__" * package).main(argv)
            assert name not in WORK
    assert begun == [name for name, _ in shown if name in WORK]
