"""What `benchmark.py` runs in processes of their own, and what they measure.

JAX and PyTorch are imported by the process that needs them, never by the one that starts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from htfa_jax.config import Config

MATMUL_SIZES = (1024, 2048, 4096, 8192)
MATMUL_SECONDS = 0.1  # the next size is tried while a product takes less
# Dense bfloat16 FLOP/s of the vendors' datasheets, by JAX's name of the device.
DATASHEET = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def random_arrays(
    config: Config, text_length: int, num_shards: int = 1, seed: int = 0
) -> dict[str, np.ndarray]:
    """The arrays of a `Batch` for one update, by name: everything there, boxes inside."""
    rng, side = np.random.default_rng(seed), config.image_size
    samples = config.train.batch_size * config.train.accumulation_steps * num_shards

    def image() -> np.ndarray:
        return rng.integers(0, 256, (samples, side, side, 3), dtype=np.uint8)

    def boxes() -> np.ndarray:
        corner = rng.integers(0, side // 3, (samples, 2))
        size = rng.integers(side // 3, side // 2, (samples, 2))
        return np.concatenate([corner, size], axis=1).astype(np.float32)

    def inside(boxes_B4: np.ndarray) -> np.ndarray:
        x, y, w, h = boxes_B4.T[:, :, None, None]
        row, column = np.arange(side)[None, :, None], np.arange(side)[None, None]
        return (column >= x) & (column < x + w) & (row >= y) & (row < y + h)

    def random_tokens() -> np.ndarray:
        return rng.integers(0, config.decoder.vocab_size, (samples, text_length), dtype=np.int32)

    region = np.tile(np.array([0, 0, side, side], np.float32), (samples, 1))
    bbox_orig = boxes()
    flags = ("recon", "target", "object_mask", "occluder_mask", "bbox_orig", "bbox_recon")
    return {
        **{f"image_{name}": image() for name in ("orig", "recon", "target")},
        "region_orig": region,
        "region_recon": region,
        "object_mask": inside(bbox_orig),
        "occluder_mask": inside(boxes()),
        "bbox_orig": bbox_orig,
        "bbox_recon": boxes(),
        **{f"has_{name}": np.ones(samples, bool) for name in flags},
        "tokens": random_tokens(),
        "labels": random_tokens(),
        "loss_mask": np.ones((samples, text_length), np.float32),
        "weight": np.ones(samples, np.float32),
        "index": np.arange(samples, dtype=np.int32),
    }


def peak_resident() -> int:
    """Largest resident set of this process since `forget_peak`, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Gives freed memory back to the system and starts `peak_resident` again, where it can."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def use_cores(threads: int | None) -> None:
    """Keeps this process on so many CPU cores; before JAX or PyTorch count them."""
    if threads is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        os.environ["OMP_NUM_THREADS"] = str(threads)


def serve(pipe: Connection, run: Callable[[], Any]) -> float:
    """Answers each number of steps with (seconds, of the processor) of one, until it is 0.

    `run` starts a step and gives its loss, for which nobody waits before the last: in training
    too the next step is under way when one is read. Returns the last loss.
    """
    last = float("nan")
    while steps := pipe.recv():
        start, worked = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = run()
        last = float(loss)
        spent = time.perf_counter() - start, time.process_time() - worked
        pipe.send([seconds / steps for seconds in spent])
    return last


def bytes_here(tree: Any) -> int:
    """Bytes of arrays on the first device."""
    import jax

    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def write_weights(pipe: Connection, config: Config, path: Path) -> None:
    """Saves the weights that `jax_side` draws, in float32, for the twin to start from."""
    import jax
    from safetensors.numpy import save_file

    from htfa_jax.models.factory import build_model
    from htfa_jax.sharding.layout import Layout
    from htfa_jax.training.state import new_params

    jax.config.update("jax_platforms", "cpu")
    layout = Layout(config, jax.devices()[:1])
    trainable, frozen = new_params(config, build_model(config), {}, layout)
    flat = {**trainable, **frozen}
    save_file({name: np.array(value, np.float32) for name, value in flat.items()}, path)
    pipe.send({})


