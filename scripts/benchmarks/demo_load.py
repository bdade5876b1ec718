"""Many clients at once against the HTTP API of the demo.

python scripts/benchmarks/demo_load.py                      # 16 clients, 60 seconds, the demo model
python scripts/benchmarks/demo_load.py --clients 80         # more than the queue takes: refusals
python scripts/benchmarks/demo_load.py --checkpoint runs/x

It starts a server of its own. Every client asks, listens to a streamed answer and has an image
completed, in turns and without a pause; one refused waits as long as it was told. Beside them one
sends its images drop by drop, and one leaves as soon as it has asked. Printed are the answers by
status, seconds per request of the whole and of the luckiest and unluckiest client, and the server's
memory over time.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import tyro

from htfa_jax.checkpoints.runs import DEMO, EXAMPLES
from htfa_jax.inference.inputs import read_jobs

KINDS = ("infer", "stream", "complete")
START_SECONDS = 300
QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclasses.dataclass(frozen=True)
class Args:
    """Puts a load on the demo's HTTP API."""

    clients: int = 16
    seconds: float = 60.0
    checkpoint: Path | None = None  # default: the demo model
    server: tuple[str, ...] = ()  # more options of `python -m htfa_jax.demo`


@dataclasses.dataclass
class Client:
    """What happened to one client.

    Attributes:
      statuses: how many of each.
      seconds: of every request that succeeded, by kind.
      hintless: refusals without Retry-After.
    """

    statuses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {kind: [] for kind in KINDS}
    )
    hintless: int = 0


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, use_underscores=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    model = ["--demo"] if args.checkpoint is None else ["--checkpoint", str(args.checkpoint)]
    command = [sys.executable, "-m", "htfa_jax.demo", *model, "--port", str(port), *args.server]
    server = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server)
        clients, memory = asyncio.run(load(url, server.pid, args))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    report(clients, memory, args)


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Returns once the server answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            sys.exit("the server did not start")
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/healthz").raise_for_status()
            return
        time.sleep(0.5)
    sys.exit(f"the server did not answer within {START_SECONDS} s")


async def load(url: str, pid: int, args: Args) -> tuple[list[Client], list[tuple[float, float]]]:
    """The clients after their time, and the server's memory (seconds, MB)."""
    start = time.monotonic()
    end = start + args.seconds
    clients = [Client() for _ in range(args.clients)]
    memory: list[tuple[float, float]] = []

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append((time.monotonic() - start, megabytes(pid)))
            await asyncio.sleep(args.seconds / 12)

    rude = [asyncio.create_task(slow(url)), asyncio.create_task(leaving(url))]
    await asyncio.gather(watch(), *(work(url, i, c, end) for i, c in enumerate(clients)))
    for task in rude:
        task.cancel()
    memory.append((time.monotonic() - start, megabytes(pid)))
    return clients, memory


async def work(url: str, number: int, client: Client, end: float) -> None:
    """One client, until its time is over."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for turn in range(10**9):
            if time.monotonic() > end:
                return
            kind = KINDS[(number + turn) % len(KINDS)]
            begin = time.monotonic()
            try:
                answer = await http.post(f"/v1/{kind}", files=form(number + turn))
            except httpx.TransportError as error:
                client.statuses[type(error).__name__] += 1
                continue
            status = str(answer.status_code)
            if kind == "stream" and answer.is_success and "event: end" not in answer.text:
                status = "stream without end"
            client.statuses[status] += 1
            if status == "200":
                client.seconds[kind].append(time.monotonic() - begin)
            elif status in ("429", "503"):
                client.hintless += "retry-after" not in answer.headers
                await asyncio.sleep(float(answer.headers.get("retry-after", 1)))


def form(number: int) -> dict[str, tuple[str, bytes]]:
    """One of the demo's example pairs."""
    record = EXAMPLE_PAIRS[number % len(EXAMPLE_PAIRS)].record
    images = {"image_orig": record.image_orig, "image_recon": record.image_recon}
    return {name: (path.name, path.read_bytes()) for name, path in images.items()}


async def slow(url: str) -> None:
    """Sends an image byte by byte, again and again."""

    async def drops() -> AsyncIterator[bytes]:
        yield b'--x\r\ncontent-disposition: form-data; name="image_orig"; filename="a.png"\r\n\r\n'
        while True:
            yield b"\0"
            await asyncio.sleep(0.2)

    async with httpx.AsyncClient(timeout=120) as http:
        while True:
            with contextlib.suppress(httpx.TransportError):
                headers = {"content-type": "multipart/form-data; boundary=x"}
                await http.post(f"{url}/v1/infer", content=drops(), headers=headers)


async def leaving(url: str) -> None:
    """Asks, and leaves before there is an answer."""
    async with httpx.AsyncClient(timeout=0.02) as http:
        while True:
            with contextlib.suppress(httpx.TransportError):
                await http.post(f"{url}/v1/complete", files=form(0))
            await asyncio.sleep(0.5)


def megabytes(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def report(clients: list[Client], memory: list[tuple[float, float]], args: Args) -> None:
    """Prints what happened."""
    statuses = sum((c.statuses for c in clients), collections.Counter())
    done = [sum(map(len, c.seconds.values())) for c in clients]
    print(f"\n{args.clients} clients, {args.seconds:g} s: {sum(done) / args.seconds:.1f} answers/s")
    print("by status:", ", ".join(f"{k}: {v}" for k, v in sorted(statuses.items())))
    print(f"refusals without Retry-After: {sum(c.hintless for c in clients)}")
    print(f"answers per client: {min(done)} to {max(done)}")
    print("seconds per request    " + "  ".join(f"{_name(q):>6}" for q in QUANTILES))
    for kind in KINDS:
        seconds = [s for c in clients for s in c.seconds[kind]]
        print(f"  {kind:<20} {_quantiles(seconds)}")
    each = [[s for kind in KINDS for s in c.seconds[kind]] for c in clients]
    medians = [np.median(seconds) if seconds else np.inf for seconds in each]
    print(f"  luckiest client      {_quantiles(each[int(np.argmin(medians))])}")
    print(f"  unluckiest client    {_quantiles(each[int(np.argmax(medians))])}")
    print("memory in MB:", ", ".join(f"{t:.0f} s {mb:.0f}" for t, mb in memory))


def _name(quantile: float) -> str:
    return "most" if quantile == 1 else f"{quantile:.0%}"


def _quantiles(seconds: list[float]) -> str:
    if not seconds:
        return "  ".join(f"{'-':>6}" for _ in QUANTILES)
    return "  ".join(f"{np.quantile(seconds, q):6.2f}" for q in QUANTILES)


EXAMPLE_PAIRS = read_jobs(DEMO / EXAMPLES, ())

if __name__ == "__main__":
    main()
