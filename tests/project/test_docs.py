"""The documents say what is so: their blocks run, their names exist, their links lead somewhere."""

import ast
import functools
import importlib
import json
import re
import shutil
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tyro
from documents import PAGES, ROOT, blocks, commands, prose, rows
from support import write_dataset, write_run

from htfa_jax.config import Config, leaves

BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = ("python", "python3", ".venv/bin/python")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("scripts", {})
# What a block that is not run may call besides this package.
OTHERS = {
    "pip", ".venv/bin/pip", "git", "cd", "hf", "sbatch", "sh", "tensorboard", "ls", "curl",
    ".venv/bin/ruff", ".venv/bin/mkdocs",
    "scripts/launch/tpu_pod.sh", "scripts/launch/gpu_nodes.sh", "packed/measure.sh",
}  # fmt: skip


class Parsed(Exception):
    """A command has understood its flags."""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A folder in which the documents' commands find what they name: a run, data, images."""
    folder = tmp_path_factory.mktemp("documents")
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    data = write_dataset(folder, 7).rename(folder / "train.jsonl")
    for name in ("val.jsonl", "test.jsonl"):
        shutil.copy(data, folder / name)
    (folder / "runs").mkdir()
    write_run(folder / "runs/a", data, level3__adapter_norm=True)
    for name, source in (("orig.jpg", "orig0.png"), ("recon.png", "recon0.png"),
                         ("hand.png", "hand0.png")):  # fmt: skip
        shutil.copy(folder / source, folder / name)
    pair = {"id": "a", "image_orig": "orig.jpg", "image_recon": "recon.png", "query": "What?"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    return folder


@pytest.fixture
def inside(sandbox, monkeypatch):
    """The working directory and home are the sandbox."""
    monkeypatch.chdir(sandbox)
    monkeypatch.setenv("HOME", str(sandbox / "home"))
    return sandbox


def entry(words):
    """The `main` that a command starts and its arguments; None if it is not of this project."""
    words = words[next(i for i, w in enumerate(words) if not re.match(r"[A-Z_]+=", w)) :]
    if words[0] in PYTHON and words[1] == "-m":
        name = words[2]
        if name in ("pytest", "venv"):
            return None
        module = f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name
        return importlib.import_module(module).main, words[2:]
    if words[0] in PYTHON and words[1].startswith("scripts/"):
        return importlib.import_module(words[1][len("scripts/") : -len(".py")]).main, words[1:]
    if words[0] in SCRIPTS:
        module, _, function = SCRIPTS[words[0]].partition(":")
        return getattr(importlib.import_module(module), function), words
    return None


def call(found, monkeypatch):
    """Runs a command in this process. Raises SystemExit if it fails."""
    main, argv = found
    monkeypatch.setattr(sys, "argv", list(argv))
    try:
        main()
    except SystemExit as ended:
        if ended.code not in (None, 0):
            raise


def parse(found, monkeypatch):
    """Lets a command read its flags, and nothing more. Raises SystemExit if they are wrong."""
    cli = tyro.cli

    def stopped(*args, **options):
        parsed = cli(*args, **options)
        if options.get("return_unknown_args"):  # which the whole command reads next
            return parsed
        raise Parsed(parsed)

    with monkeypatch.context() as patch:
        patch.setattr(tyro, "cli", stopped)
        patch.setattr(sys, "argv", list(found[1]))
        with pytest.raises(Parsed):
            found[0]()


def slow_or_not(page):
    return pytest.param(page, marks=[pytest.mark.slow] if page.stem == "inference" else [])


@pytest.mark.parametrize("page", [slow_or_not(p) for p in PAGES], ids=lambda page: page.stem)
def test_blocks_run(page, inside, monkeypatch, capsys):
    names = {}
    for block in blocks(page):
        assert block.language in ("bash", "python", "json", "text", "nginx"), block
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "python":
            code = compile(block.text, str(block), "exec")
            if block.not_run is None:
                exec(code, names)
        elif block.language == "bash":
            for words in commands(block):
                try:
                    found = entry(words)
                    if found is None:
                        assert block.not_run, f"{block}: say why `{' '.join(words)}` is not run"
                    elif block.not_run is None:
                        call(found, monkeypatch)
                    else:
                        parse(found, monkeypatch)
                except SystemExit as ended:
                    said = capsys.readouterr().err[-600:]
                    pytest.fail(f"{block}: `{' '.join(words)}` ends with {ended.code}: {said}")


def test_blocks_that_are_not_run_call_nothing_unknown():
    for block in BLOCKS:
        if block.language != "bash":
            continue
        for words in commands(block):
            words = [w for w in words if not re.match(r"[A-Z_]+=", w)]
            known = words[0] in {*PYTHON, *OTHERS, *SCRIPTS}
            assert known, f"{block}: what is {words[0]}?"
            if words[0] in PYTHON and words[1].startswith("scripts/"):
                assert (ROOT / words[1]).is_file(), f"{block}: no {words[1]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose(page)):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_fields_of_the_configuration_exist(page):
    names = {name for name, _ in leaves(Config())}
    groups = {name.partition(".")[0] for name in names if "." in name}
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"--config\.([a-z0-9_.]+)", text)
    for code in re.findall(r"`([a-z0-9_]+\.[a-z0-9_]+)(?:=[^`]*)?`", prose(page)):
        if code.partition(".")[0] in groups and code.partition(".")[2] not in ENDINGS:
            found.append(code)
    for name in found:
        assert name in names or (name in groups), f"{page}: {name}"


