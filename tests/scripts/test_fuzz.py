"""Made-up inputs of all readers; `scripts/reliability/fuzz.py` feeds any number of them."""

import ast
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reliability import fuzz

from htfa_jax.errors import DataError

ROOT = Path(__file__).parents[2]
READERS = """
    record|records, JSON lines|records, JSON array|record of another form|records, JSON object
    |records, CSV|records, packed|manifest of shards|image|pickle|ObMan
    |infer --input|predictions|contact sheet|curves|box|mesh|config.json|overrides|chat template
    |tokenizer_config.json|tokenizer.json|labels|tokenizer to convert|weights to convert
    |weight folder|checkpoint|checkpoint's meta|metrics.json
"""
NAMES = [name.strip() for name in READERS.split("|")]
SEEDS = 400
# Files that read JSON: those that these readers are in, and others, of which there is a reason.
FED = """
    htfa_jax/checkpoints/integrity.py htfa_jax/checkpoints/meta.py htfa_jax/checkpoints/weights.py
    htfa_jax/config/io.py htfa_jax/data/held_objects/sheet.py htfa_jax/data/sources/json_lines.py
    htfa_jax/data/sources/array_records.py htfa_jax/data/tokenizer.py
    htfa_jax/data/tokenizer_file.py htfa_jax/data/sources/json_object.py
    htfa_jax/data/rendering/meshes.py
    htfa_jax/data/sources/tables.py htfa_jax/demo/http.py htfa_jax/evaluation/curves.py
    htfa_jax/evaluation/report_html.py htfa_jax/inference/export.py htfa_jax/inference/kept.py
    htfa_jax/inference/inputs.py weights_convert/source.py weights_convert/tokenizer.py
""".split()
OTHERS = {
    "htfa_jax/checkpoints/lock.py": "damage is no error: the lock is free",
    "htfa_jax/common/json_files.py": "the reader itself",
    "htfa_jax/data/control_tokens.py": "what the tokenizers library wrote",
    "htfa_jax/data/convert.py": "its own file of a conversion that was stopped",
    "htfa_jax/data/held_objects/builder.py": "its own cache",
    "htfa_jax/data/held_objects/scene_files.py": "its own cache",
    "htfa_jax/data/sources/tfds.py": "needs a package of its own",
    "htfa_jax/demo/guard.py": "attacked by `attack_server.py`",
    "htfa_jax/training/encoder_cache.py": "its own cache",
    "htfa_jax/training/loss_guard.py": "dumps of the user's own runs",
    "htfa_jax/training/origins.py": "names and hashes, which are only compared",
    "weights_convert/preset.py": "its own record, and an index of which only names are taken",
    "weights_convert/verify.py": "what it wrote itself",
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return fuzz.all_readers(tmp_path_factory.mktemp("fuzz"))


def test_every_reader_is_fed(readers):
    assert list(readers) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_made_up_input_is_read_or_refused(readers, name):
    found = fuzz.count(readers[name], SEEDS, seed=0, seconds=60)
    assert not found.escapes
    assert found.refused and found.accepted, "inputs are nearly right: some are, some are not"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_input_that_hypothesis_makes_up(readers, name):
    """It looks for the smallest one that escapes."""

    @settings(
        max_examples=30,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def once(rng):
        fuzz.feed(readers[name], rng)

    once()


def test_an_escape_is_counted():
    def read(given):
        if given == 0:
            raise DataError("no")
        if given == 1:
            raise KeyError("x")
        if given == 2:
            raise BaseException("as a panic is")
        while given == 3:
            pass

    counts = []
    for number in range(5):
        reader = fuzz.Reader(lambda rng, number=number: number, read)
        counts.append(fuzz.count(reader, 1, seed=9, seconds=0.2))
    assert [c.refused for c in counts] == [1, 0, 0, 0, 0]
    assert [c.accepted for c in counts] == [0, 0, 0, 0, 1]
    assert [list(c.escapes.values()) for c in counts[1:4]] == [
        ["KeyError: 'x'"],
        ["BaseException: as a panic is"],
        ["TooLong: longer than 0.2 s"],
    ]
    assert counts[1].escapes.keys() == {9}


def test_who_reads_json_is_fed_or_named():
    """A new reader must come to one of the lists."""
    found = set()
    for path in (*ROOT.glob("htfa_jax/**/*.py"), *ROOT.glob("weights_convert/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "read_json",
                "parse_json",
                "read_json_lines",
            ):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == set(FED) | OTHERS.keys()
