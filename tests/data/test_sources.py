"""Every kind of file gives the same records, and damage is told, never read."""

import gzip
import json
import logging
import multiprocessing
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import zstandard
from support import GOOD, tiny, write_dataset

from htfa_jax.common import files
from htfa_jax.config import DataConfig
from htfa_jax.copy_run import copy_run
from htfa_jax.data.sources import array_records, json_lines, record_cache
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.data.sources.mixture import Mixture
from htfa_jax.data.sources.open import open_source
from htfa_jax.data.splits import describe_training_data, open_split
from htfa_jax.data.storage import RemoteImage
from htfa_jax.errors import ConfigError, DataError


def many(num):
    return [{**GOOD, "id": str(i), "note": "ü" * (i % 7)} for i in range(num)]


def lines(records):
    return "".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for i, r in enumerate(records))


def to_lines(path, records):
    path.write_text(lines(records), encoding="utf-8")


def to_array(path, records):
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")


def to_gzip(path, records):
    half = len(records) // 2
    parts = (lines(part).encode() for part in (records[:half], records[half:]))
    path.write_bytes(b"".join(map(gzip.compress, parts)))  # two members, as `cat a.gz b.gz`


def to_zstandard(path, records):
    path.write_bytes(zstandard.compress(lines(records).encode()))


def to_array_in_gzip(path, records):
    path.write_bytes(gzip.compress(json.dumps(records).encode()))


def to_shard(path, records):
    writer = array_records.open_writer(path)
    for record in records:
        writer.write(array_records.pack(json.dumps(record).encode()))
    writer.close()


KINDS = {
    "d.jsonl": to_lines,
    "d.json": to_array,
    "d.jsonl.gz": to_gzip,
    "d.jsonl.zst": to_zstandard,
    "d.json.gz": to_array_in_gzip,
    "d.array_record": to_shard,
}


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"))


@pytest.fixture(params=KINDS)
def source(request, tmp_path):
    """Path of 300 records in each of the forms."""
    KINDS[request.param](tmp_path / request.param, many(300))
    return str(tmp_path / request.param)


def test_files_are_read_at_random(source, data, tmp_path):
    records = open_source(source, data)
    assert len(records) == 300 and source in repr(records) and "300 records" in repr(records)
    assert [records[i].id for i in (299, 0, 17)] == ["299", "0", "17"]
    assert records[5].raw["note"] == "ü" * 5
    assert records[0].image_orig == tmp_path / "a.jpg"
    assert f"{source}, record 9" in str(records[9].error("")), "in the user's own file"


def test_threads_and_processes_read_the_right_records(source, data):
    records = open_source(source, data)
    assert records[5].id == "5"  # opens the file
    copy = pickle.loads(pickle.dumps(records))
    with ThreadPoolExecutor(8) as pool:
        for opened in (records, copy):
            ids = pool.map(lambda i, s=opened: s[i].id, range(300))
            assert list(ids) == [str(i) for i in range(300)]


def test_identity_changes_with_the_file(source, data):
    before = open_source(source, data).identity
    assert open_source(source, data).identity == before
    os.utime(source, (1, 1))
    assert open_source(source, data).identity != before


