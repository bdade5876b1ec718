"""Damaged and unusual image files: a clear error, or the right image."""

import io
import os
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from htfa_jax.data import decode
from htfa_jax.data.decode import load_image
from htfa_jax.data.masks import load_mask
from htfa_jax.data.preprocess import load_images
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.errors import DataError


def smooth(width=48, height=48):
    """An image that JPEG keeps: a gradient per channel."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], axis=-1).round().astype(np.uint8)


def file_of(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_of_size(width, height):
    """The header of a PNG and nothing behind it."""

    def chunk(name, data):
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


@pytest.fixture
def record(dataset):
    return RecordFile(dataset)[2]


@pytest.mark.parametrize("field", ["image_orig", "image_recon", "image_target", "occluder_mask"])
@pytest.mark.parametrize(
    "content,reason,kind",
    [
        (None, "no file at .*bad.png: put it there", "missing image"),
        (b"", r"bad.png is empty \(0 bytes\): copy it again", "empty image"),
        (bytes(900), "bad.png is no image that can be read: save it as", "unknown image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image that can be", "unk"),
        (png_of_size(9000, 9000), "has 9000x9000 pixels, more than 64 meb", "too large an image"),
        (png_of_size(60000, 60000), "has far more than 64 mebipixels", "too large an image"),
    ],
)
def test_it_names_record_field_file_and_what_to_do(record, tmp_path, field, content, reason, kind):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"record 2 \(id r2\): {field}: .*{reason}") as caught:
        load_images(replace(record, **{field: path}), 48, "letterbox")
    assert caught.value.kind.startswith(kind)


def test_a_bomb_is_refused_before_its_pixels_are_there(record, tmp_path):
    """A file of 80 kB that would be 250 MB of pixels: nothing like that is ever allocated."""
    import resource

    width = 9100
    raw = zlib.compressobj(9)
    rows = [raw.compress(bytes(1 + 3 * width)) for _ in range(width)] + [raw.flush()]
    path, header = tmp_path / "bomb.png", png_of_size(width, width)
    body = b"IDAT" + b"".join(rows)
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    path.write_bytes(header[:33] + chunk + b"\0\0\0\0IEND\xaeB`\x82")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="has 9100x9100 pixels, more than"):
        load_images(replace(record, image_orig=path), 48, "letterbox")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_too_many_bytes_are_not_read(record, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MAX_BYTES", 2**20)
    path = tmp_path / "long.png"
    path.write_bytes(file_of(Image.fromarray(smooth()), "PNG") + bytes(2**20))
    with pytest.raises(DataError, match="long.png has 1 MiB, more than 1: make it smaller"):
        load_images(replace(record, image_orig=path), 48, "letterbox")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo])
def test_what_is_no_file_is_refused_and_not_waited_for(record, tmp_path, make):
    make(tmp_path / "odd.png")
    with pytest.raises(DataError, match="image_orig: .*odd.png is not a file"):
        load_images(replace(record, image_orig=tmp_path / "odd.png"), 48, "letterbox")


@pytest.mark.parametrize(
    "kind,options",
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
    ],
)
def test_cut_off_or_scribbled_over_it_is_an_error_or_a_image(record, tmp_path, kind, options):
    """Whatever Pillow makes of it, only one sort of error comes out, and most cuts are noticed."""
    whole = file_of(Image.fromarray(smooth()), kind, **options)
    path, rng, noticed = tmp_path / "image", np.random.default_rng(0), 0
    lengths = np.linspace(1, len(whole) - 3, 25).astype(int)
    for length in lengths:
        path.write_bytes(whole[:length])
        try:
            load_images(replace(record, image_orig=path), 48, "letterbox")
        except DataError as error:
            assert error.kind in ("damaged image", "unknown image format")
            noticed += 1
    # The end of a file may be padding, or hold nothing.
    assert noticed >= 22
    for _ in range(25):
        scribbled = bytearray(whole)
        for place in rng.integers(0, len(whole), 4):
            scribbled[place] = rng.integers(256)
        path.write_bytes(scribbled)
        try:
            sample = load_images(replace(record, image_orig=path), 48, "letterbox")
            assert sample["image_orig"].shape == (48, 48, 3)
        except DataError:
            pass


def test_a_cut_off_jpeg_says_so(record, tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(file_of(Image.fromarray(smooth(200, 200)), "JPEG")[:2000])
    reason = r"cut.jpg cannot be decoded: .*truncated.*: copy it again, or leave the record out"
    with pytest.raises(DataError, match=reason):
        load_images(replace(record, image_recon=path), 48, "letterbox")


def with_scans(count, size=(64, 64)):
    """A progressive JPEG whose last scan comes again and again, `count` in all."""
    content = file_of(Image.new("L", size, "grey"), "JPEG", progressive=True)
    head, *scans, last = content.removesuffix(b"\xff\xd9").split(b"\xff\xda")
    scans += [last] * (count - len(scans))
    return b"\xff\xda".join([head, *scans]) + b"\xff\xd9"


def test_a_jpeg_of_too_many_scans_is_not_decoded(tmp_path, monkeypatch):
    assert load_image(with_scans(decode.MAX_SCANS)).size == (64, 64)
    (tmp_path / "many.jpg").write_bytes(with_scans(decode.MAX_SCANS + 1))
    monkeypatch.setattr(Image, "open", None)
    for source in (with_scans(30_000, (2000, 2000)), tmp_path / "many.jpg"):
        with pytest.raises(DataError, match="more than 100 scans"):
            load_image(source)


def test_bytes_that_look_like_scans_are_none():
    image = file_of(Image.new("L", (64, 64), "grey"), "JPEG")
    comment = b"\xff\xda" * 200
    comment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
    # In a comment, and in what some cameras put behind the image.
    for content in (image[:2] + comment + image[2:], image + b"\xff\xda" * 200):
        assert load_image(content).size == (64, 64)


def test_memory_that_is_not_there_is_no_fault_of_the_data(record, monkeypatch):
    def fails(source):
        raise MemoryError

    with pytest.raises(MemoryError):
        decode.decode_field(record, "image_orig", fails)


def test_cmyk_becomes_rgb():
    """As Adobe's programs write it (inverted), and as others do."""
    image = smooth()
    found = load_image(file_of(Image.fromarray(image).convert("CMYK"), "JPEG", quality=95))
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found, int) - image).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_the_upper_eight(kind):
    grey = smooth()[..., 0]
    deep = grey.astype(np.uint16) * 257
    found = np.asarray(load_image(file_of(Image.fromarray(deep), kind)))
    np.testing.assert_array_equal(found, np.repeat(grey[..., None], 3, axis=-1))
    mask = np.asarray(load_mask(file_of(Image.fromarray((grey > 99) * np.uint16(65535)), kind)))
    np.testing.assert_array_equal(mask > 127, grey > 99)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_that_are_no_colours_are_refused(kind):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    values = (values * 1e6).astype(kind) if kind is np.int32 else values
    with pytest.raises(DataError, match="save it with 8 bits"):
        load_image(file_of(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "RGB"])
