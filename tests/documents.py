"""The project's documents, taken apart: fenced blocks, commands, links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# `<!-- not run: REASON -->` right above a block.
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
      page: where it is.
      line: number of its first line.
      language: behind the fence.
      text: what is inside.
      not_run: why it is not run; None if it is.
    """

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found, inside, before = [], None, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.fullmatch(r"\s*```(\w*)\s*", line)
        if fence and inside is None:
            reason = NOT_RUN.fullmatch(before)
            inside = (number + 1, fence[1], [], reason and reason[1])
        elif fence:
            start, language, lines, reason = inside
            found.append(Block(page, start, language, "\n".join(lines) + "\n", reason))
            inside = None
        elif inside is not None:
            inside[2].append(line)
        if line.strip():
            before = line.strip()
    assert inside is None, f"{page}: a block is not closed"
    return found


def commands(block: Block) -> list[list[str]]:
    """The commands of a bash block as words, those that && joins apart."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                found.append(words)
                words = []
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"(?ms)^\s*```.*?^\s*```\s*$", "", page.read_text(encoding="utf-8"))


def rows(page: Path) -> list[list[str]]:
    """Cells of all lines of a page's tables, titles and rules left out."""
    lines = [x for x in prose(page).splitlines() if x.startswith("|")]
    cells = [[c.strip() for c in x.strip("|").split(" | ")] for x in lines]
    rules = {i for i, row in enumerate(cells) if set("".join(row)) <= set("-| ")}
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]
