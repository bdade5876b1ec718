"""A run as a folder to share: weights, configuration, tokenizer, metrics and a model card."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from htfa_jax.checkpoints import weights
from htfa_jax.checkpoints.loading import load_run
from htfa_jax.checkpoints.runs import (
    MODEL,
    find_run,
    is_export,
    refuse_links,
    written_config,
)
from htfa_jax.common.files import whole_folder, write_whole
from htfa_jax.common.json_files import parse_json, read_json
from htfa_jax.config import Config, override
from htfa_jax.config.io import save_config
from htfa_jax.config.places import with_last_names
from htfa_jax.config.renamed import current_scores
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.errors import CheckpointError, ConfigError
from htfa_jax.inference.model_card import check_scores, model_card
from htfa_jax.inference.options import ExportDType
from htfa_jax.models.factory import FLOAT32_PARAMS, build_model

log = logging.getLogger(__name__)

# What an evaluation leaves: all scores, and the same as a text table.
METRICS, TABLE = "metrics.json", "table.txt"
# What a tokenizer's settings may say about the machine it was saved on.
TOKENIZER_PLACES = ("name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file")


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    dtype: ExportDType = "bfloat16",
    license: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes an exported run (see `runs`), whole or not at all.

    Args:
      run: a run or one of its checkpoints.
      out: the folder to write.
      dtype: of the weights. What the run itself keeps in 16 bits stays so; the codebook and
        Level 1 stay in float32.
      license: as the hub names it, such as "mit"; the card says if there is none.
      overwrite: whether an exported run that is there already is replaced.

    Returns:
      The folder.

    Raises:
      CheckpointError: no such run, or `out` is there.
      ConfigError: a licence that is no name.
    """
    out = Path(out).expanduser()
    if out.exists() and not (overwrite and is_export(out)):
        how = "it is no exported run, and stays" if overwrite else "--overwrite replaces it"
        raise CheckpointError(f"{out} exists: {how}; or name another folder")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ConfigError(
            f"--license {license!r} is no name of a licence: expected one as the hub writes it, "
            'such as "mit", "apache-2.0" or "other"'
        )
    refuse_links(find_run(run)[0])  # or what they lead to would be shared
    _, params, step, folder = load_run(run, lambda c: build_model(c).shapes)
    config = portable(written_config(folder))
    scores = evaluations(folder, step)
    kinds = {
        path: (tuple(value.shape), stored_dtype(path, value.dtype, dtype))
        for path, value in params.items()
    }
    with whole_folder(out, CheckpointError) as partial:
        writer = weights.WeightWriter(partial / MODEL, kinds, {"step": str(step)})
        for path, (_, kind) in kinds.items():
            writer.write(path, None, np.asarray(params[path]).astype(kind))
        writer.close()
        save_config(config, partial / "config.json")
        save_tokenizer(folder / "tokenizer", partial / "tokenizer")
        for split, files in scores.items():
            (partial / "evaluation" / split).mkdir(parents=True)
            for name, text in files.items():
                write_whole(partial / "evaluation" / split / name, text)
        shapes = {path: shape for path, (shape, _) in kinds.items()}
        test = scores.get("test", {})
        measured = None
        if test:
            measured = parse_json(test[METRICS], METRICS, CheckpointError, allow_nan=True)
            measured = current_scores(measured)
        card = model_card(out.name, config, step, shapes, dtype, measured, test.get(TABLE), license)
        write_whole(partial / "README.md", card)
    return out


def stored_dtype(path: str, dtype: Any, wanted: ExportDType) -> np.dtype:
    """What a weight is stored as: `wanted`, unless the run's own type is narrower."""
    if re.fullmatch(FLOAT32_PARAMS, path):
        return np.dtype(np.float32)
    return min(np.dtype(dtype), jnp.dtype(wanted), key=lambda kind: kind.itemsize)


def portable(config: Config) -> Config:
    """The configuration without places on the machine of the run."""
    return override(with_last_names(config), {"data.recon_template": None})


def save_tokenizer(source: Path, folder: Path) -> None:
    """Copies a run's tokenizer, but for what it says about its machine."""
    ChatTokenizer(source).save(folder)
    path = folder / "tokenizer_config.json"
    settings = read_json(path, CheckpointError, allow_nan=True)
    weights.write_json(path, {k: v for k, v in settings.items() if k not in TOKENIZER_PLACES})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def evaluations(folder: Path, step: int) -> dict[str, dict[str, str]]:
    """{split: {file: text}} of a run's evaluations; those of another step are left out, and named.

    An export that an earlier version wrote has the metrics without a table of them.
    """
    found: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob(f"evaluation/*/{METRICS}")):
        scores = read_json(path, CheckpointError, allow_nan=True)
        if (evaluated := scores.get("step")) == step:
            files = [file for file in (path, path.with_name(TABLE)) if file.is_file()]
            check_scores(current_scores(scores), str(path))
            found[path.parent.name] = {f.name: _text(f) for f in files}
        else:
            log.warning("%s is left out: it is of step %s, not of %d", path, evaluated, step)
    return found
