"""What mkdocs shows beside `docs/`: the pages at the top of the repository, and one per module."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGES = ("htfa_jax", "weights_convert")
# The first page of the site is the README.
START = {"README.md": "index.md"}


def on_files(files: Files, config) -> Files:
    """Adds the pages."""
    for path in sorted(ROOT.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        files.append(File.generated(config, START.get(path.name, path.name), content=text))
    for module, _ in modules():
        page = f"# {module}\n\n::: {module}\n"
        files.append(File.generated(config, f"reference/{module}.md", content=page))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links that hold in the repository hold on the site; the reference lists its pages."""
    name = page.file.src_uri
    if name.startswith("reference/"):
        return markdown
    markdown = re.sub(r"\]\((?:\.\./|docs/)", "](", markdown).replace("](README.md", "](index.md")
    if name == "reference.md":
        rows = [f"| [{module}](reference/{module}.md) | {line} |" for module, line in modules()]
        markdown += "\n## All modules\n\n| module | what it does |\n| --- | --- |\n"
        markdown += "\n".join(rows) + "\n"
    return markdown


def modules() -> list[tuple[str, str]]:
    """(name, first line of its docstring) of every module that has one."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            parts = path.relative_to(ROOT).with_suffix("").parts
            if said and parts[-1] != "__main__":
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found.append((name, said.splitlines()[0].replace("|", "\\|")))
    return found
