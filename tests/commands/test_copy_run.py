import shutil
import zipfile

import fsspec
import pytest

from htfa_jax.checkpoints.integrity import steps
from htfa_jax.copy_run import copy_run, main
from htfa_jax.errors import CheckpointError, DataError


@pytest.fixture
def bucket(tmp_path):
    """A URL that nothing is behind yet."""
    yield f"memory://{tmp_path.name}/run"
    fsspec.filesystem("memory").store.clear()


def content(folder):
    """{path inside: bytes} of a run, but for its lock, which another test may have taken."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "lock.json"]
    return {p.relative_to(folder): p.read_bytes() for p in files}


def test_a_run_comes_back_byte_for_byte(run_folder, bucket, tmp_path, capsys):
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "lock.json").write_text("{}")
    (run / "checkpoints/9.orbax-checkpoint-tmp-1").mkdir()
    (run / "checkpoints/9.orbax-checkpoint-tmp-1/half").write_text("x")
    main([str(run), bucket])
    assert "copied to memory://" in capsys.readouterr().out
    main([bucket, str(tmp_path / "back")])
    (run / "lock.json").unlink()
    shutil.rmtree(run / "checkpoints/9.orbax-checkpoint-tmp-1")
    assert content(tmp_path / "back") == content(run)


def test_again_only_what_is_new_is_copied(run_folder, bucket, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    first = copy_run(run, bucket)
    assert first.there == 0 and first.files == len(content(run))
    shutil.copytree(run / "checkpoints/7", run / "checkpoints/9")
    (run / "config.json").write_bytes((run / "config.json").read_bytes().replace(b"7", b"8"))
    again = copy_run(run, bucket)
    large = [p for p in content(run) if p.parts[0] in ("checkpoints", "frozen")]
    assert again.there == len([p for p in large if p.parts[1] != "9"])
    copy_run(bucket, tmp_path / "back")
    assert content(tmp_path / "back") == content(run)


def test_a_copy_that_is_cut_off_has_no_hashes(run_folder, bucket, tmp_path, monkeypatch):
    """Orbax takes the folder for a checkpoint; what is missing from it must be noticed."""
    whole = shutil.copyfileobj
    copied = []

    def failing(source, target, length):
        copied.append(target)
        if len(copied) == 9:
            raise OSError(5, "connection lost")
        whole(source, target, length)

    monkeypatch.setattr(shutil, "copyfileobj", failing)
    with pytest.raises(CheckpointError, match="cannot be copied to .*connection lost"):
        copy_run(run_folder, tmp_path / "half")
    assert not list((tmp_path / "half").rglob("hashes.json"))
    monkeypatch.undo()
    copy_run(run_folder, tmp_path / "half")
    assert content(tmp_path / "half") == content(run_folder)


def test_a_target_that_went_on_is_not_overwritten(run_folder, tmp_path):
    ahead = shutil.copytree(run_folder, tmp_path / "ahead")
    shutil.copytree(ahead / "checkpoints/7", ahead / "checkpoints/12")
    with pytest.raises(CheckpointError, match="holds step 12 of a run, .* only step 7"):
        copy_run(run_folder, ahead)
    assert steps(ahead) == [7, 12]


@pytest.mark.parametrize(
    "name", ["../../evil.txt", "a/../../../evil.txt", "a//b", "/etc/x", "a\\b"]
)
def test_a_bucket_s_key_that_leads_elsewhere_copies_nothing(bucket, tmp_path, name):
    store = fsspec.filesystem("memory").store
    folder = bucket.removeprefix("memory:/")
    for key in ("config.json", name):
        file = fsspec.filesystem("memory").open("/new", "wb")
        file.write(b"{}")
        file.close()
        store[f"{folder}/{key}"] = store.pop("/new")
    target = tmp_path / "deep/down/out"
    with pytest.raises(CheckpointError, match="nothing was copied"):
        copy_run(bucket, target)
    assert not list(tmp_path.rglob("*"))


def test_an_archive_is_no_run(tmp_path, monkeypatch):
    """Its members may be named with `..`; no chain of readers is opened."""
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("run/config.json", "{}")
        archive.writestr("run/../../slipped.txt", "x")
    monkeypatch.chdir(tmp_path)
    for url in ("zip://run::evil.zip", "zip://run::file://evil.zip", "zip://evil.zip"):
        with pytest.raises(DataError, match="'::' would open|zip:// is not read"):
            copy_run(url, "a/b/out")
    assert [path.name for path in tmp_path.rglob("*")] == ["evil.zip"]


def test_hidden_names_stay_where_they_are(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "frozen/.vq-half").mkdir()
    for name in ("frozen/.vq-half/weights.safetensors", ".bashrc"):
        (run / name).write_text("x")
    copy_run(run, tmp_path / "out")
    assert content(tmp_path / "out") == content(run_folder)


def test_links_are_not_copied(run_folder, tmp_path):
    """What they lead to is no part of the run, and may be a secret."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("private")
    for name, place in (
        ("logs", secret),
        ("notes.txt", secret / "key"),
        ("again", "."),
        (".hidden", secret),
    ):
        run = shutil.copytree(run_folder, tmp_path / f"run_{name}")
        (run / name).symlink_to(place)
        with pytest.raises(CheckpointError, match=f"{name} is a link, which a run does not hold"):
            copy_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_at_the_target_is_not_followed(run_folder, tmp_path):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    out.mkdir()
    (out / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="checkpoints is a link"):
        copy_run(run_folder, out)
    assert not list(elsewhere.iterdir()) and len(list(out.iterdir())) == 1


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a run: there is no config.json"):
        copy_run(tmp_path / "nowhere", tmp_path / "x")
    with pytest.raises(DataError, match="zzz://a"):
        copy_run("zzz://a", tmp_path / "x")
