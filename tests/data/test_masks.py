"""Masks by their own values: each way to write one, and what is none."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from htfa_jax.data.decode import decoded
from htfa_jax.data.masks import load_mask
from htfa_jax.errors import DataError

INSIDE = np.zeros((48, 64), bool)
INSIDE[10:38, 20:44] = True  # 672 pixels
OUTLINE = INSIDE.copy()
OUTLINE[11:37, 21:43] = False
LABELS = np.where(OUTLINE, 255, np.where(INSIDE, 5, 0)).astype(np.uint8)


def voc_palette():
    """PASCAL VOC's colours."""
    palette = []
    for index in range(256):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        palette += color
    return palette


def indexed(values, palette=None):
    image = Image.fromarray(values.astype(np.uint8), "L").convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(palette or voc_palette())
    return image


def layers(colours, alpha):
    return Image.fromarray(np.dstack([colours, alpha]).astype(np.uint8))


def file_of(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def colours(inside, outside=(0, 0, 0)):
    return np.where(INSIDE[..., None], np.array(inside), np.array(outside)).astype(np.uint8)


WHITE = INSIDE * np.uint8(255)
CERTAIN = {
    "white on black": (Image.fromarray(WHITE), {}),
    "one bit": (Image.fromarray(INSIDE), {}),
    "0 and 1": (Image.fromarray(INSIDE.astype(np.uint8)), {}),
    "0 and 200": (Image.fromarray(INSIDE * np.uint8(200)), {}),
    "16 and 235": (Image.fromarray(np.where(INSIDE, 235, 16).astype(np.uint8)), {}),
    "RGB": (Image.fromarray(colours((255, 255, 255))), {}),
    "red": (Image.fromarray(colours((255, 0, 0))), {}),
    "blue": (Image.fromarray(colours((0, 0, 255))), {}),
    "palette of 0 and 1": (indexed(INSIDE), {}),
    "palette, black second": (indexed(~INSIDE, [255, 255, 255, 0, 0, 0]), {}),
    "palette of greys": (indexed(WHITE, [v for v in range(256) for _ in range(3)]), {}),
    "palette of two bits": (indexed(INSIDE), {"bits": 2}),
    "palette with alpha": (indexed(INSIDE), {"transparency": 0}),
    "alpha over black": (layers(colours((0, 0, 0)), WHITE), {}),
    "alpha over white": (layers(colours((255, 255, 255), (255, 255, 255)), WHITE), {}),
    "white on transparent black": (layers(colours((255, 255, 255)), WHITE), {}),
    "red on transparent black": (layers(colours((200, 30, 30)), WHITE), {}),
    "opaque": (layers(colours((255, 255, 255)), np.full(INSIDE.shape, 255)), {}),
    "grey with alpha": (Image.fromarray(np.dstack([WHITE * 0, WHITE])), {}),
    "16 bits, full": (Image.fromarray(INSIDE * np.uint16(65535)), {}),
    "16 bits, 255": (Image.fromarray(INSIDE * np.uint16(255)), {}),
    "16 bits, 1": (Image.fromarray(INSIDE.astype(np.uint16)), {}),
}


@pytest.mark.parametrize("name", CERTAIN)
def test_what_is_certain_is_read(name):
    image, options = CERTAIN[name]
    found = load_mask(file_of(image, **options))
    assert found.mode == "L"
    np.testing.assert_array_equal(np.asarray(found) > 127, INSIDE)


@pytest.mark.parametrize(
    "values",
    [
        INSIDE.astype(np.float32),
        INSIDE * np.float32(255),
        INSIDE.astype(np.int32),
        np.asarray(Image.fromarray(WHITE).filter(ImageFilter.GaussianBlur(1)), np.float32) / 255,
    ],
)
def test_numbers_of_tiff_files(values):
    found = np.asarray(load_mask(file_of(Image.fromarray(values), "TIFF"))) > 127
    assert (found != INSIDE).mean() < 0.02


def soft(kind):
    """A mask with edges that are neither black nor white."""
    if kind == "circle":
        large = Image.new("L", (4 * 64, 4 * 48))
        ImageDraw.Draw(large).ellipse((60, 30, 200, 160), fill=255)
        return large.resize((64, 48), Image.Resampling.BOX)
    image = Image.fromarray(WHITE)
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(3))
    return image.resize((128, 96), getattr(Image.Resampling, kind))


@pytest.mark.parametrize("kind", ["circle", "blur", "BILINEAR", "BICUBIC", "LANCZOS"])
@pytest.mark.parametrize("container", ["PNG", "JPEG", "WEBP", "PNG of a JPEG", "RGB"])
def test_soft_edges_stay_as_they_are(kind, container):
    image = soft(kind)
    if container == "PNG of a JPEG":
        image = Image.open(io.BytesIO(file_of(image, "JPEG")))
    if container == "RGB":
        image, container = image.convert("RGB"), "PNG"
    content = file_of(image, container.split()[0])
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.asarray(opened.convert("L"))
    np.testing.assert_array_equal(np.asarray(load_mask(content)), expected)


