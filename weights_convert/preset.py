"""One command for the published weights of a preset: fetch, convert, compare, say how to train.

What is to be downloaded and written is said before anything is. A download that was interrupted
goes on where it was, and a component that is there already, converted and compared, is left alone.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from htfa_jax.checkpoints.weights import CONFIG, WEIGHTS, write_json
from htfa_jax.common.json_files import read_json
from htfa_jax.config import Config
from htfa_jax.config.io import load_config, preset_names
from htfa_jax.errors import CheckpointError
from weights_convert import internlm2, siglip, vq
from weights_convert.convert import ConversionSpec
from weights_convert.files import HubFiles, weight_files
from weights_convert.folder import CONVERSION, RULES_VERSION, write_folder
from weights_convert.source import Source
from weights_convert.tokenizer import FILES as TOKENIZER_FILES
from weights_convert.tokenizer import tokenizer_of

log = logging.getLogger("htfa_jax.weights_convert")

RECORD = "revisions.json"


@dataclasses.dataclass(frozen=True)
class Published:
    """Where a component's weights are published.

    Attributes:
      component: "siglip", "vq" or "decoder".
      repository: on the hub.
      revision: the commit that is taken; None for the one of today, which is then recorded.
      tensors: regex of the tensors that are needed.
    """

    component: str
    repository: str
    revision: str | None
    tensors: str

    @property
    def family(self) -> str:
        """What its weight folder is called."""
        return "internlm2" if self.component == "decoder" else self.component


SIGLIP = Published(
    "siglip",
    "google/siglip-so400m-patch14-384",
    "9fdffc58afc957d1a03a25b10dba0329ab15c2a3",
    r"vision_model\..*",
)
JANUS = Published("vq", "deepseek-ai/Janus-1.3B", None, r"gen_vision_model\..*")
INTERNLM2 = Published("decoder", "internlm/internlm2-1_8b", None, r"model\..*|output\.weight")
INTERNVL = Published(
    "decoder",
    "OpenGVLab/InternVL2-8B",
    "6fb9ad6924f69424e57fab2ab061d707688f0296",
    r"language_model\..*",
)
# Presets whose decoder is another than InternLM2-1.8B's first layers.
DECODERS = {"internvl2_8b": INTERNVL}
# Presets that bring their weights along.
BROUGHT = ("debug",)


@dataclasses.dataclass
class Fetch:
    """What one component takes.

    Attributes:
      published: where it is.
      revision: the commit.
      missing: files to download, {name: bytes}.
      present: files that are in the hub's cache already.
      written: bytes that its weight folder has at most.
    """

    published: Published
    revision: str
    missing: dict[str, int]
    present: list[str]
    written: int


def published_for(name: str) -> list[Published]:
    """The published components of a preset. Raises CheckpointError for one that has none."""
    if name in BROUGHT:
        raise CheckpointError(f"{name} starts from weights that come with the package: train it")
    if name not in preset_names():
        known = ", ".join(n for n in preset_names() if n not in BROUGHT)
        raise CheckpointError(f"there is no preset {name}; there are {known}")
    return [SIGLIP, JANUS, DECODERS.get(name, INTERNLM2)]


def fetch_preset(
    name: str,
    out: Path,
    revisions: Sequence[str] = (),
    *,
    dry_run: bool = False,
    compare: bool = True,
) -> str:
    """Fetches, converts and verifies the published weights of a preset.

    Args:
      name: of the preset.
      out: folder for the weight folders `siglip`, `vq` and `internlm2`.
      revisions: "siglip=COMMIT" and so on, instead of those of the table or of an earlier call.
      dry_run: only say what would be done.
      compare: run each conversion and its source on the same inputs.

    Returns:
      The command that trains with them.

    Raises:
      CheckpointError: no such preset or revision, no connection, not enough disk, or weights that
        differ from their source.
    """
    config, wanted = load_config(name), published_for(name)
    chosen = _chosen(revisions, [p.component for p in wanted])
    if compare and not all(importlib.util.find_spec(m) for m in ("torch", "transformers")):
        raise CheckpointError(
            "comparing needs PyTorch and transformers: pip install 'htfa-jax[convert]', or "
            "--no_compare"
        )
    record = read_json(out / RECORD, CheckpointError) if (out / RECORD).is_file() else {}
    to_do = []
    for published in wanted:
        before = record.get(published.component)
        before = before if isinstance(before, dict) else {}
        revision = chosen.get(published.component) or _pinned(before, published)
        if _is_done(out, published, config, revision, before, compare):
            print(f"{published.component}: {out / published.family} is there already ({revision})")
        else:
            to_do.append(plan_fetch(published, config, revision))
    _say(to_do, out)
    if not dry_run:
        for fetch in to_do:
            # Before it is made, so that a call that goes on takes the same commit.
            taken = {"repository": fetch.published.repository, "revision": fetch.revision}
            _record(out, record, fetch, taken | {"compared": False})
            _make(fetch, config, out, compare)
            _record(out, record, fetch, taken | {"compared": compare})
    folders = {p.component: out / p.family for p in wanted}
    flags = " \\\n    ".join(f"--config.pretrained.{c}={path}" for c, path in folders.items())
    return (
        f"train with it:\npython -m htfa_jax.train --config {name} \\\n    {flags} \\\n"
        "    --config.data.train=train.jsonl"
    )


def _record(out: Path, record: dict[str, Any], fetch: Fetch, entry: Mapping[str, Any]) -> None:
    """Writes down what was taken for a component."""
    record[fetch.published.component] = dict(entry)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, record)


def plan_fetch(published: Published, config: Config, revision: str | None) -> Fetch:
    """Which files of a repository a component needs; fetches its index and no weights.

    Raises CheckpointError if the hub does not give them.
    """
    from huggingface_hub import try_to_load_from_cache

    files = HubFiles(published.repository, revision, sizes=True)
    index, weights = weight_files(files.names, published.repository)
    if index is not None:
        where = read_json(files.get(index), CheckpointError).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise CheckpointError(f"{published.repository}/{index} has no weight_map")
        weights = sorted({str(f) for key, f in where.items() if _needs(published, config, key)})
    names = [n for n in (CONFIG, index) if n in files.names]
    if published.component == "decoder":
        names += sorted(TOKENIZER_FILES & set(files.names))
    present = [
        n
        for n in [*names, *weights]
        if isinstance(try_to_load_from_cache(published.repository, n, revision=files.revision), str)
    ]
    missing = {n: files.sizes.get(n, 0) for n in [*names, *weights] if n not in present}
    most = 4 * sum(math.prod(s.shape) for s in _shapes(published, config).values())
    written = min(most, sum(files.sizes.get(n, 0) for n in weights) or most)
    return Fetch(published, str(files.revision), missing, present, written)


def _needs(published: Published, config: Config, key: str) -> bool:
    layer = re.search(r"\.layers\.(\d+)\.", key) if published.component == "decoder" else None
    if layer and int(layer[1]) >= config.decoder.num_layers:
        return False
    return re.fullmatch(published.tensors, key) is not None


def _shapes(published: Published, config: Config) -> Mapping[str, Any]:
    if published.component == "siglip":
        return siglip.shapes(config.siglip, config.image_size)
    if published.component == "vq":
        return vq.shapes(config.vq)
    return internlm2.shapes(config.decoder)


def _say(to_do: Sequence[Fetch], out: Path) -> None:
    """Says sizes. Raises CheckpointError if a disk has not enough room."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for fetch in to_do:
        size = sum(fetch.missing.values())
        print(
            f"{fetch.published.component}: {fetch.published.repository} at {fetch.revision}: "
            f"{len(fetch.missing)} files, {_text(size)} to download, "
            f"{len(fetch.present)} are there; converted at most {_text(fetch.written)}"
        )
    download = sum(sum(fetch.missing.values()) for fetch in to_do)
    written = sum(fetch.written for fetch in to_do)
    wanted: dict[int, tuple[Path, int]] = {}
    for place, size in ((Path(HF_HUB_CACHE), download), (out, written)):
        existing = next(p for p in (place, *place.absolute().parents) if p.exists())
        device = existing.stat().st_dev
        wanted[device] = existing, size + (wanted[device][1] if device in wanted else 0)
        print(f"{_text(size)} on the disk of {place}")
    for place, size in wanted.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise CheckpointError(
                f"the disk of {place} has {_text(free)} free, and {_text(size)} are needed: make "
                "room, or set HF_HOME and OUT to other disks"
            )


