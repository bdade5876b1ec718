"""What every command does around its work: log lines, errors as sentences, compiled programs."""

from __future__ import annotations

import functools
import io
import logging
import os
import stat
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from htfa_jax.common.files import disk_advice
from htfa_jax.common.logs import log_to_terminal
from htfa_jax.errors import HTFAError, TrainingError

Args = TypeVar("Args")

# Where compiled programs are kept. No configuration moves it: JAX runs what it finds there.
COMPILED = "~/.cache/htfa_jax/compiled"

# Of every command, and of no dataclass of options.
DEBUG = "--debug shows the traceback of an error."

log = logging.getLogger("htfa_jax.compiled")


def command(main: Callable[[Sequence[str] | None], None]) -> Callable:
    """Wraps a `main(argv)`: expected errors are printed as sentences, without a traceback.

    It exits with 2 if the user can mend the cause in the command, and with 1 if the run itself or
    its machine failed (`OSError`, a full disk for example). `--debug` shows the traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        argv = list(sys.argv[1:] if argv is None else argv)
        debug = "--debug" in argv
        escape_what_the_terminal_lacks()
        with log_to_terminal():
            try:
                main([arg for arg in argv if arg != "--debug"])
            except (HTFAError, OSError) as error:
                if debug:
                    traceback.print_exc()
                print(f"error: {sentence(error)}", file=sys.stderr)
                user = isinstance(error, HTFAError) and not isinstance(error, TrainingError)
                sys.exit(2 if user else 1)
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
                sys.exit(130)

    return run


def sentence(error: Exception) -> str:
    """An error as the command says it: of the system's, which file it is and what to do."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error)
    reason = error.strerror or type(error).__name__
    if advice := disk_advice(error):
        return f"{error.filename} cannot be written: {reason}: {advice}"
    other = f" -> {error.filename2}" if error.filename2 else ""
    return f"{error.filename}{other}: {reason}"


def escape_what_the_terminal_lacks() -> None:
    """Lets characters that the terminal's encoding lacks be escaped: no answer ends a command.

    A pipe or an old terminal may be Latin-1 or ASCII; printing other characters would raise.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


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
    if description is not None:
        description = f"{description.rstrip()}\n\n{DEBUG}"
    return tyro.cli(
        cls, args=argv, prog=program(), description=description, use_underscores=True, **more
    )


def available_processors() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_compilation_cache() -> None:
    """Keeps compiled programs in a folder of this account, unless JAX was told another place.

    That is what `JAX_COMPILATION_CACHE_DIR` does. Without a folder that nobody else can write to,
    every process compiles anew, and a warning says why.
    """
    import jax  # not by every command

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    folder = Path(COMPILED).expanduser()
    if (problem := _not_private(folder)) is not None:
        log.warning("compiled programs are not kept: %s", problem)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs too: a start compiles many.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _not_private(folder: Path) -> str | None:
    """Why a folder may hold what somebody else wrote; None if it is this account's alone.

    It is made if it is not there. One that others could only read is closed to them.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISLNK(found.st_mode):
            return f"{folder} is a link: delete it, or name its target in JAX_COMPILATION_CACHE_DIR"
        if found.st_uid != os.geteuid():
            return f"{folder} belongs to another account: set JAX_COMPILATION_CACHE_DIR to your own"
        if found.st_mode & 0o022:
            return (
                f"others can write to {folder}, and JAX would run what they put there: delete it, "
                "and it is made again for this account alone"
            )
        if found.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        return f"{folder} cannot be made: {error}"
    return None
