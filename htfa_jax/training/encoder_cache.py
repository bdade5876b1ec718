"""What frozen encoders make of the training data, computed once and kept on disk.

`data.cache_codes` keeps the codes of each record's target, `data.cache_features` SigLIP's features
of its original and of its reconstruction: three encoder passes that a training step then reads
from disk. They are made on first use, in `data.cache_dir`/encoded/KEY, where KEY is a hash of all
that they depend on. Beside them are the hashes of their bytes, which each start compares: what is
damaged is made again. Evaluation does without them.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from htfa_jax.common.files import made_once, one_at_a_time, whole_folder, write_whole
from htfa_jax.common.hashing import block_hashes, short_hash
from htfa_jax.common.json_files import read_json
from htfa_jax.common.logs import progress
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, override
from htfa_jax.data.batch import Batch, Kind, cached_spec
from htfa_jax.data.pipeline import evaluation_batches
from htfa_jax.data.records import Dataset
from htfa_jax.data.splits import cache_folder, describe_training_data
from htfa_jax.errors import ConfigError, DataError
from htfa_jax.models.factory import Model
from htfa_jax.models.htfa import HTFA
from htfa_jax.models.registration import register
from htfa_jax.sharding.layout import Layout
from htfa_jax.training.loop import duration

# Field of `Batch`: the component of the model that makes it, what asks for it.
ENCODERS = {
    "target_codes": ("vq", "data.cache_codes"),
    "features": ("siglip", "data.cache_features"),
}

HASHES = "hashes.json"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EncoderCache:
    """Gives the kept fields of a record by its number.

    Attributes:
      files: by name of the field; NumPy arrays [records, ...].
      kinds: shapes and types of a record's part.
    """

    files: dict[str, Path]
    kinds: dict[str, Kind]

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        # Opened each time, because a mapped array would be sent to worker processes as a whole.
        # NumPy's files know bfloat16 as two bytes of anything.
        return {
            name: np.array(np.load(path, mmap_mode="r")[index]).view(self.kinds[name][1])
            for name, path in self.files.items()
        }


def check(config: Config, num_records: int) -> None:
    """Raises ConfigError if what is to be kept does not fit `data.cache_gb`, or is not possible."""
    kinds = cached_spec(config)
    sizes = {ENCODERS[name][1]: num_records * _num_bytes(k) / 1e9 for name, k in kinds.items()}
    if sizes and jax.process_count() > 1:
        raise ConfigError(
            f"{' and '.join(sizes)} work in runs of one process; this one has "
            f"{jax.process_count()}: leave them off"
        )
    if sum(sizes.values()) > config.data.cache_gb:
        needs = ", ".join(f"{name} needs {size:.3g} GB" for name, size in sizes.items())
        raise ConfigError(
            f"{needs} for {num_records} records, more than data.cache_gb="
            f"{config.data.cache_gb:g}: raise it, or leave them off"
        )


def open_or_make(
    config: Config,
    model: Model,
    params: Flat,
    names: Mapping[str, str],
    records: Dataset,
    layout: Layout,
) -> EncoderCache | None:
    """The cache that a run asks for, made now if it is not there; None if it asks for none.

    Args:
      config: of the run.
      model: its structure.
      params: all weights.
      names: of the frozen components, with their hashes, as `checkpoint.save_frozen` gives them.
      records: the training data.
      layout: of the run.

    Raises DataError if a record cannot be read, or if the cache cannot be written.
    """
    kinds, files = cached_spec(config), {}
    for name, kind in kinds.items():
        folder = cache_folder(config.data) / "encoded" / cache_key(config, name, names)
        path = files[name] = folder / f"{name}.npy"
        make = functools.partial(_make, path, kind, config, model, params, records, layout)
        try:
            made_once(folder, name, make)
            if _damage(path, kind, len(records)):
                with one_at_a_time(folder, name):
                    # Another process may have mended it meanwhile.
                    if problem := _damage(path, kind, len(records)):
                        log.warning("%s: it is made again", problem)
                        make()
        except OSError as error:
            raise DataError(f"{folder} cannot be written (data.cache_dir): {error}") from error
        log.info("%s of %d records are read from %s", name, len(records), files[name])
    return EncoderCache(files, kinds) if files else None


def cache_key(config: Config, name: str, names: Mapping[str, str]) -> str:
    """A name for all that a field depends on.

    Args:
      config: of the run.
      name: of the field.
      names: of the frozen components, with their hashes.
    """
    component, data = ENCODERS[name][0], config.data
    described = [
        name,
        names[component],
        dataclasses.asdict(getattr(config, component)),
        [config.image_size, config.train.dtype],
        # How the reconstruction comes into the original's frame.
        [config.level2.alignment, config.level2.intensity_threshold, data.use_object_mask],
        [data.resize, data.image_mean, data.image_std],
        describe_training_data(config),
    ]
    return short_hash(described)


def _make(
    path: Path,
    kind: Kind,
    config: Config,
    model: Model,
    params: Flat,
    records: Dataset,
    layout: Layout,
) -> None:
    name, started = path.stem, time.time()
    size = len(records) * _num_bytes(kind) / 1e6
    log.info("making %s of %d records, %.3g MB on disk", name, len(records), size)

    @functools.partial(jax.jit, out_shardings=layout.batch)
    @layout.inside
    def encode(params: Flat, batch: Batch) -> jax.Array:
        return _encode(name, model.merge(params), batch)

    # A record that is skipped today may be mended tomorrow, and would keep its zeros.
    strict = override(config, {"data.on_error": "raise"})
    batches = evaluation_batches(strict, records, None, num_shards=layout.num_shards)
    done = 0
    with whole_folder(path.parent, DataError) as partial:
        with (
            (partial / path.name).open("wb") as file,
            progress(len(records), name, unit="record") as bar,
        ):
            file.write(_header(kind, len(records)))
            try:
                for loaded in batches:
                    encoded = np.asarray(encode(params, layout.put(loaded.batch)))
                    rows = encoded[: len(records) - done].astype(kind[1])
                    file.write(rows.tobytes())
                    done += len(rows)
                    bar.update(len(rows))
            except DataError as error:
                raise DataError(
                    f"{error}. {ENCODERS[name][1]} needs the images of every record: mend this "
                    "one or leave it out of the file"
                ) from error
            finally:
                batches.close()
        hashes = {path.name: block_hashes(partial / path.name)}
        write_whole(partial / HASHES, json.dumps(hashes) + "\n")
    log.info("made %s in %s", name, duration(time.time() - started))


def _encode(name: str, model: HTFA, batch: Batch) -> jax.Array:
    pair = register(batch, model.config)
    if name == "target_codes":
        return model.target_codes(batch, pair)
    return jnp.stack(model.frozen_features(batch, pair), axis=1)


def _num_bytes(kind: Kind) -> int:
    shape, dtype = kind
    return math.prod(shape) * dtype.itemsize


def _header(kind: Kind, num_records: int) -> bytes:
    """The beginning of a NumPy file of so many rows."""
    shape, dtype = kind
    described = {"descr": dtype.str, "fortran_order": False, "shape": (num_records, *shape)}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def _damage(path: Path, kind: Kind, num_records: int) -> str:
    """What is wrong with a file; nothing if it is what was written. Raises OSError."""
    if not path.is_file():
        return f"{path} is missing"
    header, size = _header(kind, num_records), path.stat().st_size
    expected = len(header) + num_records * _num_bytes(kind)
    with path.open("rb") as file:
        same = file.read(len(header)) == header
    if size != expected or not same:
        return (
            f"{path} is damaged: expected {expected} bytes, {kind[1].name} "
            f"{[num_records, *kind[0]]}; it has {size}" + ("" if same else " and another beginning")
        )
    if not (path.parent / HASHES).is_file():
        log.info("%s has no %s, and is taken as it is", path.parent, HASHES)
        return ""
    started = time.time()
    try:
        noted = read_json(path.parent / HASHES, DataError).get(path.name)
    except DataError as error:
        return str(error)
    found = block_hashes(path)
    if found != noted:
        return f"{path} is damaged: its SHA-256 is not what {HASHES} beside it says"
    log.info("%s: %.3g GB are what was written (%.1f s)", path, size / 1e9, time.time() - started)
    return ""
