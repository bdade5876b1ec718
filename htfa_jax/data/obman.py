"""ObMan with MOHO's reconstructed views, as records.

    python -m htfa_jax.data.obman obman out --views views
    python -m htfa_jax.data.obman obman out --views views --split test --questions category

The recipe of OCC-MLLM: photographs of ObMan, the object's views that MOHO reconstructs from them,
and the question what the hand holds. ObMan is read as it is unpacked (its masks are documented in
its own reader, github.com/hassony2/obman):

    OBMAN/SPLIT/rgb/00000042.jpg      the photograph
    OBMAN/SPLIT/rgb_obj/00000042.jpg  the object without the person (optional)
    OBMAN/SPLIT/segm/00000042.png     red: the whole object (100); blue: what is seen, the object
                                      (100) and the person (other values above 0)
    OBMAN/SPLIT/meta/00000042.pkl     class_id, the object's ShapeNet class, and more

OUT gets SPLIT.jsonl and the images and masks that it names, so that it can be moved and trained
on as it is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro
from PIL import Image

from htfa_jax.common.cli import command, parse
from htfa_jax.common.files import whole_file, whole_path
from htfa_jax.common.logs import progress
from htfa_jax.common.templates import check_template, fill
from htfa_jax.data import safe_pickle
from htfa_jax.data.decode import decoded
from htfa_jax.data.held_objects.questions import ANSWERS, QUESTIONS, answer_sentences, answer_words
from htfa_jax.errors import ConfigError, DataError

Split = Literal["train", "val", "test"]
SPLITS = get_args(Split)
# Where MOHO's script puts its views, and how OCC-MLLM names them.
RECON_TEMPLATE = "{id}_0_obman_{split}_rgb_{id}.jpg.png"
# ShapeNet's class of an object: its word in ObMan's and OCC-MLLM's papers.
CATEGORIES = {
    "02876657": "bottle",
    "02880940": "bowl",
    "02942699": "camera",
    "02946921": "can",
    "02992529": "cellphone",
    "03593526": "jar",
    "03624134": "knife",
    "04074963": "remote control",
}
OBJECT = 100  # in `segm`
# ObMan says no colours.
Question = tyro.extras.literal_type_from_choices(kind for kind in QUESTIONS if kind != "color")
Answers = tyro.extras.literal_type_from_choices(ANSWERS)


def write_records(
    obman: Path,
    out: Path,
    split: str,
    views: Path,
    recon_template: str = RECON_TEMPLATE,
    questions: Sequence[str] = ("category", "clear"),
    answers: str = "sentence",
    limit: int | None = None,
) -> tuple[Path, list[str]]:
    """Writes the records of a split; returns their file and why samples were left out.

    Args:
      obman: the dataset's folder.
      out: folder to write to; what is there already is kept.
      split: one of `SPLITS`.
      views: folder of the reconstructed views.
      recon_template: names of the views, with {id} and {split}.
      questions: kinds of `held_objects.questions` that can be asked here: not colour.
      answers: "sentence" as OCC-MLLM's, or "word".
      limit: only so many samples.

    Samples whose view was not made, or whose object is not in the image, are left out: MOHO fails
    for some. Raises DataError for a folder that is not ObMan's, and for a damaged sample.
    """
    folder = obman / split
    for name in ("rgb", "segm", "meta"):
        if not (folder / name).is_dir():
            raise DataError(f"{obman} is no ObMan: there is no {split}/{name} in it")
    ids = sorted(path.stem for path in (folder / "meta").glob("*.pkl"))[:limit]
    if not ids:
        raise DataError(f"{folder / 'meta'} has no .pkl files")
    records = out / f"{split}.jsonl"
    left_out: list[str] = []
    for name in ("orig", "recon", "target", "object", "person"):
        (out / split / name).mkdir(parents=True, exist_ok=True)
    with (
        whole_file(records) as file,
        progress(len(ids), f"ObMan {split}", unit="sample") as bar,
    ):
        for name in ids:
            view = views / fill(recon_template, {"id": name, "split": split})
            if not view.is_file():
                left_out.append(f"{name}: no reconstructed view at {view}")
            elif (record := _record(folder, out, split, name, view, questions, answers)) is None:
                left_out.append(f"{name}: no pixel of the object is in the image")
            else:
                file.write(json.dumps(record) + "\n")
            bar.update()
        if len(left_out) == len(ids):
            raise DataError(f"not one of {len(ids)} samples can be used. The first: {left_out[0]}")
    return records, left_out


def _record(
    folder: Path,
    out: Path,
    split: str,
    name: str,
    view: Path,
    questions: Sequence[str],
    answers: str,
) -> dict[str, Any] | None:
    """One record, its files copied; None if the object is not in the image."""
    meta = safe_pickle.load(folder / "meta" / f"{name}.pkl")
    where = f"{folder}, sample {name}"
    class_id = meta.get("class_id") if isinstance(meta, dict) else None
    known = isinstance(class_id, str | int | np.integer)
    category = CATEGORIES.get(str(class_id).zfill(8)) if known else None
    if category is None:
        said = repr(class_id)[:80] if known else f"a {type(class_id).__name__}"
        raise DataError(f"{where}: class_id={said} is none of {', '.join(CATEGORIES)}")
    whole, person = _masks(folder / "segm" / f"{name}.png", where)
    if not whole.any():
        return None
    files = {
        "image_orig": (f"{split}/orig/{name}.jpg", folder / "rgb" / f"{name}.jpg"),
        "image_recon": (f"{split}/recon/{name}{view.suffix}", view),
        "image_target": (f"{split}/target/{name}.jpg", folder / "rgb_obj" / f"{name}.jpg"),
    }
    if not (folder / "rgb_obj").is_dir():
        del files["image_target"]
    for target, source in files.values():
        if not source.is_file():
            raise DataError(f"{where}: no file at {source}")
        _copy(source, out / target)
    masks = {
        "object_mask": (f"{split}/object/{name}.png", whole),
        "occluder_mask": (f"{split}/person/{name}.png", person),
    }
    for target, mask in masks.values():
        Image.fromarray(mask.astype(np.uint8) * 255).save(out / target)
    hidden = float((whole & person).sum() / whole.sum())
    return {
        "id": name,
        **{field: target for field, (target, _) in (*files.items(), *masks.items())},
        "bbox_orig": _box(whole),
        "conversations": list(_turns(category, hidden, questions, answers)),
        "meta": {"category": category, "occlusion": round(hidden, 4)},
    }


def _masks(path: Path, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The whole object and the person before it, bool [H, W]."""

    def fail(reason: str, kind: str) -> DataError:
        return DataError(f"{where}: {reason}", kind)

    segm = np.asarray(decoded(path, fail=fail))
    red, blue = segm[..., 0], segm[..., 2]
    return red == OBJECT, (blue > 0) & (blue != OBJECT)


