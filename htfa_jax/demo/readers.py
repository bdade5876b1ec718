"""Images are decoded in processes of their own, which can be killed when that takes too long."""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

START_SECONDS = 60  # in which a process must be there


class Readers:
    """A process for every thread that asks.

    Args:
      seconds: that one call may take.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._all: list[Reader] = []
        self._local = threading.local()

    @property
    def mine(self) -> Reader:
        """This thread's."""
        if not hasattr(self._local, "reader"):
            self._local.reader = Reader(self._seconds)
            self._all.append(self._local.reader)
        return self._local.reader

    def close(self) -> None:
        """Ends all of them; who waits for one gets EOFError."""
        for reader in self._all:
            reader.close()


class Reader:
    """Calls functions in a process of its own, one after the other.

    Args:
      seconds: that one call may take.
    """

    def __init__(self, seconds: float):
        self._seconds, self._closed = seconds, False
        self._process: Any = None
        self._pipe: Any = None

    def __call__(self, function: Callable, *args: Any) -> Any:
        """What `function` of a module gives, with arguments and result that can be pickled.

        Raises TimeoutError if it takes too long, EOFError if it ends the process, and what the
        function raises.
        """
        if self._process is None:
            self._start()
        try:
            self._pipe.send((function, args))
            if not self._pipe.poll(self._seconds):
                raise TimeoutError(
                    f"takes more than {self._seconds} s to decode: save it anew, or make it smaller"
                )
            result, error = self._pipe.recv()
        except (TimeoutError, EOFError, BrokenPipeError, ConnectionResetError) as failure:
            self._kill()
            if isinstance(failure, TimeoutError):
                raise
            # It has run out of memory, or worse.
            raise EOFError("cannot be decoded: it ends the program that tries") from None
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """Ends the process for good, from whatever thread."""
        self._closed = True
        if self._process is not None:
            self._process.kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._process = None

    def _start(self) -> None:
        if self._closed:
            raise EOFError("cannot be decoded: the server is going down")
        # Not forked: this process has threads that hold locks.
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), name="reader", daemon=True)
        self._process.start()
        other.close()
        # Its imports do not count as decoding.
        if not self._pipe.poll(START_SECONDS):
            self._kill()
            raise RuntimeError("no process can be started to decode images")
        self._pipe.recv()


def _serve(pipe: Connection) -> None:
    # What is called loads it: not in the time of the first call.
    importlib.import_module("htfa_jax.demo.images")
    # Ctrl-C reaches the whole group; the server ends this process itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    pipe.send("ready")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the server is gone
            return
        try:
            pipe.send((function(*args), None))
        except Exception as error:
            pipe.send((None, error))
