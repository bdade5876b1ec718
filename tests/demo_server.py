"""The page's server in a process of its own, with the demo model."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


@contextlib.contextmanager
def demo_server(limits, stops_in=60, **environment):
    """Its URL, once it answers. Afterwards SIGTERM ends it.

    Args:
      limits: `--limits.NAME` by name.
      stops_in: seconds that it has to end.
      **environment: variables besides those that are set.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "htfa_jax.demo", "--demo", "--port", str(port)]
    for name, value in limits.items():
        command += [f"--limits.{name}", str(value)]
    process = subprocess.Popen(
        command,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        cwd=Path(__file__).parents[1],
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, "the server did not start"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/healthz").read()
                break
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(stops_in)
