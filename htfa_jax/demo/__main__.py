"""Opens a page where one can try a model, and an HTTP API beside it.

    python -m htfa_jax.demo
    python -m htfa_jax.demo --checkpoint runs/a --port 8000
    python -m htfa_jax.demo --demo --limits.queue 16

Without --checkpoint it is the newest run under runs/, and the small trained model of this package
where there is none, or with --demo.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from htfa_jax.checkpoints.runs import DEMO, find_run
from htfa_jax.common.cli import command, parse, use_compilation_cache
from htfa_jax.demo.options import DemoArgs
from htfa_jax.errors import CheckpointError, ConfigError

log = logging.getLogger("htfa_jax.demo")  # by name: this module is run as __main__
RUNS = Path("runs")
TRAIN = "python -m htfa_jax.train --config configs/debug.py"


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(DemoArgs, argv, __doc__)
    open_page(args, choose_checkpoint(args))


def open_page(args: DemoArgs, checkpoint: Path) -> None:
    """Runs until it is stopped. Raises ConfigError without Gradio, OSError for a taken address."""
    from htfa_jax.common.signals import StopSignal

    # Either signal ends it; all is put away.
    with private_folder() as folder, contextlib.suppress(KeyboardInterrupt), StopSignal():
        try:
            from htfa_jax.demo.server import serve
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the page needs the package {error.name}: pip install 'htfa-jax[demo]'"
            ) from error
        from htfa_jax.inference.engine import HTFAInference

        workdir, step = find_run(checkpoint, args.revision)
        use_compilation_cache()
        engine = HTFAInference(
            workdir if step is None else checkpoint, device=args.device, quantize=args.quantize
        )
        serve(engine, display_name(workdir), args, folder)


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """The place of all that visitors send: nobody else may read it, and it goes in the end."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="htfa_demo_", ignore_cleanup_errors=True) as folder:
        # Gradio reads these when it is loaded.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "files")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before


def choose_checkpoint(args: DemoArgs, runs: Path = RUNS) -> Path:
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


def display_name(workdir: Path) -> str:
    """How the page calls a model."""
    return "the small demo model" if workdir == DEMO else workdir.resolve().name


if __name__ == "__main__":
    main()
