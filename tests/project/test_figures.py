"""Figures of the documents that a CPU can compute are what the code computes today."""

import functools
import json
import re

import jax
import pytest
from documents import ROOT, blocks, rows

from htfa_jax import infer
from htfa_jax.config import load_config, override
from htfa_jax.models import flops
from htfa_jax.training import plan
from htfa_jax.training.plan import abstract_step

sizes = functools.cache(plan.sizes)


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def preset(name, **changes):
    """A configuration as it is with the weights that it names, which are not looked at here."""
    planned = {"pretrained.random_components": "as_configured"}
    return override(load_config(ROOT / f"configs/{name}.py"), planned | changes)


def test_parameters_of_standard():
    standard = sizes("standard")
    for name in ("README.md", "docs/training.md"):
        text = " ".join(page(name).split())
        trainable, frozen = re.search(
            r"(\d+) million trainable and (\d+) million frozen parameters", text
        ).groups()
        assert int(trainable) == round(standard.trainable / 1e6)
        assert int(frozen) == round(standard.frozen / 1e6)


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs").glob("*.py")))
def test_presets_say_their_operations_parameters_and_memory(name):
    said = re.sub(r"\s+", " ", page(f"configs/{name}.py").split('"""')[1])
    found, standard = sizes(name), sizes("standard")
    for number in re.findall(r"(\d+\.?\d*) TFLOP of a step", said):
        assert float(number) == pytest.approx(found.operations / 1e12, abs=0.051)
    for number in re.findall(r"of a step for a sample, not (\d+\.?\d*)", said):
        assert float(number) == pytest.approx(standard.operations / 1e12, abs=0.051)
    for number in re.findall(r"\((\d+) million\)", said):
        assert float(number) == pytest.approx(found.trainable / 1e6, abs=0.51)
    for number in re.findall(r"([\d.]+) GiB \(`python -m htfa_jax.configs`\)", said):
        assert float(number) == pytest.approx(found.memory / 2**30, abs=0.051)


def test_what_cached_features_leave_of_a_step():
    caches = {
        "codes": {"data.cache_codes": True}, "features": {"data.cache_features": True},
        "both": {"data.cache_codes": True, "data.cache_features": True},
    }  # fmt: skip
    standard, debug = preset("standard"), preset("debug")
    lengths = [(standard, 128), (standard, 2048), (debug, debug.data.max_text_length)]
    table = {row[0]: row[1:4] for row in rows(ROOT / "docs/training.md") if row[0] in caches}
    assert set(table) == set(caches)
    for kept, cells in table.items():
        for cell, (config, length) in zip(cells, lengths, strict=True):
            whole = sum(flops.training_step(config, length).values())
            left = sum(flops.training_step(override(config, caches[kept]), length).values())
            assert int(cell.removesuffix("%")) == round(100 * left / whole), (kept, cell)


@pytest.mark.slow
def test_sizes_of_optimizer_states():
    table = {
        row[0].strip("`"): row[1:]
        for row in rows(ROOT / "docs/training.md")
        if len(row) == 4 and row[1].endswith("MiB")
    }
    assert set(table) == {"standard", "internlm2_1_8b"}
    for name, cells in table.items():
        for optimizer, cell in zip(("adamw", "adamw_8bit", "adafactor"), cells, strict=True):
            config = preset(name, **{"optim.name": optimizer})
            size = abstract_step(config, jax.devices()[:1]).device_bytes()["optimizer state"]
            assert int(cell.split()[0].replace(",", "")) == round(size / 2**20), (name, optimizer)


def test_a_checkpoint_of_standard_in_the_notebook():
    cells = json.loads(page("scripts/htfa_colab_tpu.ipynb"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells)
    (said,) = re.findall(r"Every checkpoint takes about ([\d.]+) GB", text)
    # Weights and both moments of AdamW, in float32.
    assert float(said) == round(sizes("standard").trainable * 12 / 1e9, 1)


@pytest.mark.slow
def test_the_quickstart_shows_what_the_demo_model_says(tmp_path, capsys):
    infer.main(["--demo", "--output_dir", str(tmp_path / "demo")])
    printed = capsys.readouterr().out
    said = next(b.text for b in blocks(ROOT / "QUICKSTART.md") if b.text.startswith("bottle\n"))
    number = re.compile(r"(?<=confidence )[\d.]+")
    assert number.sub("#", said) in number.sub("#", printed)
    for shown, now in zip(number.findall(said), number.findall(printed), strict=False):
        assert float(shown) == pytest.approx(float(now), abs=0.011)
