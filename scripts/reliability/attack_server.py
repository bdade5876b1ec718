"""Attacks a running demo server over HTTP, and says what got through.

    python -m htfa_jax.demo --demo &
    python scripts/reliability/attack_server.py http://127.0.0.1:7860

It reads files through every endpoint that the server lists, sends pages and images that are made
to do harm, opens many connections and says too little on them. Each attempt is `refused`,
`survived` (it was taken, and did no harm) or `GOT THROUGH`; with one of these the exit status is 1.
All that it sends is bounded. The server is another's unless it is on this machine: then
--i_own_this_server is needed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import ipaddress
import sys
from collections.abc import Callable, Iterator
from typing import Annotated
from urllib.parse import urlsplit

import httpx
import tyro
from attacks import connections, files, inputs, sessions
from attacks.target import Attempt, Target


@dataclasses.dataclass(frozen=True)
class Args:
    """Attacks a running demo server."""

    url: Annotated[str, tyro.conf.Positional]  # of the server
    i_own_this_server: bool = False  # that it is not on this machine, and may be attacked
    only: tuple[str, ...] = ()  # attacks by name; all by default
    seconds: float = 90.0  # that slow attacks wait for the server to end them
    upload_mb: int = 600  # that are sent at most to fill the disk
    image: str = "/usr/share/pixmaps/debian-logo.png"  # on the server, that is not a visitor's


Attack = Callable[[Target], Iterator[Attempt]]
ATTACKS: dict[str, Attack] = {
    "file_routes": files.file_routes,
    "events": files.events,
    "private_image": files.private_image,
    "other_endpoints": files.other_endpoints,
    "scripts": files.scripts,
    "component_functions": inputs.component_functions,
    "json": inputs.json_bodies,
    "numbers": inputs.numbers,
    "images": inputs.images,
    "headers": connections.headers,
    "forged_address": sessions.forged_address,
    "other_visitors": sessions.other_visitors,
    "unread_events": sessions.unread_events,
    "figures": sessions.figures,
    "dropped_streams": sessions.dropped_streams,
    "half_heads": connections.half_heads,
    "slow_bodies": connections.slow_bodies,
    "uploads": sessions.uploads,
}


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, description=__doc__, use_underscores=True)
    if not args.i_own_this_server and not is_loopback(args.url):
        sys.exit(f"{args.url} is not on this machine: --i_own_this_server if it is yours")
    unknown = set(args.only) - set(ATTACKS)
    if unknown:
        sys.exit(f"no attack is called {', '.join(unknown)}; there are {', '.join(ATTACKS)}")
    counts: collections.Counter[str] = collections.Counter()
    target = Target(args.url.rstrip("/"), args.seconds, args.upload_mb, args.image)
    for name in args.only or ATTACKS:
        for attempt in run(target, name):
            counts[attempt.outcome] += 1
            said = " ".join(attempt.detail.split())
            print(f"{attempt.outcome:12}{name}: {attempt.what}: {said}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    sys.exit(1 if counts["GOT THROUGH"] else 0)


def run(target: Target, name: str) -> Iterator[Attempt]:
    """An attack, and whether the server is there after it."""
    try:
        yield from ATTACKS[name](target)
    except (httpx.HTTPError, OSError) as error:
        yield Attempt(name, "GOT THROUGH", f"the server does not answer: {error!r}")
    yield target.health("the server afterwards")


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine and nowhere else."""
    with contextlib.suppress(ValueError):
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


if __name__ == "__main__":
    main()
