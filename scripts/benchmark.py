"""Times the training step of a configuration, alone or against its PyTorch twin.

    python scripts/benchmark.py --config standard --config.train.batch_size=1
    python scripts/benchmark.py --config scripts/benchmarks/configs/small.py --against torch

Weights and batch are random, so losses mean nothing. Each side runs in a process of its own, and
they take turns (A B A B ...), so that what else the machine does falls on both.

FLOPs are those of `htfa_jax.models.flops`: 2 x tokens x (parameters of the matrices) + 4 x queries
x keys x width for attention, three times for what learns, twice for what gradients pass through,
once for the rest; rematerialisation is not counted. Utilisation is the achieved FLOP/s over the
measured peak, the fastest of several square matmuls in the dtype of the computation, and
for bfloat16 on devices that are known also over what the vendor's datasheet says.

On a GPU the twin's loss is compiled by `torch.compile`, and both sides share the device's memory:
`XLA_PYTHON_CLIENT_MEM_FRACTION=0.5` leaves PyTorch its half.

Peak memory is the device's own count. On a CPU it is the largest resident set of the process while
it trains: compiled before, in another process; freed memory is given back after the first step,
and the count starts there, on both sides alike. Where the system cannot start it again (only Linux
can), it is that of the process's whole life.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.sides import compile_side, jax_side, random_arrays, torch_side, write_weights

from htfa_jax.common.cli import command
from htfa_jax.config import override
from htfa_jax.config.io import ConfigFlags, parse_args
from htfa_jax.errors import ConfigError, TrainingError


@dataclasses.dataclass(frozen=True)
class BenchmarkArgs:
    """Times the training step of --config (default: the preset `standard`) on random data."""

    config: ConfigFlags
    against: Literal["nothing", "torch"] = "nothing"  # the PyTorch twin, on the same CPU or GPU
    repeats: int = 10  # timings of each side
    steps: int = 1  # training steps per timing
    text_length: int | None = None  # tokens of text (None: the first of data.text_buckets)
    threads: int | None = None  # CPU cores that each side may use (None: all)
    profile: Path | None = None  # folder for a jax.profiler trace of three steps
    output: Path | None = None  # JSON file for the figures


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
    # Nothing is read from disk, what encoders made of it neither.
    nothing = dict.fromkeys(("data.cache_codes", "data.cache_features"), False)
    config = override(args.config, {"pretrained.random_components": "as_configured", **nothing})
    length = args.text_length or config.data.text_buckets[0]
    figures: dict[str, Any] = {
        "text_length": length,
        "dtype": config.train.dtype,
        "cores": args.threads or len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        cache, weights = Path(folder) / "compiled", Path(folder) / "weights.safetensors"
        compiling = Side("compiling", compile_side, config, args.threads, length, cache)
        compiling.process.join()
        arrays = random_arrays(config, length, compiling.facts["num_shards"])
        figures["samples_per_step"] = samples = len(arrays["index"])
        ours = (config, args.threads, arrays, cache, args.profile)
        sides = [Side("jax", jax_side, *ours)]
        if args.against == "torch":
            Side("weights", write_weights, config, weights).process.join()
            sides.append(Side("torch", torch_side, config, args.threads, arrays, weights))
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
    if datasheet := ours["datasheet_flops_per_second"]:
        ours["datasheet_utilisation"] = flops / datasheet
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
            f"peak {peak:.2f} GB ({side['peak_kind']})  first loss {side['first_loss']:.5f}, "
            f"last {side['last_loss']:.5f}"
        )
    parts = ", ".join(f"{k} {v / 1e9:,.1f}" for k, v in ours["flops_per_sample"].items())
    lines += [
        f"trace and lower {ours['trace_seconds']:.1f} s, compile {ours['compile_seconds']:.1f} s "
        f"(peak {ours['compile_peak_bytes'] / 1e9:.2f} GB)",
        f"the compiler plans {ours['argument_bytes'] / 1e9:.2f} GB of weights, moments and batch, "
        f"and {ours['temporary_bytes'] / 1e9:.2f} GB for a step; "
        f"peak before the first step {ours['start_peak_bytes'] / 1e9:.2f} GB; on the first device "
        + " and ".join(f"{v / 1e9:.2f} GB of {k}" for k, v in ours["state_bytes"].items()),
        f"{sum(ours['flops_per_sample'].values()) / 1e9:,.1f} GFLOP per sample ({parts})",
        f"{ours['flops_per_second'] / 1e9:,.1f} GFLOP/s of "
        f"{ours['matmul_flops_per_second'] / 1e9:,.1f} in a matmul: "
        f"utilisation {ours['utilisation']:.2f}",
    ]
    if "datasheet_utilisation" in ours:
        lines[-1] += f", {ours['datasheet_utilisation']:.2f} of the datasheet's"
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
