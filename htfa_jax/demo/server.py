"""Page, API and gate as one application, and the server that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.networking import setup_tunnel
from PIL import Image
from starlette.routing import Mount

from htfa_jax.checkpoints.runs import DEMO
from htfa_jax.common.compiling import compiling
from htfa_jax.demo.api import add_api
from htfa_jax.demo.connections import connections
from htfa_jax.demo.files import Files, add_files
from htfa_jax.demo.gate import Gate, patterns
from htfa_jax.demo.guard import Guard
from htfa_jax.demo.serving import Serving
from htfa_jax.demo.sessions import Sessions
from htfa_jax.demo.ui import THEME, build_page, css
from htfa_jax.errors import ConfigError
from htfa_jax.inference.engine import HTFAInference
from htfa_jax.inference.options import ONE_PASS, Completion

if TYPE_CHECKING:
    from htfa_jax.demo.options import DemoArgs

log = logging.getLogger(__name__)

DESCRIPTION = "Answers questions about a partly occluded object, and completes its image."
LOOPBACK, EVERYWHERE = ("127.0.0.1", "localhost", "::1"), ("0.0.0.0", "::")
SWEEP = 30  # seconds between two searches for what is used no more
GRACE = 5  # seconds that running requests have when the server is stopped


def application(
    serving: Serving,
    model: str,
    private: Path,
    hosts: frozenset[str] | None,
    public: frozenset[str] = frozenset(),
    root_path: str = "",
) -> FastAPI:
    """Page and API behind the gate.

    Args:
      serving: the engine behind its queue.
      model: what the model is called.
      private: folder for what belongs to visitors of the page.
      hosts: names that the server is called by; None allows all.
      public: of these, the names of a proxy before it.
      root_path: the path under which a proxy offers it.

    Raises ConfigError for a name that cannot be.
    """
    if hosts is not None:
        patterns(hosts)  # here, not at the first request
    files = Files(private / "files", serving.limits)
    # Gradio keeps its copies of examples there too, and takes no path elsewhere from a visitor.
    os.environ["GRADIO_TEMP_DIR"] = str(files.root)
    sessions = Sessions(serving.limits.sessions, files)
    page = build_page(serving, model, files)
    # Only then does Gradio look at paths; it is set by launch(), which would run a server of its
    # own, with none of what stands before ours.
    page.has_launched = True

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(sweep(page, sessions, files))
        yield
        sweeping.cancel()

    app = FastAPI(
        title="htfa_jax",
        description=DESCRIPTION,
        version=version("htfa-jax"),
        # The usual pages of FastAPI load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    add_api(app, serving, model)
    add_files(app, files)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        max_file_size=serving.limits.upload_mb * 10**6,
        show_error=True,
        ssr_mode=False,
        root_path=root_path or None,
        theme=THEME,
        css=css(),
        # The page shows copies of them; nobody may name them.
        allowed_paths=[str(DEMO / "examples")],
    )
    (mount,) = (route for route in app.routes if isinstance(route, Mount))
    mount.app = Guard(mount.app, page, sessions, files)
    app.add_middleware(Gate, serving=serving, hosts=hosts, public=public)
    return app


async def sweep(page: gr.Blocks, sessions: Sessions, files: Files) -> None:
    """Deletes again and again what no open page uses."""
    while True:
        await asyncio.sleep(SWEEP)
        files.sweep()
        await sessions.sweep(page)
        for names in page.temp_file_sets:  # Gradio's lists of files; it deletes none here
            names.clear()


def serve(engine: HTFAInference, model: str, args: DemoArgs, private: Path) -> None:
    """Runs until it is stopped. Raises OSError if the address is taken, ConfigError for a name."""
    listener = listen(args.host, args.port)
    port = listener.getsockname()[1]
    hosts = {*LOOPBACK, args.host, *args.hosts}
    patterns(frozenset(hosts))  # before the model is compiled
    first, later = warm_up(engine, args.limits.batch)
    with compiling("what the first visitor needs"):
        first()
    with Serving(engine, args.limits, later) as serving:
        if args.share:
            public = share(args.host, port)
            hosts.add(public.removeprefix("https://"))
            log.info("for everybody who knows it: %s", public)
        known = None if args.host in EVERYWHERE and not args.hosts else frozenset(hosts)
        public_names = frozenset(args.hosts)
        app = application(serving, model, private, known, public_names, args.root_path)
        server = http_server(app, args)
        name = f"[{args.host}]" if ":" in args.host else args.host
        log.info("open http://%s:%d  (Ctrl-C stops it)", name, port)
        server.run(sockets=[listener])


def http_server(app: FastAPI, args: DemoArgs) -> uvicorn.Server:
    """What speaks HTTP for an application; it runs on a socket that it is given."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=connections(args.limits, bool(args.proxies)),
            ws="none",
            # Who may say for whom a request comes; by itself uvicorn believes this machine.
            proxy_headers=bool(args.proxies),
            forwarded_allow_ips=list(args.proxies),
            server_header=False,
            log_level="warning",
            timeout_graceful_shutdown=GRACE,
        )
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket at the address. Raises OSError that says what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error}; take another --port") from error
    return listener


def share(host: str, port: int) -> str:
    """A public address that leads here, through Gradio's servers. Raises ConfigError."""
    try:
        return setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # there are many ways to be without a network
        raise ConfigError(f"--share: Gradio's servers give no address: {error}") from error


def warm_up(
    engine: HTFAInference, batch: int
) -> tuple[Callable[[], object], list[Callable[[], object]]]:
    """Compiles what requests will need: for the page's first visitor, then for all others."""
    side = engine.config.image_size
    grey = Image.new("RGB", (side, side), "grey")
    pair = {"image_orig": grey, "image_recon": grey}
    sizes = [2**i for i in range(batch.bit_length())]

    def infer(rows: int, completion: Completion | None) -> None:
        engine.batch_infer([pair] * rows, batch_size=batch, completion=completion)

    later = [functools.partial(infer, n, c) for n in sizes for c in (None, ONE_PASS)]
    if engine.can_answer:
        later.insert(0, lambda: engine.chat(grey, grey).ask())
    return functools.partial(engine.infer, grey, grey, return_intermediates=True), later