ENDINGS = ("py", "log", "json", "jsonl", "check", "convert")


def literals():
    """All texts of the source, with what an f-string computes left out as \0."""
    found = []
    for folder in ("htfa_jax", "weights_convert"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [getattr(p, "value", "") for p in node.values]
                    found.append("".join(p if isinstance(p, str) else "\0" for p in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_messages_of_the_troubleshooting_page_are_in_the_source():
    said = "\n".join(literals())
    quoted = [row[0] for row in rows(ROOT / "docs/troubleshooting.md")]
    assert len(quoted) > 30
    for symptom in quoted:
        for message in re.findall(r"`([^`]+)`", symptom):
            for piece in filter(None, (p.strip(" :;") for p in message.split("..."))):
                assert piece in said, f"{message}: nothing says {piece!r}"


@functools.cache
def what_tests_are_in(path):
    """Names of the tests of a file, and all its texts."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    return names, texts


def test_every_promised_feature_has_a_test():
    features = [row for row in rows(ROOT / "docs/migration.md") if row[0].isdigit()]
    assert [int(row[0]) for row in features] == list(range(1, 79))
    for number, _, _, shown in features:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)(?:\[([^\]]+)\])?`", shown)
        assert tests and shown.count("`") == 2 * len(tests), f"feature {number}: {shown}"
        for path, name, case in tests:
            names, texts = what_tests_are_in(path)
            assert name in names, f"feature {number}: {path} has no {name}"
            assert not case or case in texts, f"feature {number}: {name} has no case {case}"


def test_every_line_of_the_security_page_names_its_tests():
    page = (ROOT / "SECURITY.md").read_text()
    claims = re.findall(r"^- \*\*(\d+)\.\*\* ", page, re.MULTILINE)
    table = dict(re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE))
    assert claims == list(table) == [str(i + 1) for i in range(len(claims))]
    file = ""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", page):
        file = path or file
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file} has no {name}"


def test_the_readme_names_every_folder():
    """Every package of htfa_jax/ and every folder at the top is in the table of the README."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Where things are\n")[1]
    table = "\n".join(
        line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")
    )
    named = set(re.findall(r"`([\w/]+)/`", table))
    for name in named:
        assert (ROOT / name).is_dir(), name
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    for parent in (ROOT, ROOT / "htfa_jax"):
        outputs = [x.strip("/") for x in ignored if parent == ROOT or not x.startswith("/")]
        for path in filter(Path.is_dir, parent.iterdir()):
            if path.name.startswith(".") or any(fnmatch(path.name, x) for x in outputs):
                continue
            name = path.relative_to(ROOT).as_posix()
            assert name == "htfa_jax" or name in named, f"README names no {name}/"


@pytest.mark.slow
def test_the_drawing_is_of_the_model():
    from docs import draw_architecture
    from htfa_jax.config import load_config, override

    config = override(load_config("standard"), {"pretrained.random_components": "as_configured"})
    drawn = (ROOT / "docs/architecture.svg").read_text(encoding="utf-8")
    for name, words in draw_architecture.labels(config).items():
        for word in words.split(", "):
            assert word in drawn, f"{name}: {words}; run scripts/docs/draw_architecture.py"
