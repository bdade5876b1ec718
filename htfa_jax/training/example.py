"""A pair of a run's data beside its weights, and a script that asks the run about it."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from htfa_jax.common.files import write_whole
from htfa_jax.config import DataConfig
from htfa_jax.data.records import Dataset, Record
from htfa_jax.data.storage import StoredImage
from htfa_jax.errors import DataError
from htfa_jax.inference.inputs import FIELDS

log = logging.getLogger(__name__)

SCRIPT, EXAMPLE = "infer.sh", "example"


def write_example(workdir: Path, data: DataConfig, records: Dataset) -> None:
    """Puts a pair of the data and `infer.sh`, which looks at it, into a run's workdir.

    Without any if the data cannot be read any more: the run is finished all the same.
    """
    try:
        _write_example(workdir, data, records)
    except (DataError, OSError) as error:
        log.warning("no %s was written: %s", SCRIPT, error)


def _write_example(workdir: Path, data: DataConfig, records: Dataset) -> None:
    record = next((r for r in _readable(records)), None)
    if record is None:
        return
    folder = workdir / EXAMPLE
    folder.mkdir(exist_ok=True)
    argv = ["--checkpoint", ".", "--output_dir", f"{EXAMPLE}/out"]
    for field in FIELDS:
        value = getattr(record, field)
        if isinstance(value, Path | StoredImage):
            name = f"{EXAMPLE}/{field}{value.suffix}"
            write_whole(workdir / name, value.read_bytes())
            argv += [f"--{field}", name]
        elif value is not None:
            argv += [f"--{field}", *map(str, value)]
    questions = [turn.text for turn in record.turns if turn.role == "user"]
    argv += ["--query", *dict.fromkeys(questions or [data.default_query])]
    script = workdir / SCRIPT
    write_whole(
        script,
        "#!/bin/sh\n"
        "# Asks this run about a pair of its data; more options behind it are passed on.\n"
        'cd "$(dirname "$0")" || exit\n'
        # -P: no module is taken from the run's folder.
        f'exec "${{PYTHON:-{sys.executable}}}" -P -m htfa_jax.infer {shlex.join(argv)} "$@"\n',
    )
    script.chmod(0o755)


def _readable(records: Dataset) -> Iterator[Record]:
    for i in range(len(records)):
        try:
            record = records[i]
        except DataError:
            continue
        paths = [getattr(record, field) for field in FIELDS[:4]]
        if all(path is None or path.is_file() for path in paths):
            yield record
