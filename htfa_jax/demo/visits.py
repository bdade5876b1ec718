"""What belongs to each open page; it goes when the page does, or when too many came after it."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

from htfa_jax.chat import Chat
from htfa_jax.pairs import Scene
from htfa_jax.results import Result


@dataclasses.dataclass
class Visit:
    """What one open page looks at.

    Attributes:
      folder: for its downloads.
      looked_at: what pictures and options `scene` and `result` are of.
      scene: the pair, read.
      result: of the look.
      chat: about the pair; begins with the first question.
      talking: while an answer is given.
      drawn: whether the page shows the figures of `result`.
      said: question, answer and confidence, one after the other.
      uploads: files that the page sent.
    """

    folder: Path
    looked_at: Any = None
    scene: Scene | None = None
    result: Result | None = None
    chat: Chat | None = None
    talking: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    drawn: bool = False
    said: list[tuple[str, str, float | None]] = dataclasses.field(default_factory=list)
    uploads: set[Path] = dataclasses.field(default_factory=set)


class Visits:
    """The visits of all open pages, the one that was idle for longest first.

    Args:
      private: folder in which each gets its own.
      most: how many are remembered.
    """

    def __init__(self, private: Path, most: int):
        self._private, self._most = private, most
        self._visits: collections.OrderedDict[str, Visit] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._visits)

    def of(self, session: str) -> Visit:
        """A page's visit, a new one if it is not known (any more)."""
        if session not in self._visits:
            folder = Path(tempfile.mkdtemp(prefix="visit_", dir=self._private))
            self._visits[session] = Visit(folder)
        self._visits.move_to_end(session)
        while len(self._visits) > self._most:
            self.end(next(iter(self._visits)))
        return self._visits[session]

    def end(self, session: str) -> None:
        """Forgets a page and deletes what belongs to it."""
        visit = self._visits.pop(session, None)
        if visit is None:
            return
        shutil.rmtree(visit.folder, ignore_errors=True)
        # Gradio keeps an upload under its content: another page may have sent the same.
        for path in visit.uploads.difference(*(v.uploads for v in self._visits.values())):
            if self._private in path.parents:  # examples are elsewhere
                path.unlink(missing_ok=True)
