"""Packs what a run needs into one folder, for a GPU machine that reaches no package registry.

    python scripts/pack.py --out packed --there installed.txt --python 3.12
    packed/measure.sh standard            # there, where installed.txt is what `pip freeze` says

The folder gets the package, the configurations, the scripts, and as wheels the dependencies that
`installed.txt` does not name. `measure.sh NAME` installs the wheels beside the package on first
use, and takes one of its measurements (`scripts/measure.sh` lists them).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

from htfa_jax.common.cli import command, parse
from htfa_jax.common.files import whole_folder
from htfa_jax.errors import ConfigError

ROOT = Path(__file__).parent.parent
IGNORED = shutil.ignore_patterns("__pycache__")
PARTS = ("htfa_jax", "weights_convert", "configs", "scripts")
# pip takes a platform by its exact name, so all are named that a current Linux can run.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


# The oldest that this was tried with.
OLDEST_PIP = Version("25.3")


@dataclasses.dataclass(frozen=True)
class PackArgs:
    """Packs the package, its scripts and the wheels that another machine lacks."""

    out: Path  # a new folder
    there: Path | None = None  # what `pip freeze` says there (None: nothing is installed)
    python: str = "3.12"  # version of Python there
    also: tuple[str, ...] = ()  # more requirements, as in "torch>=2.6"


def installed(path: Path | None) -> dict[str, Version | None]:
    """Versions of packages by name, None where the file names a package alone."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path else ():
        if match := re.match(r"([A-Za-z0-9][\w.-]*)\s*(?:==\s*([^\s;]+))?", line.strip()):
            name, version = match.groups()
            found[canonicalize_name(name)] = Version(version) if version else None
    return found


def pip(*arguments: str, python: str) -> None:
    """Runs pip for another machine. Raises ConfigError with what it says if it fails."""
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    target += [f"--platform={platform}" for platform in PLATFORMS]
    asked = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, *target], capture_output=True, text=True
    )
    if asked.returncode:
        raise ConfigError(
            f"pip cannot resolve the dependencies for Python {python} with what is there:\n"
            f"{asked.stderr.strip()[-1500:]}\nTake a package out of --there to bring another along"
            f"{_advice()}"
        )


def _advice() -> str:
    """What an older pip is told: it knows fewer options and platforms."""
    there = Version(importlib.metadata.version("pip"))
    if there >= OLDEST_PIP:
        return ""
    return (
        f". This pip is {there}, and {OLDEST_PIP} or newer is needed to resolve for another "
        f"Python: {sys.executable} -m pip install --upgrade pip"
    )


def missing(
    requirements: Sequence[str], there: dict[str, Version | None], python: str
) -> list[str]:
    """What the requirements need and is not there, as NAME==VERSION."""
    with tempfile.TemporaryDirectory() as folder:
        report, pins = Path(folder) / "report.json", Path(folder) / "pins.txt"
        pins.write_text("".join(f"{name}=={v}\n" for name, v in there.items() if v))
        options = ["--dry-run", "--quiet", "--ignore-installed", f"--target={folder}/target"]
        options += [f"--report={report}", f"--constraint={pins}"]
        pip("install", *options, *requirements, python=python)
        chosen = [x["metadata"] for x in json.loads(report.read_text())["install"]]
    return [
        f"{x['name']}=={x['version']}" for x in chosen if canonicalize_name(x["name"]) not in there
    ]


def pack(args: PackArgs) -> list[str]:
    """Writes the folder; returns the wheels that it took along.

    Raises ConfigError if the folder exists, or no versions fit what is there.
    """
    if args.out.exists():
        raise ConfigError(f"{args.out} exists: choose a new folder for --out")
    with (ROOT / "pyproject.toml").open("rb") as file:
        requirements = [*tomllib.load(file)["project"]["dependencies"], *args.also]
    wanted = missing(requirements, installed(args.there), args.python)
    with whole_folder(args.out, ConfigError) as partial:
        for part in PARTS:
            shutil.copytree(ROOT / part, partial / part, ignore=IGNORED)
        shutil.copy(ROOT / "pyproject.toml", partial)
        shutil.copy(ROOT / "scripts" / "measure.sh", partial)
        wheels = partial / "wheels"
        wheels.mkdir()
        if wanted:
            pip("download", "--quiet", "--no-deps", f"--dest={wheels}", *wanted, python=args.python)
        return sorted(path.name for path in wheels.iterdir())


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(PackArgs, argv, __doc__)
    wheels = pack(args)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB with {len(wheels)} wheels")
    print("\n".join(wheels))


if __name__ == "__main__":
    main()