def test_blank_lines_do_not_count(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    path.write_text("\n" + json.dumps(GOOD) + "\r\n\n  \n" + json.dumps(GOOD), encoding="utf-8")
    for size in (json_lines.PIECE, 7):
        monkeypatch.setattr(json_lines, "PIECE", size)
        records = RecordFile(path)
        assert len(records) == 2 and records[0].id == records[1].id == "7"


def test_an_index_takes_16_bytes_a_record(tmp_path):
    small, large = tmp_path / "s.jsonl", tmp_path / "l.jsonl"
    to_lines(small, many(10))
    to_lines(large, many(1010))
    sizes = [len(pickle.dumps(RecordFile(path))) for path in (small, large)]
    assert sizes[1] - sizes[0] <= 16 * 1000 + 50


# Files that are not copied again, files that are copied once.


def test_a_copy_is_made_once(tmp_path, data, caplog):
    path = tmp_path / "d.json"
    to_array(path, many(20))
    with caplog.at_level(logging.INFO, "htfa_jax"):
        open_source(str(path), data)
        assert "20 records indexed" in caplog.text
        caplog.clear()
        assert len(open_source(str(path), data)) == 20 and not caplog.text
        to_array(path, many(21))
        assert len(open_source(str(path), data)) == 21
        assert "21 records indexed" in caplog.text


def test_an_interrupted_copy_is_made_again(tmp_path, data, monkeypatch):
    path = tmp_path / "d.json"
    to_array(path, many(20))

    def killed(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", killed)
        patched.setattr(Path, "unlink", killed)  # a process that is killed cannot clean up
        with pytest.raises(KeyboardInterrupt):
            open_source(str(path), data)
    (left,) = (tmp_path / "cache" / "records").glob(".*" + array_records.SUFFIX + ".*")
    assert [r.id for r in map(open_source(str(path), data).__getitem__, range(20))] == [
        str(i) for i in range(20)
    ]
    assert not left.exists()
    assert len(list((tmp_path / "cache" / "records").glob("*" + array_records.SUFFIX))) == 1


def index(path, cache_dir, ready, results):
    """In another process: opens a file when all are there."""
    ready.wait()
    records = open_source(path, DataConfig(cache_dir=cache_dir))
    results.put([records[i].id for i in range(len(records))])


@pytest.mark.slow
def test_two_processes_may_copy_at_once(tmp_path):
    path = tmp_path / "d.json"
    to_array(path, many(3000))
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(2), context.Queue()
    arguments = (str(path), str(tmp_path / "cache"), ready, results)
    others = [context.Process(target=index, args=arguments) for _ in range(2)]
    for other in others:
        other.start()
    found = [results.get(timeout=60) for _ in others]
    for other in others:
        other.join()
    assert found == [[str(i) for i in range(3000)]] * 2
    assert len(list((tmp_path / "cache" / "records").glob("*" + array_records.SUFFIX))) == 1


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_arrays_are_read_in_pieces(tmp_path, data, monkeypatch, piece):
    monkeypatch.setattr(record_cache, "PIECE", piece)
    path = tmp_path / "d.json"
    to_array(path, many(9))
    records = open_source(str(path), data)
    assert [records[i].raw for i in range(9)] == many(9)


# Damage.


def record_with(text):
    return json.dumps(GOOD) + "\n" + text + "\n" + json.dumps(GOOD) + "\n"


@pytest.mark.parametrize(
    "text,reason",
    [
        (b'{"id": "\xff"}', "not UTF-8: byte 0xff at position 8"),
        (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "begins with a byte order mark"),
        (json.dumps(GOOD)[:-1].encode() + b",}", "a comma is left over"),
        (json.dumps(GOOD).encode() + b",", "a comma follows the record"),
        (b'{"id": ', "it ends in the middle"),
        (b'{"id": "abc', "it ends in the middle"),
        (b"[" * 100_000, "too many brackets"),
        (b"7", "a record must be an object, this is int"),
        (b"hello", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_a_damaged_line_is_one_bad_record(tmp_path, data, name, text, reason):
    content = record_with("@").encode().replace(b"@", text)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    records = open_source(str(path), data)
    assert len(records) == 3 and records[0].id == records[2].id == "7"
    with pytest.raises(DataError, match=f"{path}, record 1: .*{reason}"):
        records[1]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.zst"])
def test_half_a_record_at_the_end(tmp_path, data, name):
    path, content = tmp_path / name, lines(many(3)).encode()[:-20]
    path.write_bytes(zstandard.compress(content) if name.endswith("zst") else content)
    records = open_source(str(path), data)
    assert records[1].id == "1"
    with pytest.raises(DataError, match="record 2: not valid JSON: it ends in the middle"):
        records[2]


ARRAY = json.dumps(many(3))


@pytest.mark.parametrize(
    "content,reason",
    [
        (b"", "is empty: it has no bytes"),
        (b" \n ", "holds no records"),
        (b"[]", "holds no records"),
        (b"\xef\xbb\xbf" + ARRAY.encode(), "begins with a byte order mark"),
        (ARRAY.encode("utf-16"), "is UTF-16"),
        (ARRAY[:-1].encode() + b",]", "a comma is left over behind record 2"),
        (ARRAY[:-2].encode() + b",}]", "record 2: not valid JSON: a comma is left over"),
        (ARRAY[:-1].encode(), "behind record 2 a comma or . must follow, but the file ends"),
        (ARRAY[:-9].encode(), "record 2: not valid JSON: it ends in the middle"),
        (ARRAY.replace('}, {"id', '} {"id').encode(), "behind record 0 a comma or . must follow"),
        (ARRAY.encode() + b"x", "something follows the end"),
        (ARRAY.encode().replace(b"cup", b"c\xffp"), "not UTF-8: byte 0xff at position 1.."),
        (gzip.compress(ARRAY.encode(), mtime=0)[:-30], "the compressed file ends in the middle"),
        (zstandard.compress(ARRAY.encode())[:-9], "the compressed file ends in the middle"),
        (gzip.compress(ARRAY.encode(), mtime=0)[:40] + b"x" * 40, "the compressed file is damaged"),
    ],
)
def test_a_damaged_file_says_so(tmp_path, data, content, reason):
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}:? .*{reason}"):
        open_source(str(path), data)
    assert not list(tmp_path.glob("cache/records/*" + array_records.SUFFIX))


def test_no_file(data, tmp_path):
    for name in ("none.jsonl", "none.array_record", "none/*.array_record"):
        with pytest.raises(DataError, match="no (dataset|ArrayRecord files) at .*none"):
            open_source(str(tmp_path / name), data)
    with pytest.raises(DataError, match="no dataset at"):
        RecordFile(tmp_path / "none.jsonl")


def test_a_file_that_changes_under_a_run_is_told(tmp_path):
    path = tmp_path / "d.jsonl"
    to_lines(path, many(5))
    opened, other = RecordFile(path), RecordFile(path)
    assert opened[0].id == "0"
    path.write_text(path.read_text()[:200])
    with pytest.raises(DataError, match="record 4: the file became shorter"):
        opened[4]
    with pytest.raises(DataError, match="record 0: the file was changed since"):
        other[0]
    path.unlink()
    with pytest.raises(DataError, match="record 1: the file is gone"):
        pickle.loads(pickle.dumps(opened))[1]


# Shards.


@pytest.fixture
def folder(tmp_path):
    """A folder of three shards of 10 records."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        to_shard(folder / f"r-{i}-of-3.array_record", many(30)[10 * i : 10 * i + 10])
    return folder


def test_names_of_shards(folder, data):
    for name in (folder, folder / "*.array_record*", folder / "r-[012]-of-3.array_record"):
        records = open_source(str(name), data)
        assert [records[i].id for i in range(30)] == [str(i) for i in range(30)]
    assert records[0].image_orig == folder / "a.jpg"
    assert len(open_source(str(folder / "r-1*"), data)) == 10


def test_a_shard_that_disappears_is_named(folder, data):
    records = pickle.loads(pickle.dumps(open_source(str(folder), data)))
    assert records[3].id == "3"
    gone = folder / "r-2-of-3.array_record"
    gone.rename(folder / "elsewhere")
    assert records[19].id == "19"
    with pytest.raises(DataError, match=f"record 4: the shard {gone} is gone"):
        records[24]
    to_shard(gone, many(3))
    with pytest.raises(DataError, match=f"the shard {gone} was changed"):
        records[24]


@pytest.mark.slow
def test_a_damaged_shard_never_gives_a_wrong_record(folder, data):
    path = folder / "r-1-of-3.array_record"
    content = path.read_bytes()
    expected = [open_source(str(folder), data)[i].raw for i in range(30)]
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 255
        path.write_bytes(damaged)
        try:
            records = open_source(str(folder), data)
        except DataError as error:
            assert str(path) in str(error)
            continue
        failed = 0
        for i in range(len(records)):
            try:
                assert records[i].raw == expected[i]
            except DataError as error:
                failed += 1
                assert str(path) in str(error)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"{path} holds no records: it is damaged, cut off"):
        open_source(str(folder), data)


# Images stay inside their root.


def image(tmp_path, name, image_root=None):
    path = tmp_path / "set" / "d.jsonl"
    path.parent.mkdir(exist_ok=True)
    to_lines(path, [{**GOOD, "image_orig": name}])
    return RecordFile(path, image_root)[0].image_orig


@pytest.mark.parametrize(
    "name,reason",
    [
        ("../a.jpg", "leads out of"),
        ("x/../../a.jpg", "leads out of"),
        ("..", "leads out of"),
        ("/etc/passwd", "is an absolute path: set data.image_root"),
        ("memory://a.jpg", "is an absolute path"),
        ("a\0.jpg", "has a zero byte"),
    ],
)
def test_a_image_outside_of_the_folder_is_refused(tmp_path, name, reason):
    with pytest.raises(DataError, match=r"record 0 \(id 7\): image_orig=.* " + reason):
        image(tmp_path, name)


def test_a_root_that_the_user_gives_allows_what_is_in_it(tmp_path, monkeypatch):
    assert image(tmp_path, "x/../a.jpg") == tmp_path / "set" / "a.jpg"
    inside = str(tmp_path / "images" / "a.jpg")
    assert image(tmp_path, inside, str(tmp_path)) == Path(inside)
    assert image(tmp_path, "/a/b.jpg", "/") == Path("/a/b.jpg")
    assert image(tmp_path, "b.jpg", "/images") == Path("/images/b.jpg")
    monkeypatch.chdir(tmp_path)
    assert image(tmp_path, inside, "images") == Path("images/a.jpg")
    for name in (str(tmp_path / "a.jpg"), inside.replace("images", "images2"),
                 f"{tmp_path}/images/../a.jpg", "../a.jpg"):  # fmt: skip
        with pytest.raises(DataError, match="leads out of"):
            image(tmp_path, name, str(tmp_path / "images"))
    assert str(image(tmp_path, "a.jpg", "s3://b/x")) == "s3://b/x/a.jpg"
    assert str(image(tmp_path, "s3://b/x/y/a.jpg", "s3://b/x/")) == "s3://b/x/y/a.jpg"
    for name in ("s3://b/xy/a.jpg", "s3://b/x/../a.jpg", "gs://b/x/a.jpg", "/b/x/a.jpg"):
        with pytest.raises(DataError, match="leads out of"):
            image(tmp_path, name, "s3://b/x")


def test_a_link_out_of_the_folder_needs_a_root_that_the_user_gives(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/link").symlink_to(tmp_path / "private")
    with pytest.raises(DataError, match="link that leads out of .*data.image_root names another"):
        image(tmp_path, "link/a.jpg")
    place = tmp_path / "set/link/a.jpg"
    assert image(tmp_path, "link/a.jpg", str(tmp_path / "set")) == place


CHAINS = [
    "reference://x.jsonl::file://refs.json",
    "reference://x::data:,",
    "simplecache::memory://a.jsonl",
    "filecache::https://localhost/a.jsonl",
    "memory://a.jsonl::memory://b.jsonl",
    "zip://a.jsonl::evil.zip",
]
SCHEMES = """
    reference zip tar ssh sftp ftp smb github git local dir http jlab libarchive webhdfs generic
    dask data File
""".split()


@pytest.mark.parametrize("url", CHAINS + [f"{s}://a/b.jsonl" for s in (*SCHEMES, "")])
def test_urls_that_run_or_open_more_than_a_file_are_refused(tmp_path, data, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refs.json").write_text(
        json.dumps({"version": 1, "refs": {}, "templates": {}, "gen": [{
            "key": "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
            "url": "x", "dimensions": {"i": {"stop": 1}}}]})
    )  # fmt: skip
    before = set(sys.modules)
    if "://" in url:
        for read in (lambda: open_source(url, data), lambda: RemoteImage(url).read_bytes()):
            with pytest.raises(DataError, match="'::' would open a file|:// is not read"):
                read()
    with pytest.raises(DataError, match="'::' would open a file|:// is not read"):
        copy_run(url, str(tmp_path / "out"))
    assert not [name for name in set(sys.modules) - before if "fsspec.implementations" in name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["refs.json"]


def test_a_file_url_is_a_path_as_any_other(tmp_path, data):
    to_lines(tmp_path / "d.jsonl", [GOOD])
    records = open_source(f"file://{tmp_path}/d.jsonl", data)
    assert records[0].image_orig == tmp_path / "a.jpg"


# A template that leads nowhere, mixtures.


def test_a_template_is_checked_at_the_start(tmp_path):
    path = write_dataset(tmp_path, 3)
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    for record in raw:
        del record["image_recon"]
        record["number"] = int(record["id"][1:])
    path.write_text(lines(raw))
    records = open_source(str(path), DataConfig(recon_template="recon{number}.png"))
    assert records[2].image_recon == tmp_path / "recon2.png"
    with pytest.raises(DataError, match="leads to no file: there is none at .*recons/r0.png"):
        open_source(str(path), DataConfig(recon_template="recons/{id}.png"))
    with pytest.raises(DataError, match="needs the field nummer"):
        open_source(str(path), DataConfig(recon_template="{nummer}.png"))
    for template in ("recon.png", "{}.png", "{id.__class__}.png", "{id[0]}", "{id"):
        with pytest.raises(ConfigError, match="data.recon_template=.* must name fields"):
            tiny(data__recon_template=template)


def test_a_mixture_is_opened_from_its_names(tmp_path):
    for name, num in (("a", 5), ("b", 3)):
        to_lines(tmp_path / f"{name}.jsonl", [{**r, "id": name + r["id"]} for r in many(num)])
    sources = [[str(tmp_path / "a.jsonl"), 1.0], [str(tmp_path / "b.jsonl"), 2.5]]
    config = tiny(data__sources=sources)
    records = open_split(config, "train")
    assert isinstance(records, Mixture) and len(records) == 8 and records.weights == (1.0, 2.5)
    ids = [records[i].id for i in range(8)]
    assert ids == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2"]
    described = describe_training_data(config)
    assert described != describe_training_data(
        tiny(data__sources=[sources[0], [sources[1][0], 2.0]])
    )
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="data.sources: the weight of"):
            tiny(data__sources=[["a.jsonl", weight]])


# Remote files.


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


@pytest.mark.parametrize("name", KINDS)
def test_remote_files_are_read(tmp_path, data, memory, name):
    KINDS[name](tmp_path / name, many(30))
    memory.pipe(f"/set/{name}", (tmp_path / name).read_bytes())
    memory.pipe("/set/a.jpg", b"image")
    records = open_source(f"memory://set/{name}", data)
    assert [records[i].id for i in range(30)] == [str(i) for i in range(30)]
    assert records[3].image_orig.read_bytes() == b"image"
    assert not records[3].image_recon.is_file()
    with pytest.raises(FileNotFoundError):
        records[3].image_recon.read_bytes()


def test_remote_shards_by_pattern_and_folder(folder, data, memory):
    for path in folder.iterdir():
        memory.pipe(f"/set/{path.name}", path.read_bytes())
    for name in ("memory://set/r-*.array_record", "memory://set"):
        records = open_source(name, data)
        assert [records[i].id for i in range(30)] == [str(i) for i in range(30)]


def test_a_remote_file_that_is_missing(data):
    with pytest.raises(DataError, match="no dataset at memory://none.jsonl"):
        open_source("memory://none.jsonl", data)
    with pytest.raises(DataError, match="no ArrayRecord files at memory://none"):
        open_source("memory://none/*.array_record", data)
    with pytest.raises(DataError, match="nosuch"):
        open_source("nosuch://a.jsonl", data)


def test_what_to_install_for_a_scheme(data, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs://b/a.jsonl: .* pip install 'htfa-jax\[gs\]'"):
        open_source("gs://b/a.jsonl", data)
