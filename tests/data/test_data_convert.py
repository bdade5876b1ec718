"""Packing into shards: nothing changes but where it is."""

import hashlib
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from support import tiny, write_dataset

from htfa_jax.config import Config, override
from htfa_jax.data import convert as convert_module
from htfa_jax.data.convert import convert
from htfa_jax.data.pipeline import evaluation_batches, training_batches
from htfa_jax.data.preprocess import load_images
from htfa_jax.data.sources.array_records import UNFINISHED
from htfa_jax.data.sources.open import open_source
from htfa_jax.data.splits import open_split, open_tokenizer
from htfa_jax.errors import DataError


@pytest.fixture(autouse=True)
def in_this_process(request, monkeypatch):
    """Shards are made here, which is quicker, unless a test asks for processes."""
    if "processes" in request.fixturenames:
        return

    class Pool:
        def __init__(self, workers, mp_context, initializer, initargs):
            convert_module._worker.update(zip(("job", "counter", "stop"), initargs, strict=True))

        def submit(self, function, *args):
            future = convert_module.concurrent.futures.Future()
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)
            return future

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(convert_module.concurrent.futures, "ProcessPoolExecutor", Pool)


def batches_of(source, tokenizer, **changes):
    config = tiny(data__train=str(source), data__drop_recon=0.3, **changes)
    records = open_split(config, "train")
    training = training_batches(config, records, tokenizer, 0, 3)
    found = list(itertools.islice(training, 5))
    training.close()
    return [*found, *evaluation_batches(config, records, tokenizer)]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.ids == b.ids and a.errors == b.errors
        jax.tree.map(np.testing.assert_array_equal, a.batch, b.batch)


@pytest.fixture(scope="module")
def tokenizer(dataset, tmp_path_factory):
    config = tiny(data__train=str(dataset))
    return open_tokenizer(config, tmp_path_factory.mktemp("w"), open_split(config, "train"))


def test_training_from_shards_gives_the_same_batches(dataset, tokenizer, tmp_path):
    manifest = convert(str(dataset), tmp_path / "packed", shard_size=3)
    found = batches_of(tmp_path / "packed", tokenizer)
    same(found, batches_of(dataset, tokenizer))
    same(batches_of(manifest, tokenizer), found)
    same(batches_of(tmp_path / "packed" / "*.array_record", tokenizer), found)


@pytest.mark.parametrize("processes", [True])
def test_in_processes(dataset, tokenizer, tmp_path, processes):
    convert(str(dataset), tmp_path / "packed", shard_size=3, num_workers=2)
    same(batches_of(tmp_path / "packed", tokenizer), batches_of(dataset, tokenizer))


def test_the_manifest_says_what_is_there(dataset, tmp_path):
    content = json.loads(convert(str(dataset), tmp_path / "packed", shard_size=3).read_text())
    assert content["records"] == 7 and content["skipped"] == 0
    assert [shard["records"] for shard in content["shards"]] == [3, 3, 1]
    for shard in content["shards"]:
        file = (tmp_path / "packed" / shard["name"]).read_bytes()
        assert shard["bytes"] == len(file)
        assert shard["sha256"] == hashlib.sha256(file).hexdigest()
    assert len(list((tmp_path / "packed").iterdir())) == 4


def test_records_keep_what_they_say(dataset, tmp_path):
    convert(str(dataset), tmp_path / "packed")
    packed = open_source(str(tmp_path / "packed"), Config().data)
    lines = [json.loads(line) for line in dataset.read_text().splitlines()]
    assert [packed[i].raw for i in range(7)] == lines
    assert str(packed[2].image_orig) == "orig2.png"