def compile_step(config: Config, length: int, cache: Path) -> tuple[Any, dict, Any]:
    """The compiled training step, what compiling it took, its plan; kept in the folder `cache`."""
    import jax

    from htfa_jax.training.plan import abstract_step

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    abstract = abstract_step(config, text_length=length)
    start = time.perf_counter()
    lowered = abstract.lower()
    traced = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    facts = {
        "trace_seconds": traced - start,
        "compile_seconds": time.perf_counter() - traced,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    return compiled, facts, abstract


def compile_side(
    pipe: Connection, config: Config, threads: int | None, length: int, cache: Path
) -> None:
    """Compiles the step into an empty cache; sends what it took."""
    use_cores(threads)
    _, facts, abstract = compile_step(config, length, cache)
    shards = abstract.layout.num_shards
    pipe.send({**facts, "compile_peak_bytes": peak_resident(), "num_shards": shards})


def jax_side(
    pipe: Connection,
    config: Config,
    threads: int | None,
    arrays: dict[str, np.ndarray],
    cache: Path,
    profile: Path | None,
) -> None:
    """Measures ours: sends facts, serves timings, sends what is known at the end."""
    use_cores(threads)
    import jax

    from htfa_jax.data.batch import Batch
    from htfa_jax.models.factory import build_model
    from htfa_jax.models.flops import training_step
    from htfa_jax.training.state import new_params, new_state
    from htfa_jax.training.step import put_update

    device, length = jax.devices()[0], arrays["tokens"].shape[1]
    compiled, _, abstract = compile_step(config, length, cache)
    layout = abstract.layout
    trainable, frozen = new_params(config, build_model(config), {}, layout)
    state = new_state(config.train, trainable, abstract.optimizer, layout)
    del trainable
    batch = put_update(config.train, layout, Batch(**arrays))
    jax.clear_caches()

    def run() -> jax.Array:
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        return metrics["loss"]

    before = peak_resident()
    loss = float(run())
    forget_peak()
    pipe.send(
        {
            "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
            "first_loss": loss,
            "flops_per_sample": training_step(config, length),
        }
    )
    last = serve(pipe, run)
    resident, stats = peak_resident(), device.memory_stats() or {}
    memory = {
        "last_loss": last,
        "state_bytes": {name: bytes_here(state[name]) for name in ("params", "opt_state")},
        "peak_bytes": stats.get("peak_bytes_in_use", resident),
        "peak_kind": "device" if "peak_bytes_in_use" in stats else "resident",
        "start_peak_bytes": before,
    }
    if profile is not None:
        with jax.profiler.trace(str(profile)):
            for _ in range(3):
                loss = run()
            float(loss)
    state = frozen = batch = None  # room for the matrices
    matmul = jax.device_count() * matmul_peak(config.train.dtype)
    datasheet = DATASHEET.get(device.device_kind) if config.train.dtype == "bfloat16" else None
    pipe.send(
        {
            **memory,
            "matmul_flops_per_second": matmul,
            "datasheet_flops_per_second": datasheet and jax.device_count() * datasheet,
        }
    )


def matmul_peak(dtype: str) -> float:
    """FLOP/s of the fastest square matmul."""
    import jax
    import jax.numpy as jnp

    best = 0.0
    multiply = jax.jit(jnp.matmul)
    for size in MATMUL_SIZES:
        a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
        multiply(a, b).block_until_ready()
        fastest = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            multiply(a, b).block_until_ready()
            fastest = min(fastest, time.perf_counter() - start)
        best = max(best, 2 * size**3 / fastest)
        if fastest > MATMUL_SECONDS:
            break
    return best


def torch_side(
    pipe: Connection,
    config: Config,
    threads: int | None,
    arrays: dict[str, np.ndarray],
    weights: Path,
) -> None:
    """Measures the twin, in the same way."""
    use_cores(threads)
    import torch
    from benchmarks.torch_twin import Twin
    from safetensors import safe_open

    if threads is not None:
        torch.set_num_threads(threads)
    gpu = torch.cuda.is_available()
    with safe_open(weights, framework="numpy") as file:
        params = {path: file.get_tensor(path) for path in file.keys()}  # noqa: SIM118
    twin = Twin(config, params, "cuda" if gpu else "cpu")
    del params
    arrays = twin.put(arrays)
    before, start = peak_resident(), time.perf_counter()
    loss = float(twin.step(arrays))
    forget_peak()
    pipe.send(
        {
            "device": torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads",
            "first_loss": loss,
            "first_step_seconds": time.perf_counter() - start,
        }
    )
    last = serve(pipe, lambda: twin.step(arrays))
    peak = torch.cuda.max_memory_allocated() if gpu else peak_resident()
    kind = "device" if gpu else "resident"
    memory = {"peak_bytes": peak, "peak_kind": kind, "start_peak_bytes": before}
    pipe.send({"last_loss": last, **memory})
