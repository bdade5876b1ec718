"""Several processes, one run: how they find each other, and what only the first one does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from htfa_jax.errors import ConfigError

# How launchers tell the number of tasks that they started.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Distributed:
    """How this process finds the other ones of a run on several hosts."""

    auto: bool = False  # ask SLURM, Open MPI, GKE or the TPU pod
    coordinator: str | None = None  # HOST:PORT of process 0, if nothing else knows it
    num_processes: int | None = None  # with coordinator: how many there are
    process_id: int | None = None  # with coordinator: which of them this is

    def connect(self) -> None:
        """Waits for the other processes; must run before anything asks for devices.

        Raises ConfigError if flags are missing, or if a launcher started several processes and
        nothing says that they belong together.
        """
        given = (self.coordinator, self.num_processes, self.process_id)
        if self.auto or None not in given:
            import jax  # not by commands that only show their options

            try:
                jax.distributed.initialize(*given)
            except (ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"the processes of this run did not find each other: {error}. Outside of "
                    "SLURM, Open MPI, GKE and TPU pods give --distributed.coordinator, "
                    "--distributed.num_processes and --distributed.process_id"
                ) from error
        elif given != (None, None, None):
            raise ConfigError(
                "--distributed.coordinator, --distributed.num_processes and "
                "--distributed.process_id belong together: give all three"
            )
        else:
            for name in _TASKS:
                if int(os.environ.get(name, 1)) > 1:
                    raise ConfigError(
                        f"{name}={os.environ[name]} processes were started, each of which would "
                        "train a model of its own: add --distributed.auto"
                    )


def is_first() -> bool:
    """Whether this process writes and talks for all."""
    import jax

    return jax.process_index() == 0


@contextlib.contextmanager
def first_goes_ahead(name: str) -> Iterator[None]:
    """The body runs in process 0 before it runs in the others, which may find its files there."""
    import jax
    from jax.experimental import multihost_utils

    if not is_first():
        multihost_utils.sync_global_devices(name)
    try:
        yield
    finally:
        if is_first() and jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)
