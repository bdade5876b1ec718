"""Contact sheets: one look at what a dataset holds."""

import itertools
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from htfa_jax.common.json_files import read_json_lines
from htfa_jax.data.decode import decoded, load_mask
from htfa_jax.data.records import checked_box
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
    cells = []
    for number, record in enumerate(records):
        try:
            cells.append(scene_column(source.parent, record))
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{source}, record {number}: no scene of HeldObjects, which has images, masks, "
                f"boxes, meta.color, meta.category and meta.occlusion: {error!r:.200}"
            ) from error
    width, height = cells[0].size
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % columns * width, number // columns * height))
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out_png)
    return out_png


def scene_column(folder: Path, record: dict) -> Image.Image:
    """The images of one scene below each other, with a caption."""
    images = [
        decoded(folder / record[key]) for key in ("image_orig", "image_target", "image_recon")
    ]
    overlay = np.asarray(images[0], np.float32)
    for key, tint in (("object_mask", OBJECT_TINT), ("occluder_mask", HAND_TINT)):
        mask = np.asarray(decoded(folder / record[key], load_mask), np.float32)[..., None] / 255
        overlay = overlay + 0.45 * mask * (np.array(tint, np.float32) - overlay)
    images.append(Image.fromarray(overlay.astype(np.uint8)))
    for image, box in zip(images[1:3], ("bbox_orig", "bbox_recon"), strict=True):
        x, y, w, h = checked_box(record[box], box, DataError) or (0, 0, 1, 1)
        ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), outline=(255, 220, 0))
    side, caption_height, gap = min(images[0].width, MAX_CELL), 32, 4
    cell = Image.new("RGB", (side + gap, 4 * side + caption_height + gap), "white")
    for number, image in enumerate(images):
        cell.paste(image.resize((side, side), Image.Resampling.LANCZOS), (0, number * side))
    meta = record["meta"]
    caption = f"{meta['color']} {meta['category']}\n{100 * meta['occlusion']:.0f} % hidden"
    font = ImageFont.load_default(11)
    ImageDraw.Draw(cell).text((3, 4 * side + 2), caption, fill="black", font=font, spacing=1)
    return cell
