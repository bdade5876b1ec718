"""The readers of datasets, images and results."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import numpy as np
from fuzzing.alter import altered, flipped, json_bytes, json_lines, pickled, text, value
from fuzzing.reader import Reader, written
from PIL import Image

from htfa_jax.common.json_files import parse_json
from htfa_jax.data import obman, safe_pickle
from htfa_jax.data.decode import FORMATS, decoded, load_image
from htfa_jax.data.held_objects.sheet import contact_sheet
from htfa_jax.data.masks import load_mask
from htfa_jax.data.records import parse_record
from htfa_jax.data.sources import array_records, json_object, tables
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.data.sources.json_text import array_elements
from htfa_jax.data.storage import ImageRoot
from htfa_jax.demo.http import read_box
from htfa_jax.errors import DataError
from htfa_jax.evaluation.curves import read_curves
from htfa_jax.evaluation.report_html import write_report
from htfa_jax.inference.inputs import read_jobs
from htfa_jax.inference.kept import keep_finished

RECORD = {
    "id": "r0",
    "image_orig": "a.png",
    "image_recon": "b.png",
    "object_mask": "m.png",
    "bbox_orig": [1, 2, 3, 4],
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?", "kind": "color"},
        {"from": "gpt", "value": "red"},
    ],
    "meta": {"occlusion": 0.4, "color": "red", "category": "jar"},
}
OTHERS = (
    {"image": ["a.png", "b.png"], "conversations": RECORD["conversations"]},
    {
        "images": [{"path": "a.png", "bytes": None}, {"bytes": "iVBORw0KGgo="}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "red"},
        ],
    },
    {
        "file_name": "data:image/png;base64,iVBORw0KGgo=",
        "question": "What?",
        "chosen": "red",
        "object_mask": {"size": [2, 3], "counts": [1, 5]},
        "occluder_mask": [[1, 2, 3, 4, 5, 6]],
    },
    {"image_orig": "a\\b.png", "object_mask": {"size": [4, 5], "counts": "52520"}, **RECORD},
)
PAIR = {**RECORD, "query": ["What?"]}
PREDICTION = {
    "id": "a",
    "answers": [{"query": "What?", "answer": "red", "confidence": 0.5}],
    "alignment": "boxes",
    "reconstruction": "given",
    "figures": {"images": "figures/a.png"},
}
ANNOTATION = {
    "class_id": "02876657",
    "coords": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scale": np.float64(0.5),
    "side": "right",
    "more": [1, (2, 3), None, True, {"hand": np.eye(3)}],
}


def _images() -> list[bytes]:
    """Small ones of each format."""
    rng, found = np.random.default_rng(0), []
    pixels = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    for kind in FORMATS:
        for mode, options in (("RGB", {}), ("L", {}), ("P", {}), ("1", {}), ("RGBA", {})):
            file = io.BytesIO()
            try:
                pixels.convert(mode).save(file, kind, **options)
            except (OSError, ValueError, KeyError):  # that format does not know this mode
                continue
            found.append(file.getvalue())
    for options in ({"progressive": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}):
        file = io.BytesIO()
        pixels.save(file, "JPEG", **options)
        found.append(file.getvalue())
    return found


IMAGES = _images()


def readers(folder: Path) -> dict[str, Reader]:
    """The readers by name, with files in an existing folder of their own."""
    sample = folder / "obman/train"
    segm = np.zeros((8, 8, 3), np.uint8)
    segm[2:5, 2:6] = 100
    for name in ("rgb", "segm", "meta", "views"):
        (sample / name).mkdir(parents=True)
    Image.fromarray(segm).save(sample / "rgb/1.jpg")
    Image.fromarray(segm).save(sample / "segm/1.png")
    mask = (sample / "segm/1.png").read_bytes()
    file = io.BytesIO()
    Image.new("L", Image.open(io.BytesIO(IMAGES[0])).size, 255).save(file, "PNG")
    white = file.getvalue()
    (sample / "views/1.png").write_bytes(mask)

    def lines(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], None]:
        def each(content: bytes) -> None:
            read(written(path, content))

        return each

    def records(path: Path) -> None:
        found, problem = RecordFile(path), None
        for i in range(len(found)):
            try:
                found[i]
            except DataError as error:  # the others are read all the same
                problem = error
        if problem is not None:
            raise problem

    def array(content: bytes) -> None:
        try:
            for each in array_elements([content[:7], content[7:]]):
                parse_json(each, "here", DataError, object)
        except ValueError as error:
            raise DataError(str(error)) from error

    def whole(content: bytes) -> None:
        try:
            for text in json_object.texts(content) or ():
                raw = parse_json(text, "here", DataError, object, allow_nan=True)
                parse_record(raw, "here", ImageRoot("root"))
        except ValueError as error:
            raise DataError(str(error)) from error

    def table(path: Path) -> None:
        try:
            for text, _ in tables.rows(path):
                raw = parse_json(text, "here", DataError, object, allow_nan=True)
                parse_record(raw, "here", ImageRoot("root"))
        except ValueError as error:
            raise DataError(str(error)) from error

    def csv_text(rng: Random) -> bytes:
        row = altered(rng, {k: RECORD[k] for k in ("id", "image_orig", "conversations")})
        cells = row if isinstance(row, dict) else {"image_orig": "a.png"}
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerow(cells)
        writer.writerow([v if isinstance(v, str) else json.dumps(v, default=str)
                         for v in cells.values()])  # fmt: skip
        content = file.getvalue().encode("utf-8", "replace")
        return flipped(rng, content) if rng.randrange(2) else content

    def shard(packed: Any) -> None:
        path = folder / "a.array_record"
        writer = array_records.open_writer(path)
        writer.write(packed)
        writer.close()
        array_records.ShardedRecords([path], ImageRoot("root"))[0]

    def manifest(content: bytes) -> None:
        written(folder / "shards" / array_records.MANIFEST, content)
        array_records.find_shards(str(folder / "shards"))

    def sample_of(given: tuple[bytes, bytes]) -> None:
        written(sample / "meta/1.pkl", given[0])
        written(sample / "segm/1.png", given[1])
        obman.write_records(folder / "obman", folder / "out", "train", sample / "views",
                            recon_template="{id}.png")  # fmt: skip

    def unpickled(content: bytes) -> None:
        try:
            str(safe_pickle.loads(content))
        except ValueError as error:  # of which `load` makes an error that names the file
            raise DataError(str(error)) from error

    def image(content: bytes) -> None:
        decoded(content, load_image)
        decoded(content, load_mask)

    def pairs(path: Path) -> None:
        for job in read_jobs(path, ()):
            if isinstance(job.record, DataError):
                raise job.record

    def predictions(path: Path) -> None:
        keep_finished(path)
        write_report(path.parent, "title")

    def sheet(path: Path) -> None:
        contact_sheet(path, folder / "sheet.png")

    def packed(rng: Random) -> bytes:
        content = array_records.pack(json_bytes(rng, RECORD), {"a.png": IMAGES[0]})
        if rng.randrange(2):
            content = msgpack.packb(
                altered(rng, {**msgpack.unpackb(content), text(rng): 1}),
                default=str,
                unicode_errors="surrogatepass",
            )
        return flipped(rng, content) if rng.randrange(2) else content

    def box(rng: Random) -> str:
        given = rng.choice(("1,2,3,4", "[1, 2, 3, 4]", str(value(rng))))
        return flipped(rng, given.encode("utf-8", "replace")).decode("utf-8", "replace")

    scene = RECORD | {"image_target": "a.png", "occluder_mask": "m.png", "bbox_recon": [1, 2, 3, 4]}
    for name in ("a.png", "b.png", "m.png"):
        written(folder / "sheet" / name, IMAGES[0] if name != "m.png" else white)
    written(folder / "shards/a", b"abc")
    logs = {"step": 1, "train/loss": 0.5, "time": 3}
    return {
        "record": Reader(
            lambda rng: altered(rng, RECORD),
            lambda raw: parse_record(raw, "here", ImageRoot("root"), with_turns=True),
        ),
        "records, JSON lines": Reader(
            lambda rng: json_lines(rng, RECORD), lines(folder / "a.jsonl", records)
        ),
        "records, JSON array": Reader(lambda rng: json_bytes(rng, [RECORD, RECORD]), array),
        "record of another form": Reader(
            lambda rng: altered(rng, rng.choice(OTHERS)),
            lambda raw: parse_record(raw, "here", ImageRoot("root"), with_turns=True),
        ),
        "records, JSON object": Reader(lambda rng: json_bytes(rng, {"data": [RECORD]}), whole),
        "records, CSV": Reader(csv_text, lines(folder / "a.csv", table)),
        "records, packed": Reader(packed, shard),
        "manifest of shards": Reader(
            lambda rng: json_bytes(rng, {"shards": [{"name": "a", "bytes": 3}]}), manifest
        ),
        "image": Reader(lambda rng: flipped(rng, rng.choice(IMAGES)), image),
        "pickle": Reader(lambda rng: pickled(rng, ANNOTATION), unpickled),
        "ObMan": Reader(
            lambda rng: (pickled(rng, ANNOTATION), flipped(rng, mask)), sample_of
        ),
        "infer --input": Reader(
            lambda rng: json_lines(rng, PAIR), lines(folder / "pairs.jsonl", pairs)
        ),
        "predictions": Reader(
            lambda rng: json_lines(rng, PREDICTION),
            lines(folder / "out/predictions.jsonl", predictions),
        ),
        "contact sheet": Reader(
            lambda rng: json_lines(rng, scene), lines(folder / "sheet/a.jsonl", sheet)
        ),
        "curves": Reader(
            lambda rng: json_lines(rng, logs),
            lines(folder / "logs/metrics.jsonl", lambda path: read_curves(folder)),
        ),
        "box": Reader(box, lambda given: read_box(given, "box")),
    }  # fmt: skip
