"""What every command does around its work: log lines, errors as sentences, compiled programs."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from htfa_jax.common.logs import log_to_terminal
from htfa_jax.errors import HTFAError, TrainingError

Args = TypeVar("Args")


def command(main: Callable[[Sequence[str] | None], None]) -> Callable:
    """Wraps a `main(argv)`: expected errors are printed as sentences, without a traceback.

    It exits with 2 if the user can mend the cause in the command, and with 1 if the run itself or
    its machine failed (`OSError`, a full disk for example). `--debug` shows the traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        argv = list(sys.argv[1:] if argv is None else argv)
        debug = "--debug" in argv
        with log_to_terminal():
            try:
                main([arg for arg in argv if arg != "--debug"])
            except (HTFAError, OSError) as error:
                if debug:
                    traceback.print_exc()
                print(f"error: {error}", file=sys.stderr)
                user = isinstance(error, HTFAError) and not isinstance(error, TrainingError)
                sys.exit(2 if user else 1)
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
                sys.exit(130)

    return run


def program() -> str:
    """How this process's command is called: `python -m htfa_jax.train`, or by a script's name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def parse(
    cls: type[Args], argv: Sequence[str] | None, description: str | None = None, **more: Any
) -> Args:
    """A command line as a dataclass, its fields as flags. Ends the process if it is wrong.

    Args:
      cls: of the options.
      argv: arguments, those of the process by default.
      description: what `--help` begins with, examples included.
      **more: what else `tyro.cli` takes.
    """
    return tyro.cli(
        cls, args=argv, prog=program(), description=description, use_underscores=True, **more
    )


def available_processors() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_compilation_cache(cache_dir: str) -> None:
    """Keeps compiled programs under a run's `data.cache_dir`, unless JAX was told another place."""
    import jax  # not by every command

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = Path(cache_dir).expanduser() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Small programs too: a start compiles many.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