def _box(mask: np.ndarray) -> list[int]:
    """x, y, width and height of what is true."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]


def _turns(
    category: str, hidden: float, questions: Sequence[str], answers: str
) -> Iterator[dict[str, str]]:
    """Questions in OCC-MLLM's words. Clear is what is hidden by less than half."""
    said = (answer_words if answers == "word" else answer_sentences)(category, "", hidden)
    for number, kind in enumerate(questions):
        marker = "" if number else "\n<image>"
        yield {"from": "human", "value": QUESTIONS[kind] + marker, "kind": kind}
        yield {"from": "gpt", "value": said[kind]}


def _copy(source: Path, target: Path) -> None:
    """A link to the same file where the disk allows one, else a copy; whole or not at all."""
    if target.is_file():
        return
    with whole_path(target) as partial:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


@dataclasses.dataclass(frozen=True)
class ObManArgs:
    """Options of the command."""

    # Folder with train, val, test.
    obman: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OBMAN")]
    # Folder to write to.
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    views: Path  # folder of MOHO's views
    split: Split = "train"  # which of the three
    recon_template: str = RECON_TEMPLATE  # the views' names
    questions: tuple[Question, ...] = ("category", "clear")  # kinds that are asked
    answers: Answers = "sentence"  # one word each, or a sentence
    limit: int | None = None  # only so many samples


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see --help."""
    args = parse(ObManArgs, argv, __doc__)
    if not args.questions:
        raise ConfigError("--questions names none")
    try:
        check_template(args.recon_template)
    except ValueError as error:
        raise ConfigError(f"--recon_template {args.recon_template!r}: {error}") from error
    records, left_out = write_records(
        args.obman.expanduser(),
        args.out.expanduser(),
        args.split,
        args.views.expanduser(),
        args.recon_template,
        args.questions,
        args.answers,
        args.limit,
    )
    for reason in left_out[:10]:
        print(f"left out: {reason}")
    print(f"{records}; {len(left_out)} samples left out")


if __name__ == "__main__":
    main()
