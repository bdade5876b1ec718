"""The field's words: what documents, source, messages and `--help` no longer say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# (what must not stand anywhere, what the field says)
UNMISTAKABLE = [
    (r"words/s\b|words a second|new[ _]words", "tokens/s, new tokens"),
    (r"matrix[- ]products?", "matmul"),
    (r"pictures?|\bPictures?", "image"),
    (r"hidden[ _]share", "occlusion ratio"),
    (r"both[ _]right", "joint accuracy"),
    (r"compute[ _]copy", "compute-dtype parameters"),
    (r"micro[-_ ]?steps?|micro[-_ ]?batch", "gradient accumulation steps"),
    (r"stop[ _]texts?", "stop sequence"),
    (r"text[ _]head", "LM head"),
    (r"datasheet.{0,12}promise|promise.{0,24}datasheet", "MFU, of the datasheet's peak"),
]
# Where an old name has to stand, because something is read by it.
EXCEPTIONS = {
    "htfa_jax/config/renamed.py",
    "htfa_jax/look_inside.py",
    "tests/config/test_renamed.py",
    "tests/project/test_words.py",
}
ALLOWED = [
    'TEXT, IMAGES = "record", "pictures"',
    "`pictures`, what the image files",
    # Names in files of the PyTorch original and of Gradio.
    "clear_pictures",
]
LISTED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
).stdout.split()
SUFFIXES = (".py", ".md", ".css", ".jinja", ".sh", ".toml", ".yml", ".svg")


def texts():
    """Files with words in them; of a packed copy without git, all below the package folders."""
    names = LISTED or [
        str(p.relative_to(ROOT))
        for folder in ("htfa_jax", "weights_convert", "configs", "scripts", "tests", "docs")
        for p in (ROOT / folder).rglob("*")
    ]
    return [name for name in names if name.endswith(SUFFIXES) and name not in EXCEPTIONS]


@pytest.mark.parametrize(("pattern", "instead"), UNMISTAKABLE, ids=[i for _, i in UNMISTAKABLE])
def test_no_file_says_it(pattern, instead):
    found = []
    for name in texts():
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").split("\n"), 1):
            for allowed in ALLOWED:
                line = line.replace(allowed, "")
            if re.search(pattern, line):
                found.append(f"{name}:{number}: {line.strip()[:90]}")
    assert not found, f"say {instead}:\n" + "\n".join(found)


def test_figures_have_a_leading_zero():
    found = []
    for name in texts():
        if name.endswith(".md"):
            text = (ROOT / name).read_text(encoding="utf-8")
            text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
            found += [f"{name}: {m[0]}" for m in re.finditer(r"(?:(?<=[\s(|])|^)\.\d+\b", text)]
    assert not found, found


def test_help_is_written_from_these_files():
    """What `--help` prints stands in the source: one command shows that nothing else is added."""
    done = subprocess.run(
        [sys.executable, "-m", "htfa_jax.infer", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    for pattern, instead in UNMISTAKABLE:
        assert not re.search(pattern, done.stdout), f"say {instead}"