def _make(fetch: Fetch, config: Config, out: Path, compare: bool) -> None:
    """Downloads, converts and compares one component."""
    published = fetch.published
    source = Source(published.repository, fetch.revision)
    folder = out / published.family
    write_folder(
        source,
        _spec(published, source, config),
        folder,
        beside=tokenizer_of(source, published.family),
    )
    if compare:
        from weights_convert.verify import verify

        print(verify(folder, source))


def _spec(published: Published, source: Source, config: Config) -> ConversionSpec:
    if published.component == "siglip":
        return siglip.conversion_spec(source, config.image_size)
    if published.component == "vq":
        return vq.conversion_spec(source)
    return internlm2.conversion_spec(source, config.decoder.num_layers)


def _pinned(before: Mapping[str, Any], published: Published) -> str | None:
    """The commit of an earlier call, if it was of this repository, or the table's."""
    same = before.get("repository") == published.repository
    revision = before.get("revision") if same else None
    return revision if isinstance(revision, str) else published.revision


def _is_done(
    out: Path,
    published: Published,
    config: Config,
    revision: str | None,
    before: Mapping[str, Any],
    compare: bool,
) -> bool:
    """Whether a component is there, of this commit and in this preset's form."""
    folder = out / published.family
    if not all((folder / name).is_file() for name in (CONFIG, WEIGHTS, CONVERSION)):
        return False
    made, sizes = (read_json(folder / n, CheckpointError) for n in (CONVERSION, CONFIG))
    form = {
        "siglip": sizes.get("image_size") == config.image_size,
        "decoder": sizes.get("num_layers") == config.decoder.num_layers,
    }
    return (
        made.get("source") == published.repository
        and made.get("revision") == before.get("revision") == revision
        and made.get("rules_version") == RULES_VERSION
        and (before.get("compared") is True or not compare)
        and form.get(published.component, True)
    )


def _chosen(revisions: Sequence[str], components: Sequence[str]) -> dict[str, str]:
    """`--revision siglip=COMMIT`, by component."""
    found = {}
    for text in revisions:
        component, equals, revision = text.partition("=")
        if component not in components or not equals or not revision:
            raise CheckpointError(
                f"--revision {text}: expected COMPONENT=COMMIT, of {', '.join(components)}"
            )
        found[component] = revision
    return found


def _text(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
