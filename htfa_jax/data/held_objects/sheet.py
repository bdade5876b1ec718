"""Contact sheets: one look at what a dataset holds."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from htfa_jax.common.files import writing
from htfa_jax.common.json_files import read_json_lines
from htfa_jax.data.decode import decode_field, load_image
from htfa_jax.data.masks import load_mask
from htfa_jax.data.records import Record, parse_record
from htfa_jax.data.storage import image_root
from htfa_jax.errors import DataError

COLUMNS = 8
MAX_CELL = 224  # pixels of a cell's side; larger images are shrunk
OBJECT_TINT, HAND_TINT = (60, 220, 90), (240, 60, 60)


def contact_sheet(source: str | os.PathLike, out_png: str | os.PathLike, num: int = 24) -> Path:
    """Writes a labelled PNG grid of the first `num` scenes and returns its path.

    `source` is a JSON-lines file, or a folder of which the first such file is taken. A scene is a
    column: original, target, reconstruction, the original with its masks (object green, hand red).
    """
    source = Path(source)
    if source.is_dir():
        files = sorted(source.glob("*.jsonl"))
        if not files:
            raise DataError(f"no JSON-lines file in {source}")
        source = files[0]
    records = list(itertools.islice(read_json_lines(source, DataError), num))
    if not records:
        raise DataError(f"{source} holds no records")
    place = image_root(None, str(source))
    cells = [
        scene_column(parse_record(record, f"{source}, record {i}", place, with_turns=False))
        for i, record in enumerate(records)
    ]
    width, height = cells[0].size
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % columns * width, number // columns * height))
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with writing(out_png):
        sheet.save(out_png)
    return out_png


def scene_column(record: Record) -> Image.Image:
    """The images of one scene below each other, with a caption.

    Raises DataError if it has not all that a drawn scene has.
    """

    def field(name: str, loader: Callable[[Any], Image.Image]) -> Image.Image:
        image = decode_field(record, name, loader)
        if image is None:
            raise record.error(f"{name} is missing, which a sheet shows")
        return image

    images = [field(key, load_image) for key in ("image_orig", "image_target", "image_recon")]
    overlay = np.asarray(images[0], np.float32)
    for key, tint in (("object_mask", OBJECT_TINT), ("occluder_mask", HAND_TINT)):
        mask = field(key, load_mask).resize(images[0].size)
        share = np.asarray(mask, np.float32)[..., None] / 255
        overlay = overlay + 0.45 * share * (np.array(tint, np.float32) - overlay)
    images.append(Image.fromarray(overlay.astype(np.uint8)))
    for image, box in zip(images[1:3], (record.bbox_orig, record.bbox_recon), strict=True):
        if box is None:
            raise record.error("bbox_orig or bbox_recon is missing, which a sheet shows")
        x, y, w, h = box
        ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), outline=(255, 220, 0))
    side, caption_height, gap = min(images[0].width, MAX_CELL), 32, 4
    cell = Image.new("RGB", (side + gap, 4 * side + caption_height + gap), "white")
    for number, image in enumerate(images):
        cell.paste(image.resize((side, side), Image.Resampling.LANCZOS), (0, number * side))
    color, category, hidden = (record.meta.get(k) for k in ("color", "category", "occlusion"))
    if not isinstance(hidden, int | float) or not 0 <= hidden <= 1:
        raise record.error("meta.occlusion is missing, or no number from 0 to 1")
    caption = f"{color} {category}\n{100 * hidden:.0f} % hidden"
    font = ImageFont.load_default(11)
    ImageDraw.Draw(cell).text((3, 4 * side + 2), caption, fill="black", font=font, spacing=1)
    return cell