def test_what_is_transparent_is_black(mode):
    """Whatever colour is written below it; half transparent is half as bright."""
    image = Image.fromarray(smooth()).convert("L" if mode == "LA" else "RGB")
    shown = np.asarray(image.convert("RGB")).copy()
    if mode == "P":
        indexed = image.quantize(64)
        shown = np.asarray(indexed.convert("RGB")).copy()
        hidden = np.asarray(indexed) == 7
        content = file_of(indexed, "PNG", transparency=7)
    elif mode == "RGB":
        hidden = (shown == shown[10, 20]).all(axis=-1)
        content = file_of(image, "PNG", transparency=tuple(int(v) for v in shown[10, 20]))
    else:
        alpha = np.full((48, 48), 255, np.uint8)
        alpha[10:20, 5:30] = 0
        alpha[30:40] = 128
        hidden = alpha == 0
        image.putalpha(Image.fromarray(alpha))
        content = file_of(image, "PNG")
        shown = (shown.astype(int) * alpha[..., None] / 255).round().astype(np.uint8)
    assert hidden.any()
    shown[hidden] = 0
    found = np.asarray(load_image(content))
    assert np.abs(found.astype(int) - shown).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_upright_with_its_mask(kind, orientation):
    """Turned and mirrored as each of the eight orientations undoes it."""
    upright = smooth(40, 24)
    upright[:12, :20] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    image = Image.fromarray(np.ascontiguousarray(stored))
    found = np.asarray(load_image(file_of(image, kind, exif=exif, **options)))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 6
    mask = Image.fromarray((np.ascontiguousarray(stored).min(axis=-1) > 250) * np.uint8(255))
    content = file_of(mask, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_mask(content)) > 127, upright.min(axis=-1) > 250)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_image_is_taken(kind):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.asarray(load_image(content))[5, 5].tolist() == [255, 0, 0]


def test_the_ending_of_a_name_does_not_matter(record, tmp_path):
    with Image.open(record.image_orig) as image:
        expected = np.asarray(image)
        image.save(tmp_path / "really_png.jpg", "PNG")
    changed = replace(record, image_orig=tmp_path / "really_png.jpg")
    found = load_images(changed, 48, "letterbox")["image_orig"]
    np.testing.assert_array_equal(found, expected)


def test_a_image_in_memory_stays_as_it_is():
    image = Image.fromarray(smooth())
    image.getexif()[0x0112] = 6
    before = image.copy()
    load_image(image).putpixel((0, 0), (9, 9, 9))
    assert image == before
