"""How much is taken from callers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from htfa_jax.errors import ConfigError, DataError
from htfa_jax.inference.options import Quantize


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is taken from callers; more is refused with a sentence."""

    connections: int = 512  # that are open at a time
    connections_per_client: int = 128  # of these, from one address
    header_seconds: int = 10  # in which the head of a request must have come
    queue: int = 64  # requests that wait
    per_client: int = 32  # of these, from one address
    batch: int = 4  # requests that are worked on together
    streams: int = 8  # answers that are streamed at a time
    upload_mb: int = 20  # of a request, all images together
    upload_seconds: int = 60  # in which it must have come
    megapixels: int = 16  # of an image
    decode_seconds: int = 10  # in which an image must be decoded
    question: int = 1000  # characters
    questions: int = 8  # about one pair
    max_new_tokens: int = 256  # of an answer
    sessions: int = 32  # pages that are open at a time
    kept_files: int = 512  # uploads of all pages that are kept
    kept_mb: int = 500  # their size together

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ConfigError(f"--limits.{name}={value} must be at least 1")

    def check_questions(self, questions: Sequence[str]) -> None:
        """Raises DataError for too many of them, for an empty one, or one that is too long."""
        if not 1 <= len(questions) <= self.questions:
            raise DataError(f"{len(questions)} questions: expected 1 to {self.questions}")
        for question in questions:
            if not question.strip():
                raise DataError("a question is empty: ask something")
            if len(question) > self.question:
                raise DataError(
                    f"a question has {len(question)} characters, more than {self.question}: "
                    "make it shorter"
                )


@dataclasses.dataclass(frozen=True)
class DemoArgs:
    """Options of the command."""

    checkpoint: Path | None = None  # a run, RUN/checkpoints/STEP, an exported run or its hub id
    demo: bool = False  # this package's small model
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets other machines in
    port: int = 7860
    hosts: tuple[str, ...] = ()  # names the server is called by, besides those of this machine
    root_path: str = ""  # under which a proxy offers it, as /htfa for https://example.org/htfa
    proxies: tuple[str, ...] = ()  # addresses of proxies before it whose X-Forwarded-For counts
    share: bool = False  # a public address through Gradio's servers, for 72 hours
    limits: Limits = Limits()
    device: str | None = None  # "cpu", "gpu" or "tpu" (default: JAX's choice)
    quantize: Quantize | None = None  # keep the decoder's weights in 8 bits
    revision: str | None = None  # of a hub repository: branch, tag or commit

    def __post_init__(self) -> None:
        path = self.root_path
        if path and (path[0] != "/" or path[-1] == "/" or path.strip() != path or "//" in path):
            raise ConfigError(f"--root_path {path!r}: expected a path such as /htfa")
