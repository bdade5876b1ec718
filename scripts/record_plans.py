"""Compiles the presets for the devices that they are meant for and keeps what the compiler says.

    python scripts/record_plans.py                      # all, minutes each; needs .[tpu]
    python scripts/record_plans.py memory_efficient

`tests/test_plans.py` holds the figures against the presets' promises, and knows by a fingerprint
of the program whether they are still those of the code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Devices to fingerprint the program for, as many as the largest target has.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=16")

import jax

from htfa_jax.config import Config
from htfa_jax.config_io import load_config, override
from htfa_jax.plan import abstract_step, make_plan
from htfa_jax.topologies import find

RECORDS = Path(__file__).parent.parent / "tests" / "plans.json"
# preset: (slice, chips of it, bytes that a chip may need)
TARGETS = {
    "memory_efficient": ("v5e:2x2", 1, 16e9),
    "standard": ("v5e:2x4", 8, 40e9),
    "internlm2_1_8b": ("v5e:2x4", 8, 15.75 * 2**30),
    "internvl2_8b": ("v5p:2x2x4", 16, 95 * 2**30),
}


def configuration(name: str) -> Config:
    """A preset with its flags as they are: what would be pretrained is frozen or not as then."""
    return override(load_config(name), {"pretrained.random_parts": "as_configured"})


def fingerprint(name: str) -> str:
    """Of the training step's program, before any compiler has seen it."""
    _, chips, _ = TARGETS[name]
    return abstract_step(configuration(name), jax.devices()[:chips]).fingerprint()


def record(name: str) -> dict:
    """What the compiler says of a preset."""
    topology, chips, _ = TARGETS[name]
    config = configuration(name)
    plan = make_plan(abstract_step(config, find(topology).devices[:chips]), config)
    return {
        "topology": topology,
        "chips": chips,
        "jax": jax.__version__,
        "program": fingerprint(name),
        **dataclasses.asdict(plan),
    }


def main() -> None:
    """Command line."""
    for name in sys.argv[1:] or TARGETS:
        found = record(name)
        records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
        RECORDS.write_text(json.dumps({**records, name: found}, indent=2, sort_keys=True) + "\n")
        print(f"{name}: peak {found['peak'] / 2**30:.1f} GiB of each of {found['chips']} chips")


if __name__ == "__main__":
    main()