def test_reconstructions_of_a_template_are_packed(dataset, tmp_path):
    shutil.copytree(dataset.parent, tmp_path / "in")
    lines = [json.loads(line) for line in dataset.read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {"image": line.pop("image_orig"), "number": number}
        del line["image_recon"]
    path = tmp_path / "in" / "d.json"
    path.write_text(json.dumps(lines))
    config = override(
        Config(),
        {"data.recon_template": "recon{number}.png", "data.cache_dir": str(tmp_path / "cache")},
    )
    convert(str(path), tmp_path / "packed", config=config)
    record = open_source(str(tmp_path / "packed"), Config().data)[3]
    assert record.image_recon.read_bytes() == (dataset.parent / "recon3.png").read_bytes()


@pytest.fixture(params=[".png", ".jpg"])
def large(request, tmp_path):
    """Records of large images, wide, high and square, with another shape of reconstruction."""
    path = write_dataset(tmp_path / "large", 3)
    rng, lines = np.random.default_rng(3), []
    for i, line in enumerate(path.read_text().splitlines()):
        line = json.loads(line)
        size = [(160, 90), (80, 144), (120, 120)][i]
        for field in ("image_orig", "image_recon", "image_target", "object_mask", "occluder_mask"):
            is_mask = field.endswith("mask")
            w, h = size[::-1] if field == "image_recon" else size
            coarse = rng.integers(0, 256, (4, 4) if is_mask else (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC)
            if is_mask:
                image = image.point(lambda v: 255 * (v > 99))
            line[field] = f"{field}{i}" + (".png" if is_mask else request.param)
            image.save(path.parent / line[field], **({} if is_mask else {"quality": 98}))
        line["bbox_orig"], line["bbox_recon"] = [10, 20, 30.5, 40], [7, 3, 41, 60]
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return path


def test_reduced_images_train_as_the_large_ones(large, tmp_path):
    """Images without loss give the very same pixels; JPEG is compressed once more."""
    convert(str(large), tmp_path / "packed", image_size=48)
    before = open_source(str(large), Config().data)
    after = open_source(str(tmp_path / "packed"), Config().data)
    for i in range(3):
        a, b = (load_images(records[i], 48, "letterbox") for records in (before, after))
        for name in a:
            if name.startswith("bbox"):
                np.testing.assert_allclose(a[name], b[name], atol=1e-4)
            elif name.startswith("image") and large.with_name("image_orig0.jpg").is_file():
                assert np.abs(a[name].astype(int) - b[name]).mean() < 2
            else:
                np.testing.assert_array_equal(a[name], b[name])
    sizes = [sum(len(x[i].image_orig.read_bytes()) for i in range(3)) for x in (before, after)]
    assert sizes[1] < sizes[0] / 2


def test_small_images_are_not_made_larger(dataset, tmp_path):
    convert(str(dataset), tmp_path / "packed", image_size=448)
    record = open_source(str(tmp_path / "packed"), Config().data)[1]
    assert record.image_orig.read_bytes() == (dataset.parent / "orig1.png").read_bytes()


def test_a_stopped_conversion_goes_on(dataset, tokenizer, tmp_path, monkeypatch):
    real, made = convert_module._make, []

    def make(shard):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(shard)
        return real(shard)

    monkeypatch.setattr(convert_module, "_make", make)
    packed = tmp_path / "packed"
    with pytest.raises(KeyboardInterrupt):
        convert(str(dataset), packed, shard_size=3)
    with pytest.raises(DataError, match="is not finished: run the same htfa_jax.data.convert"):
        open_source(str(packed), Config().data)
    monkeypatch.setattr(convert_module, "_make", lambda shard: made.append(shard) or real(shard))
    with pytest.raises(DataError, match="unfinished conversion of other settings"):
        convert(str(dataset), packed, shard_size=2)
    times = {path.name: path.stat().st_mtime_ns for path in packed.glob("*.array_record")}
    convert(str(dataset), packed, shard_size=3)
    assert len(times) == len(made) - 2 == 1 and sorted(made) == [0, 1, 2]
    assert not (packed / UNFINISHED).exists()
    for name, time in times.items():
        assert (packed / name).stat().st_mtime_ns == time
    same(batches_of(packed, tokenizer), batches_of(dataset, tokenizer))
    made.clear()
    convert(str(dataset), packed, shard_size=3)
    assert not made
    with pytest.raises(DataError, match="holds shards of another conversion"):
        convert(str(dataset), packed, shard_size=2)


@pytest.fixture
def damaged(dataset, tmp_path):
    """The tiny dataset without an original and with an empty mask."""
    shutil.copytree(dataset.parent, tmp_path / "in")
    (tmp_path / "in" / "orig2.png").unlink()
    (tmp_path / "in" / "mask4.png").write_bytes(b"")
    return tmp_path / "in" / dataset.name


def test_a_bad_record_stops_the_conversion(damaged, tmp_path):
    with pytest.raises(DataError, match=r"record 2 \(id r2\): image_orig: no file at .*orig2.png"):
        convert(str(damaged), tmp_path / "packed")


def test_bad_records_are_left_out_on_request(damaged, tmp_path, capsys):
    arguments = [str(damaged), str(tmp_path / "packed"), "--on_error", "skip", "--shard_size", "3"]
    convert_module.main(arguments)
    said = capsys.readouterr().out
    assert "5 records in 3 shards" in said and "2 left out" in said
    assert "(id r2): image_orig: no file" in said and "mask4.png has no bytes" in said
    packed = open_source(str(tmp_path / "packed"), Config().data)
    assert [packed[i].id for i in range(5)] == ["r0", "r1", "r3", "r5", "r6"]


@pytest.mark.parametrize("flag", ["--shard_size", "--image_size", "--workers"])
def test_a_count_is_at_least_one(flag, dataset, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        convert_module.main([str(dataset), str(tmp_path / "packed"), flag, "0"])
    assert ended.value.code == 2
    assert f"{flag} 0 must be at least 1" in capsys.readouterr().err


def test_other_files_are_left_alone(dataset, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        convert(str(dataset), tmp_path)


def test_shards_are_checked_against_the_manifest(dataset, tmp_path):
    convert(str(dataset), tmp_path / "packed", shard_size=3)
    shard = next((tmp_path / "packed").glob("*-00001-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(DataError, match=f"the shard {shard} has .* bytes, manifest.json says"):
        open_source(str(tmp_path / "packed"), Config().data)
    shard.unlink()
    with pytest.raises(DataError, match=f"the shard {shard} is gone"):
        open_source(str(tmp_path / "packed"), Config().data)
