"""Times the training step of a configuration, alone or against its PyTorch twin.

    python scripts/benchmark.py --config standard --config.train.batch_size=1
    python scripts/benchmark.py --config scripts/benchmark_configs/small.py --against torch

Weights and batch are random, so losses mean nothing. Each side runs in a process of its own, and
they take turns (A B A B ...), so that what else the machine does falls on both.

FLOPs are those of `htfa_jax.flops`: 2 x tokens x (parameters of the matrices) + 4 x queries x keys
x width for attention, three times for what learns, twice for what gradients pass through, once for
the rest; rematerialisation is not counted. Utilisation is the achieved FLOP/s over the measured
peak: the fastest of several square matrix products in the dtype of the computation.

Peak memory is the device's own count. On a CPU it is the largest resident set of the process while
it trains: compiled before, in another process; freed memory is given back after the first step,
and the count starts there, on both sides alike. Where the system cannot start it again (only Linux
can), it is that of the process's whole life.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from htfa_jax.commands import command
from htfa_jax.config import Config
from htfa_jax.config_io import ConfigFlags, override, parse_args
from htfa_jax.errors import ConfigError, TrainingError

# JAX and PyTorch are imported by the processes that measure them, never by this one.

MATMUL_SIZES = (1024, 2048, 4096, 8192)
MATMUL_SECONDS = 0.1  # the next size is tried while a product takes less


@dataclasses.dataclass(frozen=True)
class BenchmarkArgs:
    """Times the training step of --config (default: the preset `standard`) on random data."""

    config: ConfigFlags
    against: Literal["nothing", "torch"] = "nothing"  # the PyTorch twin, on the same CPU
    repeats: int = 10  # timings of each side
    steps: int = 1  # training steps per timing
    text_length: int | None = None  # tokens of text (None: the first of data.text_buckets)
    threads: int | None = None  # CPU cores that each side may use (None: all)
    profile: Path | None = None  # folder for a jax.profiler trace of three steps
    output: Path | None = None  # JSON file for the figures


def random_arrays(config: Config, text_length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of a `Batch` for one update, by name: everything there, boxes inside."""
    rng, side = np.random.default_rng(seed), config.image_size
    samples = config.train.batch_size * config.train.accumulation_steps

    def picture() -> np.ndarray:
        return rng.integers(0, 256, (samples, side, side, 3), dtype=np.uint8)

    def boxes() -> np.ndarray:
        corner = rng.integers(0, side // 3, (samples, 2))
        size = rng.integers(side // 3, side // 2, (samples, 2))
        return np.concatenate([corner, size], axis=1).astype(np.float32)

    def inside(boxes_B4: np.ndarray) -> np.ndarray:
        x, y, w, h = boxes_B4.T[:, :, None, None]
        row, column = np.arange(side)[None, :, None], np.arange(side)[None, None]
        return (column >= x) & (column < x + w) & (row >= y) & (row < y + h)

    def words() -> np.ndarray:
        return rng.integers(0, config.decoder.vocab_size, (samples, text_length), dtype=np.int32)

    region = np.tile(np.array([0, 0, side, side], np.float32), (samples, 1))
    bbox_orig = boxes()
    flags = ("recon", "target", "object_mask", "occluder_mask", "bbox_orig", "bbox_recon")
    return {
        **{f"image_{name}": picture() for name in ("orig", "recon", "target")},
        "region_orig": region,
        "region_recon": region,
        "object_mask": inside(bbox_orig),
        "occluder_mask": inside(boxes()),
        "bbox_orig": bbox_orig,
        "bbox_recon": boxes(),
        **{f"has_{name}": np.ones(samples, bool) for name in flags},
        "tokens": words(),
        "labels": words(),
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


def serve(pipe: Connection, run: Callable[[], float]) -> None:
    """Answers each number of steps with (seconds, of the processor) of one, until it is 0."""
    while steps := pipe.recv():
        start, worked = time.perf_counter(), time.process_time()
        for _ in range(steps):
            run()
        spent = time.perf_counter() - start, time.process_time() - worked
        pipe.send([seconds / steps for seconds in spent])


def write_weights(pipe: Connection, config: Config, path: Path) -> None:
    """Saves the weights that `jax_side` draws, in float32, for the twin to start from."""
    import jax
    from safetensors.numpy import save_file

    from htfa_jax.train_state import build, new_params

    jax.config.update("jax_platforms", "cpu")
    trainable, frozen = new_params(config, build(config), {})
    flat = {**trainable, **frozen}
    save_file({name: np.array(value, np.float32) for name, value in flat.items()}, path)
    pipe.send({})


def compile_step(config: Config, arrays: dict[str, np.ndarray], cache: Path) -> tuple[Any, dict]:
    """The compiled training step, and what compiling it took; kept in the folder `cache`."""
    import jax
    import jax.numpy as jnp

    from htfa_jax import paths
    from htfa_jax.batch import Batch
    from htfa_jax.optim import frozen_pattern, learning_rate, make_optimizer
    from htfa_jax.train import make_train_step
    from htfa_jax.train_state import build, frozen_dtype, new_state

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model = build(config)
    schedule = learning_rate(config.optim, 10_000)
    optimizer = make_optimizer(config.optim, schedule)
    frozen, trainable = paths.split(model.shapes, frozen_pattern(config))
    frozen = {p: jax.ShapeDtypeStruct(s.shape, frozen_dtype(p, config)) for p, s in frozen.items()}
    state = jax.eval_shape(lambda params: new_state(params, optimizer), trainable)
    batch = jax.eval_shape(lambda: Batch(**{k: jnp.asarray(v) for k, v in arrays.items()}))
    step = jax.jit(make_train_step(config, model, optimizer, schedule), donate_argnums=0)
    start = time.perf_counter()
    lowered = step.lower(state, frozen, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return compiled, {
        "trace_seconds": traced - start,
        "compile_seconds": time.perf_counter() - traced,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def compile_side(pipe: Connection, args: BenchmarkArgs, arrays: dict, cache: Path) -> None:
    """Compiles the step into an empty cache; sends what it took."""
    use_cores(args.threads)
    _, facts = compile_step(args.config, arrays, cache)
    pipe.send({**facts, "compile_peak_bytes": peak_resident()})


def jax_side(pipe: Connection, args: BenchmarkArgs, arrays: dict, cache: Path) -> None:
    """Measures ours: sends facts, serves timings, sends what is known at the end."""
    use_cores(args.threads)
    import jax

    from htfa_jax.batch import Batch
    from htfa_jax.flops import training_step
    from htfa_jax.optim import learning_rate, make_optimizer
    from htfa_jax.train_state import build, new_params, new_state

    config, device = args.config, jax.devices()[0]
    compiled, _ = compile_step(config, arrays, cache)
    trainable, frozen = new_params(config, build(config), {})
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, 10_000))
    state = new_state(trainable, optimizer)
    del trainable
    batch = jax.device_put(Batch(**arrays))
    jax.clear_caches()

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        return float(metrics["loss"])  # which waits for the step

    before = peak_resident()
    loss = run()
    forget_peak()
    pipe.send(
        {
            "device": f"{device.device_kind} ({device.platform})",
            "first_loss": loss,
            "flops_per_sample": training_step(config, arrays["tokens"].shape[1]),
        }
    )
    serve(pipe, run)
    resident, stats = peak_resident(), device.memory_stats() or {}
    memory = {
        "peak_bytes": stats.get("peak_bytes_in_use", resident),
        "peak_kind": "device" if "peak_bytes_in_use" in stats else "resident",
        "start_peak_bytes": before,
    }
    if args.profile is not None:
        with jax.profiler.trace(str(args.profile)):
            for _ in range(3):
                run()
    state = frozen = batch = None  # room for the matrices
    pipe.send({**memory, "matmul_flops_per_second": matmul_peak(config.train.dtype)})


def matmul_peak(dtype: str) -> float:
    """FLOP/s of the fastest square matrix product."""
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
    pipe: Connection, args: BenchmarkArgs, arrays: dict[str, np.ndarray], weights: Path
) -> None:
    """Measures the twin, in the same way."""
    use_cores(args.threads)
    import torch
    from safetensors import safe_open
    from torch_twin import Twin

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with safe_open(weights, framework="numpy") as file:
        twin = Twin(args.config, {path: file.get_tensor(path) for path in file.keys()})  # noqa: SIM118
    before, loss = peak_resident(), twin.step(arrays)
    forget_peak()
    pipe.send({"device": f"{torch.get_num_threads()} threads", "first_loss": loss})
    serve(pipe, lambda: twin.step(arrays))
    pipe.send({"peak_bytes": peak_resident(), "peak_kind": "resident", "start_peak_bytes": before})


class Side:
    """A process that measures one side; the parent tells it when."""

    def __init__(self, name: str, target: Callable, *args: Any):
        self.name, self.timings = name, []
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()
        self.facts = self.receive()

    def receive(self) -> Any:
        """What the process sends next. Raises TrainingError if it has died."""
        try:
            return self.pipe.recv()
        except EOFError as error:
            self.process.join()
            raise TrainingError(
                f"the {self.name} side ended with exit code {self.process.exitcode}; its own "
                "message stands above (-9: out of memory)"
            ) from error

    def time(self, steps: int) -> None:
        """One more timing."""
        self.pipe.send(steps)
        self.timings.append(self.receive())

    def finish(self, samples: int) -> dict[str, Any]:
        """All figures."""
        self.pipe.send(0)
        self.facts |= self.receive()
        self.process.join()
        seconds, worked = (list(x) for x in zip(*self.timings, strict=True))
        median = statistics.median(seconds)
        return {
            **self.facts,
            "step_seconds": seconds,
            "median_step_seconds": median,
            "median_step_processor_seconds": statistics.median(worked),
            "samples_per_second": samples / median,
        }


def benchmark(args: BenchmarkArgs) -> dict[str, Any]:
    """Runs it; the figures as they are written to JSON."""
    config = override(args.config, {"pretrained.random_parts": "as_configured"})
    args = dataclasses.replace(args, config=config)
    arrays = random_arrays(config, args.text_length or config.data.text_buckets[0])
    samples = len(arrays["index"])
    figures: dict[str, Any] = {
        "samples_per_step": samples,
        "text_length": arrays["tokens"].shape[1],
        "dtype": config.train.dtype,
        "cores": args.threads or len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        cache, weights = Path(folder) / "compiled", Path(folder) / "weights.safetensors"
        compiling = Side("compiling", compile_side, args, arrays, cache)
        compiling.process.join()
        sides = [Side("jax", jax_side, args, arrays, cache)]
        if args.against == "torch":
            Side("weights", write_weights, config, weights).process.join()
            sides.append(Side("torch", torch_side, args, arrays, weights))
        for _ in range(args.repeats):
            for side in sides:
                side.time(args.steps)
        figures |= {side.name: side.finish(samples) for side in sides}
    figures["load_after"] = os.getloadavg()[0]
    ours = figures["jax"]
    flops = sum(ours["flops_per_sample"].values()) * ours["samples_per_second"]
    ours |= {
        **compiling.facts,
        "flops_per_second": flops,
        "utilisation": flops / ours["matmul_flops_per_second"],
    }
    if args.against == "torch":
        theirs = figures["torch"]
        ratios = [b / a for a, b in zip(ours["step_seconds"], theirs["step_seconds"], strict=True)]
        figures["ours_over_torch"] = {
            "samples_per_second": statistics.median(ratios),
            "samples_per_second_of_each_pair": ratios,
            "peak_bytes": ours["peak_bytes"] / theirs["peak_bytes"],
        }
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    ours = figures["jax"]
    lines = [
        f"{figures['samples_per_step']} samples per step, {figures['text_length']} text tokens, "
        f"{figures['dtype']}, {ours['device']}, {figures['cores']} cores, "
        f"load {figures['load_before']:.1f} to {figures['load_after']:.1f}"
    ]
    for name in ("jax", "torch"):
        if (side := figures.get(name)) is None:
            continue
        peak = side["peak_bytes"] / 1e9
        lines.append(
            f"{name:<6} {side['median_step_seconds']:.4f} s per step "
            f"({min(side['step_seconds']):.4f} to {max(side['step_seconds']):.4f}; "
            f"{side['median_step_processor_seconds']:.4f} s of the processor)  "
            f"{side['samples_per_second']:.2f} samples/s  "
            f"peak {peak:.2f} GB ({side['peak_kind']})  first loss {side['first_loss']:.5f}"
        )
    parts = ", ".join(f"{k} {v / 1e9:,.1f}" for k, v in ours["flops_per_sample"].items())
    lines += [
        f"trace and lower {ours['trace_seconds']:.1f} s, compile {ours['compile_seconds']:.1f} s "
        f"(peak {ours['compile_peak_bytes'] / 1e9:.2f} GB)",
        f"the compiler plans {ours['argument_bytes'] / 1e9:.2f} GB of weights, moments and batch, "
        f"and {ours['temporary_bytes'] / 1e9:.2f} GB for a step; "
        f"peak before the first step {ours['start_peak_bytes'] / 1e9:.2f} GB",
        f"{sum(ours['flops_per_sample'].values()) / 1e9:,.1f} GFLOP per sample ({parts})",
        f"{ours['flops_per_second'] / 1e9:,.1f} GFLOP/s of "
        f"{ours['matmul_flops_per_second'] / 1e9:,.1f} in a matrix product: "
        f"utilisation {ours['utilisation']:.2f}",
    ]
    if ratios := figures.get("ours_over_torch"):
        each = ratios["samples_per_second_of_each_pair"]
        lines.append(
            f"jax / torch: samples/s {ratios['samples_per_second']:.2f} "
            f"({min(each):.2f} to {max(each):.2f}), peak memory {ratios['peak_bytes']:.2f}"
        )
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse_args(BenchmarkArgs, argv)
    for name in ("repeats", "steps"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}={getattr(args, name)} must be at least 1")
    figures = benchmark(args)
    print(table(figures))
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
