"""The rules of the packages: who may import whom, and how large a file may grow."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A package imports only packages of lower floors.
FLOORS = {
    "errors": 1,
    "common": 2,
    "config": 3,
    "sharding": 4,
    "checkpoints": 5,
    "kernels": 5,
    "data": 6,
    "models": 7,
    "inference": 8,
    "evaluation": 9,
    "training": 10,
    "demo": 10,
}
COMMANDS = """
    train train_vq infer evaluate export checkpoint reproduce configs copy_run
    data.check data.convert data.obman data.held_objects.__main__ demo.__main__
""".split()
ALIASES = ["config_io", "look_inside", "answer_attention", "curves"]
LONGEST = 400  # lines


def modules(folder):
    """{dotted name: file} of a package."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


HTFA, CONVERT = modules("htfa_jax"), modules("weights_convert")


def imports(path):
    """Modules of this project that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(n if n in HTFA | CONVERT else node.module for n in names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] in ("htfa_jax", "weights_convert")}


def is_command(name):
    return name.removeprefix("htfa_jax.") in COMMANDS or name == "weights_convert.__main__"


def package(name):
    return name.split(".")[1] if "." in name else ""


LIBRARY = {n: p for n, p in HTFA.items() if not is_command(n) and n != "htfa_jax"}


def test_at_the_root_stand_commands_and_errors_alone():
    at_the_root = {
        name for name in HTFA if name.count(".") == 1 and HTFA[name].name != "__init__.py"
    }
    expected = {c for c in COMMANDS if "." not in c} | {"errors", *ALIASES}
    assert at_the_root == {f"htfa_jax.{name}" for name in expected}


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_a_module_imports_only_lower_packages(name):
    if package(name) in ALIASES:
        return
    floor = FLOORS[package(name)]
    for other in imports(LIBRARY[name]):
        assert not other.startswith("weights_convert"), f"{name} imports {other}"
        same = package(other) == package(name)
        assert same or FLOORS[package(other)] < floor, f"{name} imports {other}"


def test_nothing_imports_a_command():
    for name, path in (HTFA | CONVERT).items():
        wrong = [other for other in imports(path) if is_command(other) and other != name]
        assert not wrong, f"{name} imports {wrong}"


def test_no_circle_of_files():
    graph = {name: imports(path) & set(HTFA) - {name} for name, path in HTFA.items()}
    done: set[str] = set()

    def visit(name, way):
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("name", sorted(HTFA | CONVERT))
def test_no_file_is_longer_than_one_can_read(name):
    lines = (HTFA | CONVERT)[name].read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST, f"{name} has {lines} lines"
