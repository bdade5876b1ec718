"""Opens a page where one can try a model, and an HTTP API beside it.

    python -m htfa_jax.demo
    python -m htfa_jax.demo --checkpoint runs/a --port 8000
    python -m htfa_jax.demo --demo --limits.queue 16

Without --checkpoint it is the newest run under runs/, and the small trained model of this package
where there is none, or with --demo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from htfa_jax.commands import command, parse, use_compilation_cache
from htfa_jax.config_io import load_config
from htfa_jax.demo.limits import Limits
from htfa_jax.errors import CheckpointError, ConfigError
from htfa_jax.infer import DEMO
from htfa_jax.options import Quantize
from htfa_jax.runs import find_run

log = logging.getLogger("htfa_jax.demo")  # by name: this module is run as __main__

RUNS = Path("runs")
TRAIN = "python -m htfa_jax.train --config configs/debug.py"


@dataclasses.dataclass(frozen=True)
class DemoArgs:
    """Options of the command."""

    checkpoint: Path | None = None  # a run, RUN/checkpoints/STEP, an exported run or its hub id
    demo: bool = False  # this package's small model
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets other machines in
    port: int = 7860
    hosts: tuple[str, ...] = ()  # names the server is called by, besides those of this machine
    share: bool = False  # a public address through Gradio's servers, for 72 hours
    limits: Limits = Limits()
    device: str | None = None  # "cpu", "gpu" or "tpu" (default: JAX's choice)
    quantize: Quantize | None = None  # keep the decoder's weights in 8 bits
    revision: str | None = None  # of a hub repository: branch, tag or commit


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(DemoArgs, argv, __doc__)
    open_page(args, choose(args))


def open_page(args: DemoArgs, checkpoint: Path) -> None:
    """Runs until it is stopped. Raises ConfigError without Gradio, OSError for a taken address."""
    from htfa_jax.signals import StopSignal

    # Either signal ends it; all is put away.
    with private_folder() as folder, contextlib.suppress(KeyboardInterrupt), StopSignal():
        try:
            from htfa_jax.demo.server import serve
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the page needs the package {error.name}: pip install 'htfa-jax[demo]'"
            ) from error
        from htfa_jax.inference import HTFAInference

        workdir, step = find_run(checkpoint, args.revision)
        use_compilation_cache(load_config(workdir))
        engine = HTFAInference(
            workdir if step is None else checkpoint, device=args.device, quantize=args.quantize
        )
        serve(engine, name_of(workdir), args, folder)


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """The place of all that visitors send: nobody else may read it, and it goes in the end."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="htfa_demo_", ignore_cleanup_errors=True) as folder:
        # Gradio reads these when it is loaded.
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before


def choose(args: DemoArgs, runs: Path = RUNS) -> Path:
    """The model: the one that was named, else the newest run, else the small one. It says which."""
    if args.demo and args.checkpoint is not None:
        raise ConfigError("--demo brings its own model: leave --checkpoint out")
    if args.checkpoint is not None:
        return args.checkpoint
    newest = None if args.demo else newest_run(runs)
    if newest is not None:
        log.info("the newest run, %s; another: --checkpoint RUN, the small model: --demo", newest)
        return newest
    log.info("the small model of this package; to train one of your own (13 minutes): %s", TRAIN)
    return DEMO


def newest_run(runs: Path) -> Path | None:
    """The run whose newest checkpoint is the youngest; None if there is none."""
    found = []
    for folder in runs.iterdir() if runs.is_dir() else ():
        try:
            workdir, _ = find_run(folder)
        except CheckpointError:
            continue
        # A run that has only begun has no checkpoint yet.
        steps = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
        weights = steps or list(workdir.glob("model.safetensors"))
        if weights:
            found.append((max(path.stat().st_mtime for path in weights), workdir))
    return max(found)[1] if found else None


def name_of(workdir: Path) -> str:
    """How the page calls a model."""
    return "the small demo model" if workdir == DEMO else workdir.resolve().name


if __name__ == "__main__":
    main()
