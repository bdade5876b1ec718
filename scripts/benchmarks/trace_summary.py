"""Where a recorded program spent its time: matmuls, attention, convolutions, the rest.

    python scripts/benchmark.py --config standard --profile /tmp/trace
    python scripts/benchmarks/trace_summary.py /tmp/trace

Reads what `jax.profiler.trace` writes, and needs nothing but JAX. Kernels are told apart by the
names that XLA, cuBLAS and cuDNN give them, so a fusion that holds a product counts as the product.
Shares are of the time that a device was busy; what it idled beside that is told too.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro

from htfa_jax.common.cli import command, parse
from htfa_jax.errors import DataError

# The first that fits counts.
KINDS = {
    "communication": r"nccl|all-?gather|all-?reduce|reduce-?scatter|all-?to-?all|collective",
    "attention": r"fmha|flash|sdpa|splash|attention",
    "convolution": r"conv(?!ert)|wgrad|dgrad|fprop",
    "matmul": r"gemm|dot|cublas|nvjet|cutlass|xmma|matmul|ynn_fusion",
    "copy": r"memcpy|memset|copy|transpose|bitcast",
    "sums and norms": r"reduce|softmax|norm",
}
REST = "elementwise and other"


@dataclasses.dataclass(frozen=True)
class TraceArgs:
    """Sums up a trace of jax.profiler by kind of operation."""

    trace: tyro.conf.Positional[Path]  # the folder that the trace was written to
    top: int = 15  # operations that are listed by name


@dataclasses.dataclass(frozen=True)
class Operation:
    """One execution of an operation on a device.

    Attributes:
      name: of the kernel or of the program's operation.
      start, duration: nanoseconds.
    """

    name: str
    start: float
    duration: float


def operations(folder: Path) -> dict[str, list[Operation]]:
    """Operations by device. Raises DataError if there is no trace, or nothing ran in it."""
    from jax.profiler import ProfileData

    paths = sorted(folder.rglob("*.xplane.pb"))
    if not paths:
        raise DataError(f"{folder} holds no trace (*.xplane.pb): expected jax.profiler's folder")
    found: dict[str, list[Operation]] = collections.defaultdict(list)
    newest = paths[-1].parent  # of several recordings; one file per process
    for path in sorted(newest.glob("*.xplane.pb")):
        planes = list(ProfileData.from_file(str(path)).planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        for plane in devices or planes:
            lines = list(plane.lines)
            # TPUs have a line for operations; steps and modules, on others, hold them.
            named = [line for line in lines if line.name == "XLA Ops"]
            for line in named or lines:
                found[f"{path.stem}{plane.name}"] += _of(line)
    found = {name: ran for name, ran in found.items() if ran}
    if not found:
        raise DataError(f"{newest}: no compiled operation ran while it was recorded")
    return found


def _of(line) -> Iterator[Operation]:
    for event in line.events:
        # Others are the host's: the Python stack, threads that start and stop.
        if event.duration_ns > 0 and any(key == "hlo_op" for key, _ in event.stats):
            yield Operation(event.name, event.start_ns, event.duration_ns)


def kind(name: str) -> str:
    """What sort of work a kernel's name tells of."""
    return next((k for k, names in KINDS.items() if re.search(names, name, re.IGNORECASE)), REST)


def busy(ran: Sequence[Operation]) -> float:
    """Nanoseconds in which at least one operation ran."""
    total, end = 0.0, float("-inf")
    for op in sorted(ran, key=lambda op: op.start):
        stop = op.start + op.duration
        total += max(0.0, stop - max(op.start, end))
        end = max(end, stop)
    return total


def summary(device: str, ran: Sequence[Operation], top: int) -> str:
    """A table of kinds, and one of the operations that took longest."""
    by_kind: collections.Counter[str] = collections.Counter()
    by_name: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for op in ran:
        name = re.sub(r"[.\d]+$", "", op.name)  # of fusion.12 and fusion.13 the same
        by_kind[kind(op.name)] += op.duration
        by_name[name] += op.duration
        times[name] += 1
    span = max(op.start + op.duration for op in ran) - min(op.start for op in ran)
    whole = sum(by_kind.values())
    lines = [f"{device}: busy {busy(ran) / 1e6:,.1f} of {span / 1e6:,.1f} ms", ""]
    lines += ["| kind | ms | share |", "| --- | --- | --- |"]
    lines += [f"| {k} | {t / 1e6:,.2f} | {t / whole:.3f} |" for k, t in by_kind.most_common()]
    lines += ["", "| operation | times | ms | share |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name[:60]} | {times[name]} | {t / 1e6:,.2f} | {t / whole:.3f} |"
        for name, t in by_name.most_common(top)
    ]
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(TraceArgs, argv, __doc__)
    for device, ran in operations(args.trace).items():
        print(summary(device, ran, args.top), end="\n\n")


if __name__ == "__main__":
    main()
