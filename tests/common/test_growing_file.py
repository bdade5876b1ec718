"""Logs on a disk that is full for a while: the run goes on, and nothing is missing afterwards."""

import errno
import json
import logging
import os

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from htfa_jax.common import growing_file
from htfa_jax.common.growing_file import GrowingFile
from htfa_jax.common.logs import MetricWriter, log_to_file


class FullDisk:
    """A file whose disk has so many bytes left."""

    def __init__(self, file, left=0):
        self.file, self.left = file, left

    def write(self, content):
        if self.left == 0 and content:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(content[: self.left])
        self.left -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


def events(path):
    """The events of a file, each of which must be whole."""
    content, found = path.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        found.append(Event.FromString(content[12 : 12 + length]))
        assert len(content) >= 16 + length
        content = content[16 + length :]
    return found


@pytest.mark.parametrize("left", [0, 1, 7])
def test_what_a_full_disk_refuses_follows_later_and_no_half_is_left(tmp_path, left, caplog):
    path = tmp_path / "a"
    path.write_bytes(b"before\n")
    file = GrowingFile(path)
    whole, file._file = file._file, FullDisk(file._file, left)
    for piece in (b"first\n", b"second\n"):
        file.write(piece)
        content = path.read_bytes()
        assert content == b"before\n" + (b"first\n" if left == 7 else b"")
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    file._file = whole
    file.write(b"third\n")
    assert path.read_bytes() == b"before\nfirst\nsecond\nthird\n"
    assert "is written again" in caplog.text
    file.flush()
    file.close()
    assert "lacks" not in caplog.text


def test_what_waits_has_a_limit_and_what_is_lost_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(growing_file, "MOST", 10)
    file = GrowingFile(tmp_path / "a")
    file._file = FullDisk(file._file)
    for _ in range(5):
        file.write(b"12345")
    assert len(file._waiting) == 2
    file.close()
    assert "a lacks 5 entries" in caplog.text


def test_a_disk_that_is_full_for_a_moment_stops_no_metrics(tmp_path, caplog):
    """TensorBoard's own writer waits for ever after it."""
    writer = MetricWriter(tmp_path)
    files = [writer._lines, writer._board._file]
    whole = [file._file for file in files]
    for file in files:
        file._file = FullDisk(file._file)
    writer.write_images(1, {"panel": np.zeros((1, 30, 30, 3), np.uint8)})
    for step in range(2, 40):
        writer.write_scalars(step, {"train/loss": step / 2, "train/accuracy": 0.5})
    writer.flush()
    for file, original in zip(files, whole, strict=True):
        file._file = original
    writer.write_scalars(40, {"train/loss": 20.0})
    writer.write_texts(40, {"note": "x"})
    writer.close()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(2, 41))
    (path,) = tmp_path.glob("events.out.tfevents*")
    version, *found = events(path)
    assert version.file_version == "brain.Event:2"
    values = [(event.step, event.summary.value[0]) for event in found]
    losses = {step: value.simple_value for step, value in values if value.tag == "train/loss"}
    assert losses == {step: step / 2 for step in range(2, 41)}
    assert {"panel", "note/text_summary"} <= {value.tag for _, value in values}
    assert caplog.text.count("cannot be written") == 2


def test_a_log_file_on_a_full_disk_is_no_reason_to_end(tmp_path, caplog, capfd, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "train.log").symlink_to("/dev/full")
    with log_to_file(tmp_path / "train.log"):
        for _ in range(3):
            logging.getLogger("htfa_jax").info("x")
    said = capfd.readouterr().err
    assert said.count("No space left on device") == 1 and "Traceback" not in said