@pytest.mark.parametrize("quality", [20, 50, 75, 90, 100])
def test_jpeg_of_black_and_white(quality):
    for image in (Image.fromarray(WHITE), Image.fromarray(colours((255, 255, 255)))):
        found = np.asarray(load_mask(file_of(image, "JPEG", quality=quality))) > 127
        assert (found != INSIDE).mean() < 0.02


rng = np.random.default_rng(0)
PHOTO = np.clip(rng.normal(110, 40, (*INSIDE.shape, 3)), 0, 255).astype(np.uint8)
VOC_GREY = np.asarray(indexed(LABELS).convert("L"))
TRIMAP = np.where(OUTLINE, 128, WHITE).astype(np.uint8)
TRIMAP[12:20] = np.where(INSIDE[12:20], 128, 0)
REFUSED = {
    "VOC": (indexed(LABELS), r"0 \(2400\), 5 \(572\), 255 \(100\), indices of a palette.*void"),
    "VOC, outline alone": (indexed(np.where(OUTLINE, 255, 0)), r"0 \(2972\), 255 \(100\)"),
    "one class of a palette": (indexed(INSIDE * 5), r"0 \(2400\), 5 \(672\)"),
    "VOC as grey values": (Image.fromarray(LABELS), r"5 \(572\), 255 \(100\), as label maps"),
    "VOC as grey": (Image.fromarray(VOC_GREY), "as label maps have them"),
    "VOC as colours": (indexed(LABELS).convert("RGB"), r"#000000 \(2400\), #800080 \(572\)"),
    "0, 1 and void": (Image.fromarray(np.minimum(LABELS, 1) + OUTLINE * np.uint8(254)), "1 "),
    "trimap": (Image.fromarray(TRIMAP), r"128 \("),
    "too dark": (Image.fromarray(INSIDE * np.uint8(100)), "its largest value is 100"),
    "grey": (Image.new("L", (64, 48), 5), r"its values are 5 \(3072\)"),
    "photograph": (Image.fromarray(PHOTO), "its colours are .* and [0-9]+ more"),
    "grey photograph": (Image.fromarray(PHOTO[..., 0]), "as in a photograph"),
    "cut out": (layers(PHOTO, WHITE), "may be cut out, or have a hole"),
    "white is transparent": (layers(colours((255,) * 3), 255 - WHITE), "its alpha"),
    "a hole in white": (layers(colours((0,) * 3, (255,) * 3), WHITE), "its alpha"),
    "labels of 16 bits": (Image.fromarray(INSIDE * np.uint16(1234)), r"1234 \(672\)"),
    "classes of 16 bits": (Image.fromarray(LABELS.astype(np.uint16) * 257), r"1285 \(572\)"),
    "a channel each": (Image.fromarray(np.dstack([WHITE, WHITE.T.repeat(2)[:3072].reshape(48, 64),
                                                  0 * WHITE])), "its colours are"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused_with_its_values(name):
    image, reason = REFUSED[name]
    with pytest.raises(DataError, match=f"is no mask: .*{reason}") as caught:
        decoded(file_of(image), load_mask)
    assert caught.value.kind == "mask" and len(str(caught.value)) < 500


@pytest.mark.parametrize("values", [[np.nan, 1], [-1, 1], [0, 1e6], [0, 0.2]])
def test_other_numbers_are_refused(values):
    image = Image.fromarray(np.array([values] * 4, np.float32))
    with pytest.raises(DataError, match="is no mask: its values are"):
        load_mask(file_of(image, "TIFF"))


def test_a_label_map_saved_as_jpeg_is_refused():
    large = Image.fromarray(LABELS).resize((640, 480), Image.Resampling.NEAREST)
    with pytest.raises(DataError, match="as label maps"):
        load_mask(file_of(large, "JPEG", quality=95))


@pytest.mark.parametrize("value", [0, 1, 255])
def test_nothing_and_everything_are_masks(value):
    found = np.asarray(load_mask(file_of(Image.new("L", (8, 6), value))))
    assert (found == (255 if value else 0)).all()


def test_a_mask_is_turned_as_its_image_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = np.asarray(load_mask(file_of(indexed(INSIDE), exif=exif))) > 127
    np.testing.assert_array_equal(found, np.rot90(INSIDE, -1))


def test_arrays_and_images_of_a_program():
    for source in (INSIDE, WHITE, INSIDE.astype(np.uint8), Image.fromarray(INSIDE)):
        np.testing.assert_array_equal(np.asarray(load_mask(source)) > 127, INSIDE)
