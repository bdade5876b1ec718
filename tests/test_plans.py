"""The presets fit on the devices that they are meant for, as the compiler for these says.

The figures are recorded, since a compilation takes minutes (`scripts/record_plans.py`); that they
are those of this code is checked by the fingerprint of the program.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
RECORDS = json.loads((ROOT / "tests/plans.json").read_text())
# preset: bytes that a chip may need
LIMITS = {
    "memory_efficient": 16e9,
    "standard": 40e9,
    "internlm2_1_8b": 15.75 * 2**30,
    "internvl2_8b": 95 * 2**30,
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_preset_fits(name):
    found = RECORDS[name]
    assert found["peak"] <= LIMITS[name]
    # What is kept is a part of it, and a part that makes sense.
    assert 0.1 * found["peak"] < sum(found["kept"].values()) < found["peak"]


def test_weights_travel_and_gradients_are_scattered():
    for name in ("standard", "internlm2_1_8b", "internvl2_8b"):
        kinds = RECORDS[name]["collectives"]
        assert kinds["all-gather"] > 0, name
        # On a TPU a reduce-scatter is a fusion, or a ring of collective-permutes.
        assert kinds.get("reduce-scatter", 0) + kinds.get("collective-permute", 0) > 0, name
    assert RECORDS["memory_efficient"]["collectives"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITS)
def test_the_figures_are_of_this_code(name):
    if RECORDS[name]["jax"] != jax.__version__:
        pytest.skip(f"recorded with JAX {RECORDS[name]['jax']}, whose programs look different")
    code = f"from record_plans import fingerprint; print(fingerprint({name!r}))"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    env.pop("XLA_FLAGS", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == RECORDS[name]["program"], (
        f"the training step of {name} has changed: run `python scripts/record_plans.py {name}`"
    )
