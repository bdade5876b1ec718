"""What every command does around its work: log lines, errors as sentences, compiled programs."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from htfa_jax.config import Config
from htfa_jax.errors import HTFAError, TrainingError
from htfa_jax.logs import log_to_terminal


def command(main: Callable[[Sequence[str] | None], None]) -> Callable:
    """Wraps a `main(argv)`: an `HTFAError` is printed without a traceback.

    It exits with 2 if the user can mend the cause and with 1 if the run itself failed.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        with log_to_terminal():
            try:
                main(argv)
            except HTFAError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(1 if isinstance(error, TrainingError) else 2)

    return run


def available_processors() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_compilation_cache(config: Config) -> None:
    """Keeps compiled programs in the run's `data.cache_dir`, unless JAX was told another place."""
    import jax  # not by every command

    if jax.config.jax_compilation_cache_dir is None:
        folder = Path(config.data.cache_dir).expanduser() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Small programs too: a start compiles many.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
