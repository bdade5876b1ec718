"""What visitors send and what belongs to their pages: bounded, theirs alone, deleted in the end."""

import asyncio
import contextlib
import gc
import os
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="the page needs the extra `demo`")

from htfa_jax.demo import files as files_module
from htfa_jax.demo.events import place_of
from htfa_jax.demo.files import Files
from htfa_jax.demo.options import Limits
from htfa_jax.demo.readers import Reader
from htfa_jax.demo.sessions import Session, Sessions
from htfa_jax.errors import Busy, DataError

MB = 10**6


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path / "files", Limits(kept_mb=4, kept_files=8))


def save(files, name="a.png", content=b"content", client="a"):
    with files.room(client, len(content)):
        return asyncio.run(files.save(client, name, content))


def test_only_files_that_it_keeps_are_found(files, tmp_path):
    kept, secret = save(files), tmp_path / "secret.txt"
    secret.write_text("secret")
    (files.root / "link").symlink_to(secret)
    assert files.find(str(kept)) == kept
    assert files.read(str(kept)).content == b"content"
    for name in (
        secret, f"{kept.parent}/../../../secret.txt", files.root / "link", files.root, "", "a.png",
        "/etc/passwd", "/proc/self/environ", f"file://{kept}", "http://127.0.0.1/x", "x" * 10_000,
        "a\0b", kept.parent / "other.png",
    ):  # fmt: skip
        assert files.find(str(name)) is None
        # Nobody learns what is where.
        with pytest.raises(DataError, match="is not kept any more: send it again"):
            files.read(str(name))


def test_a_name_is_kept_as_far_as_it_does_no_harm(tmp_path):
    files = Files(tmp_path / "files", Limits())
    for sent, kept in (
        ("mine (1).PNG", "mine _1_.PNG"),
        ("../../etc/passwd", "passwd"),
        ("..", "image"),
        ("", "image"),
        ("b" * 300 + "é.png", "b" * 55 + "é.png"),
        ('a"\r\nset-cookie: x', "a___set-cookie_ x"),
    ):
        assert save(files, sent).name == kept
    # Its place can be told neither from its content nor from its name.
    assert len({save(files, client=client).parent for client in "ab"}) == 1
    assert save(Files(files.root, files.limits)).parent != save(files).parent


def test_room_is_for_all_and_half_of_it_for_one(files):
    for i in range(3):
        save(files, content=b"%d" % i * (MB // 2))
    with pytest.raises(Busy, match="your uploads fill the room") as busy:
        save(files, content=bytes(MB))
    assert busy.value.by_this_client
    # What is on its way counts too.
    with files.room("b", 2 * MB), pytest.raises(Busy, match="uploads fill this server"):
        save(files, client="c", content=bytes(MB))
    save(files, client="c", content=bytes(MB))
    for i in range(4):
        save(files, client="d", name=f"{i}")
    with pytest.raises(Busy, match="your uploads"):
        save(files, client="d")


def test_an_upload_goes_with_the_last_page_that_used_it(files, monkeypatch):
    shared, own, unused = (save(files, name) for name in ("shared", "own", "unused"))
    for page, paths in (("a", (shared, own)), ("b", (shared,))):
        for path in paths:
            files.read(str(path), page)
    files.release("a")
    assert shared.exists() and not own.exists() and unused.exists()
    # Sent again by a page that has not used it yet.
    save(files, "shared")
    files.release("b")
    assert shared.exists()
    now = time.monotonic() + files_module.UNUSED + 1
    monkeypatch.setattr(time, "monotonic", lambda: now)
    files.sweep()
    assert not list(files.uploads.iterdir())


@pytest.mark.slow
def test_a_session_takes_its_files_with_it(files):
    session, upload = Session("a", files), save(files)
    files.read(str(upload), "a")
    session.begin("first", None, None)
    first = session.folder
    assert first.stat().st_mode & 0o777 == 0o755 and first.parent.stat().st_mode & 0o777 == 0o700
    (first / "completed.png").touch()
    session.begin("second", None, None)
    assert not first.exists() and session.folder != first
    second = session.folder
    session.close()
    assert not second.parent.exists() and not upload.exists()
    with pytest.raises(DataError, match="was closed"):
        session.begin("third", None, None)
    # One that nobody closes goes all the same.
    forgotten = Session("b", files)
    folder = forgotten._folder.name
    with pytest.warns(ResourceWarning):
        del forgotten
        gc.collect()
    assert not os.path.exists(folder)


def page():
    """What Gradio keeps of the pages."""
    return SimpleNamespace(
        fns={0: None},
        state_holder=SimpleNamespace(session_data={}, time_last_used={}, delete_state=print),
        _queue=SimpleNamespace(
            clean_events=lambda session_hash: asyncio.sleep(0),
            pending_messages_per_session={},
            pending_event_ids_session={},
        ),
    )


def test_who_comes_too_late_is_refused_and_nobody_is_thrown_out(files):
    async def test():
        gradio, sessions = page(), Sessions(4, files)
        async with contextlib.AsyncExitStack() as stack:
            for name in "abc":
                await stack.enter_async_context(sessions.connected(name, "one", gradio))
                gradio.state_holder.session_data[name] = name
            with pytest.raises(Busy, match="3 pages are open from your address"):
                sessions.check_room("one")
            async with sessions.connected("d", "two", gradio):
                with pytest.raises(Busy, match="4 pages are open, as many as this server takes"):
                    await stack.enter_async_context(sessions.connected("e", "three", gradio))
                # A second connection of one that is open is none more.
                async with sessions.connected("a", "one", gradio):
                    assert len(sessions) == 4
            assert "d" not in sessions and len(sessions) == 3
            assert set(gradio.state_holder.session_data) == set("abc")
            gradio.state_holder.session_data["an event that came late"] = 1
            await sessions.sweep(gradio)
            assert set(gradio.state_holder.session_data) == set("abc")
        assert len(sessions) == 0 and not gradio.state_holder.session_data

    asyncio.run(test())


def test_a_place_is_in_the_image():
    assert place_of([0, 9], (10, 10)) == (0.05, 0.95)
    assert place_of([-5, 10**9], (10, 10)) == (0, 1)
    for index in (None, [1], [1, 2, 3], ["x", 1], [float("nan"), 1], {}, [[1], 2], [10**400, 1]):
        with pytest.raises(DataError, match="no place"):
            place_of(index, (10, 10))


def test_what_takes_too_long_is_killed_and_the_next_is_read():
    reader = Reader(0.5)
    try:
        assert reader(max, 1, 2) == 2
        with pytest.raises(TimeoutError, match="takes more than 0.5 s"):
            reader(time.sleep, 30)
        with pytest.raises(EOFError, match="ends the program"):
            reader(os._exit, 1)
        with pytest.raises(ValueError, match="invalid literal"):
            reader(int, "x")
        assert reader(max, 1, 2) == 2
    finally:
        reader.close()
    with pytest.raises(EOFError):
        reader(max, 1, 2)
