"""What every command does around its work: log lines, and errors as sentences."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

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
