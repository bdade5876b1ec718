"""Files and folders that are there whole or not at all, whoever else writes them."""

import json
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from htfa_jax.common import files
from htfa_jax.errors import CheckpointError, DataError

FILL = """
import sys, time
from pathlib import Path
from htfa_jax.common.files import whole_folder
from htfa_jax.errors import CheckpointError
with whole_folder(Path(sys.argv[1]), CheckpointError) as partial:
    (partial / "a").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def fill(folder, text):
    with files.whole_folder(folder, CheckpointError) as partial:
        (partial / "inside").mkdir()
        for name in ("a", "inside/b"):
            (partial / name).write_text(text)


def content(folder):
    return {p.name: p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path):
    """A folder that is there, from before."""
    fill(tmp_path / "above" / "folder", "old")
    return tmp_path / "above" / "folder"


def test_a_folder_takes_its_place_when_it_is_complete_and_replaces_an_older_one(folder):
    with files.whole_folder(folder, CheckpointError) as partial:
        (partial / "c").write_text("new")
        assert content(folder) == {"a": "old", "b": "old"}
    assert content(folder) == {"c": "new"}
    assert list(folder.parent.iterdir()) == [folder]
    umask = os.umask(0)
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyError("x"), KeyboardInterrupt])
def test_an_error_leaves_the_older_folder_and_nothing_else(folder, error):
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with (
        pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else expected) as raised,
        files.whole_folder(folder, CheckpointError) as partial,
    ):
        (partial / "c").write_text("half")
        raise error
    if isinstance(error, OSError):
        assert str(raised.value).startswith(f"{folder} cannot be written: No space left: its disk")
    assert content(folder) == {"a": "old", "b": "old"}
    assert list(folder.parent.iterdir()) == [folder]


def test_an_older_folder_comes_back_if_its_successor_cannot_be_moved(folder, monkeypatch):
    real = os.rename

    def rename(old, new):
        if new == folder and "a" not in os.listdir(old):
            raise OSError(39 if folder.exists() else 5, "no")
        real(old, new)

    monkeypatch.setattr(files.os, "rename", rename)
    with (
        pytest.raises(CheckpointError, match="cannot be written: .*no"),
        files.whole_folder(folder, CheckpointError) as partial,
    ):
        (partial / "c").write_text("new")
    assert content(folder) == {"a": "old", "b": "old"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="x cannot be written"):
        fill(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_many_writers_of_one_folder_do_not_meet(tmp_path):
    """Sixty times by four threads: each writes all of it, and one of them stays, whole."""
    folder = tmp_path / "folder"
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(fill, folder, str(i)) for i in range(60)]
    assert [write.exception() for write in writes] == [None] * 60
    found = content(folder)
    assert set(found) == {"a", "b"} and found["a"] == found["b"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path):
    folder = tmp_path / "folder"
    writer = subprocess.Popen(
        [sys.executable, "-c", FILL, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "writing\n"
    writer.kill()
    writer.wait()
    assert not folder.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".folder.") and content(left) == {"a": "half"}
    files.made_once(folder, "folder", lambda: fill(folder, "whole"))
    assert content(folder) == {"a": "whole", "b": "whole"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "folder.lock"]


def test_what_killed_writers_left_is_told_from_other_files(tmp_path):
    digits = "0123456789abcdef" * 2
    kept = {"a", ".a", f"a.{digits}", f".a.{digits[1:]}", f".b.{digits}", ".hidden.file"}
    for name in (*kept, f".a.{digits}"):
        (tmp_path / name).write_text("")
    files.drop_partials(tmp_path, "a")
    assert {p.name for p in tmp_path.iterdir()} == kept
    files.drop_partials(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == kept - {f".b.{digits}"}


def test_a_folder_without_what_it_must_hold_is_made_again(tmp_path):
    folder, made = tmp_path / "folder", []
    folder.mkdir()

    def make():
        made.append(1)
        fill(folder, "whole")

    for _ in range(2):
        files.made_once(folder, "x", make, holds="a")
    assert made == [1] and content(folder) == {"a": "whole", "b": "whole"}


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.json"
    for durable in (False, True):
        with pytest.raises(KeyError), files.whole_file(path, durable=durable) as file:
            file.write("half")
            raise KeyError("x")
        assert not list(tmp_path.iterdir())
    for text in ("ü", "new"):
        files.write_whole(path, json.dumps(text), durable=True)
        assert json.loads(path.read_text()) == text
    with files.whole_path(path) as partial:
        partial.write_text("3")
    assert path.read_text() == "3" and list(tmp_path.iterdir()) == [path]


def test_what_is_durable_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    happened = []
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}

    def fsync(number):
        is_folder = stat.S_ISDIR(os.fstat(number).st_mode)
        happened.append("names" if is_folder else "content")
        real["fsync"](number)

    monkeypatch.setattr(files.os, "fsync", fsync)
    for name in ("replace", "rename"):

        def move(*paths, name=name):
            happened.append(name)
            real[name](*paths)

        monkeypatch.setattr(files.os, name, move)
    files.write_whole(tmp_path / "a", "x")
    files.write_whole(tmp_path / "a", "x", durable=True)
    fill(tmp_path / "b", "x")
    assert happened[:4] == ["replace", "content", "replace", "names"]
    # Two files, the folder inside and the folder; then the name of it.
    assert sorted(happened[4:8]) == ["content", "content", "names", "names"]
    assert happened[8:] == ["rename", "names"]


def test_a_reader_finds_a_whole_file_at_any_time(tmp_path):
    path, wrong, over = tmp_path / "a", [], threading.Event()
    files.write_whole(path, "0" * 100_000)

    def read():
        while not over.is_set():
            text = path.read_text()
            if len(set(text)) != 1 or len(text) != 100_000:
                wrong.append(text[:10])

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(200):
        files.write_whole(path, str(i % 10) * 100_000)
    over.set()
    reader.join()
    assert not wrong


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "folder"
    with pytest.raises(DataError, match=f"{inside} cannot"), files.whole_folder(inside, DataError):
        pass
