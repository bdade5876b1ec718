"""Devices that are not here: a program can be compiled for them, and its memory read off.

TPU slices need libtpu (`pip install jax[tpu]`), NVIDIA GPUs JAX's CUDA plugin (`jax[cuda13]`);
neither needs the device.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from htfa_jax.errors import ConfigError

GiB = 2**30
# Memory of a chip that a program can use, by the first part of a slice's name.
TPU_MEMORY = {"v4": 32 * GiB, "v5e": 15.75 * GiB, "v5p": 95 * GiB, "v6e": 31.25 * GiB}
# (memory, cores, shared memory per core and block, clock in GHz, L2 in MiB, bandwidth in GB/s,
# compute capability, name): what XLA's GPU compiler asks of a device.
GPUS = {
    "a100-40": (40 * GiB, 108, 167936, 166912, 1.41, 40, 1555, (8, 0), "NVIDIA A100-SXM4-40GB"),
    "a100-80": (80 * GiB, 108, 167936, 166912, 1.41, 40, 2039, (8, 0), "NVIDIA A100-SXM4-80GB"),
    "h100": (80 * GiB, 132, 233472, 232448, 1.98, 50, 3352, (9, 0), "NVIDIA H100 80GB HBM3"),
    "h200": (141 * GiB, 132, 233472, 232448, 1.98, 50, 4800, (9, 0), "NVIDIA H200"),
}


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: as asked for.
      devices: descriptions, as a mesh takes them.
      memory: bytes that a program can use on each.
    """

    name: str
    devices: list[Any]
    memory: float


def find(name: str) -> Target:
    """Devices by name: a TPU slice ("v5e:2x4") or GPUs of one host ("h100:8").

    Raises ConfigError if there is no such thing, or if what compiles for it is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind in TPU_MEMORY and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor a TPU to fight over
        options, needs, memory = {"topology_name": name}, "jax[tpu]", TPU_MEMORY[kind]
        platform = "tpu"
        if shape == "1x1":  # less than a host has
            options["chips_per_host_bounds"] = (1, 1, 1)
    elif kind in GPUS and shape.isdigit():
        options = {"topology_name": "", "topology": f"1x1x{shape}", "target_config": _gpu(kind)}
        needs, memory, platform = "jax[cuda13]", GPUS[kind][0], "cuda"
    else:
        raise ConfigError(
            f"--topology {name} is neither a TPU slice ({', '.join(TPU_MEMORY)}, such as "
            f"v5e:2x4) nor GPUs ({', '.join(GPUS)}, such as h100:8)"
        )
    try:
        found = topologies.get_topology_desc(platform=platform, **options)
    except Exception as error:  # of many kinds, from plugins
        raise ConfigError(
            f"--topology {name} cannot be described: {str(error)[:300]}. Is `{needs}` installed, "
            "and JAX_PLATFORMS=cpu set?"
        ) from error
    return Target(name, list(found.devices), memory)


def _gpu(kind: str) -> str:
    memory, cores, shared, block, clock, cache, bandwidth, (major, minor), name = GPUS[kind]
    return f"""gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores}
        fpus_per_core: {128 if major > 8 else 64} block_dim_limit_x: 2147483647
        block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth * 10**9}
        l2_cache_size: {cache * 2**20} clock_rate_ghz: {clock} device_memory_size: {memory}
        shared_memory_per_block_optin: {block} registers_per_core_limit: 65536
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        registers_per_block_limit: 65536
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    device_description_str: "{name}" """


def collectives(hlo: str) -> dict[str, int]:
    """How often a compiled program's text has each kind of communication.

    Operations inside a loop count once. TPU compilers turn a reduce-scatter into a fusion named
    after it, or into a ring of collective-permutes.
    """
    counts: dict[str, int] = {}
    inside_scatter = False
    operation = re.compile(
        r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
    )
    for line in hlo.splitlines():
        if line.endswith("{"):
            inside_scatter = line.lstrip().startswith("%all-reduce-scatter")
        elif "calls=%all-reduce-scatter" in line:
            counts["reduce-scatter"] = counts.get("reduce-scatter", 0) + 1
        elif not inside_scatter and (found := operation.search(line)):
            counts[found[1]] = counts.get(found[1], 0) + 1
    return counts
