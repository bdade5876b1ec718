"""What exists once: the hash of a file, and writing whole files and folders."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOMES = {
    # A hash of arrays, not of a file or a value.
    "hashlib.sha256": {"htfa_jax/common/hashing.py", "htfa_jax/checkpoints/weights.py"},
    "hashlib.file_digest": {"htfa_jax/common/hashing.py"},
    "os.replace": {"htfa_jax/common/files.py"},
    "os.rename": {"htfa_jax/common/files.py"},
    "filelock.FileLock": {"htfa_jax/common/files.py"},
    # Of a run's workdir; its docstring says why.
    "fcntl.flock": {"htfa_jax/checkpoints/lock.py"},
}


def test_what_has_a_helper_is_called_there_alone():
    found: dict[str, set[str]] = {name: set() for name in HOMES}
    for folder in ("htfa_jax", "weights_convert", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in HOMES:
                    found[called].add(path.relative_to(ROOT).as_posix())
    assert found == HOMES
