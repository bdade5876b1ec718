from pathlib import Path

import pytest

from htfa_jax.common.names import checked_name, inside, links, links_out

BAD = {
    "/etc/passwd": "is an absolute path",
    "../a": "leads out of",
    "a/../../b": "leads out of",
    "a/..": "leads out of",
    "": "has an empty part",
    "a//b": "has an empty part",
    "a/": "has an empty part",
    "./a": "has an empty part",
    "a\0b": "has a zero byte",
    "..\\a": "has a backslash",
    "a\\b": "has a backslash",
}


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_may_lead_elsewhere_is_refused(tmp_path, name):
    for check in (checked_name, lambda name: inside(tmp_path, name)):
        with pytest.raises(ValueError, match=BAD[name]):
            check(name)


def test_a_name_in_the_folder_is_its_path(tmp_path):
    for name in ("a.png", "a/b/c.png", "a..b", "...", ".hidden", "ü/漢 字"):
        assert checked_name(name) == name
        assert inside(tmp_path, name) == tmp_path / name


def test_links_are_followed_inside_alone(tmp_path, monkeypatch):
    secret, folder = tmp_path / "secret", tmp_path / "folder"
    (folder / "real").mkdir(parents=True)
    secret.mkdir()
    (folder / "within").symlink_to("real")
    (folder / "out").symlink_to(secret)
    (folder / "real/up").symlink_to("../../secret")
    (folder / "loop").symlink_to("loop")
    for name in ("out", "out/a", "real/up", "within/up/a"):
        with pytest.raises(ValueError, match="a link that leads out of"):
            inside(folder, name)
    assert inside(folder, "within/a") == folder / "within/a"
    assert inside(folder, "loop").is_symlink()
    assert sorted(links(folder)) == ["loop", "out", "real/up", "within"]
    assert sorted(links_out(folder)) == ["out", "real/up"]
    # The folder itself may be reached through a link.
    (tmp_path / "alias").symlink_to(folder)
    assert inside(tmp_path / "alias", "real/a") == tmp_path / "alias/real/a"
    monkeypatch.chdir(tmp_path)
    assert inside(Path("folder"), "real") == Path("folder/real")
