"""Paths, progress, logs, images of results, commands."""

import json
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import tiny

from htfa_jax import errors
from htfa_jax.common import param_paths
from htfa_jax.common.cli import command
from htfa_jax.common.logs import MetricWriter, log_to_file, log_to_terminal
from htfa_jax.common.signals import Stopped, StopSignal
from htfa_jax.config import TrainConfig
from htfa_jax.data.batch import Batch
from htfa_jax.data.pipeline import Loaded
from htfa_jax.errors import CheckpointError, ConfigError, DataError, TrainingError
from htfa_jax.evaluation import report
from htfa_jax.evaluation.metrics import Prediction
from htfa_jax.evaluation.panel import PanelRow, panel_png, read_png
from htfa_jax.models.layers import make_rngs, stack_layers
from htfa_jax.training.loop import Loop, duration
from htfa_jax.training.loss_guard import LossGuard


def test_a_module_flat_and_back():
    class Two(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)])

    graphdef, state = nnx.split(Two())
    flat = param_paths.flatten(state)
    assert sorted(flat) == [f"layers.{i}.{n}" for i in (0, 1) for n in ("bias", "kernel")]
    again = nnx.merge(graphdef, param_paths.unflatten(flat))
    np.testing.assert_array_equal(again.layers[1].kernel[...], flat["layers.1.kernel"])


def test_streams_give_the_keys_of_nnx():
    def made(rngs):
        stacked = stack_layers(lambda rngs: nnx.Linear(2, 3, rngs=rngs), 2, rngs)
        return [param_paths.flatten(nnx.state(m)) for m in (stacked, nnx.Linear(3, 4, rngs=rngs))]

    for a, b in zip(made(nnx.Rngs(7)), made(make_rngs(7)), strict=True):
        np.testing.assert_array_equal(a["kernel"], b["kernel"])


def test_a_regex_must_match_the_whole_path():
    table = ((r"decoder\..*", 1), (r".*bias", 2))
    assert param_paths.first_match(table, "decoder.head.bias", 0) == 1
    assert param_paths.first_match(table, "siglip.bias", 0) == 2
    assert param_paths.first_match(table, "vq.decoder.kernel", 0) == 0
    inside, outside = param_paths.split({"vq.a": 1, "vq_encoder.a": 2}, r"vq\..*")
    assert inside == {"vq.a": 1} and outside == {"vq_encoder.a": 2}


def test_durations():
    assert [duration(s) for s in (5.9, 185, 7380)] == ["5s", "3m05s", "2h03m"]


def test_log_lines_go_to_the_file_and_the_terminal(tmp_path, capsys):
    log = logging.getLogger("htfa_jax.something")
    with log_to_terminal(), log_to_file(tmp_path / "logs" / "train.log"):
        log.info("one %d", 1)
    log.info("two")
    assert capsys.readouterr().err.endswith("one 1\n")
    assert (tmp_path / "logs/train.log").read_text().endswith("one 1\n")


@pytest.mark.slow
def test_tensorboard_events_do_not_need_pytorch(tmp_path):
    """Which is installed here, and takes seconds to import."""
    code = """if True:
        import sys
        from pathlib import Path
        from htfa_jax.common.logs import MetricWriter
        MetricWriter(Path(sys.argv[1])).write_scalars(1, {"loss": 2.0})
        assert "torch" not in sys.modules
        import torch
        assert torch.ones(2).sum() == 2
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_metrics_are_lines_of_json_and_tensorboard_events(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write_scalars(3, {"loss": jnp.float32(0.5)})
    writer.write_images(3, {"panel": np.zeros((1, 4, 4, 3), np.uint8)})
    writer.write_texts(3, {"note": "x"})
    writer.flush()
    writer.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == 0.5 and json.loads(line)["step"] == 3
    (events,) = tmp_path.glob("events*")
    assert b"loss" in events.read_bytes() and b"panel" in events.read_bytes()


def test_a_line_that_a_killed_process_left_half_written_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for content, kept in ((b'{"step": 1}\n{"ste', b'{"step": 1}\n'), (b'{"st', b""), (b"", b"")):
        path.write_bytes(content)
        writer = MetricWriter(tmp_path)
        writer.write_scalars(2, {"loss": 1.0})
        writer.close()
        lines = path.read_bytes()
        assert lines.startswith(kept) and json.loads(lines[len(kept) :])["step"] == 2


@pytest.mark.parametrize(
    "error,code",
    [
        (ConfigError("a"), 2),
        (DataError("b"), 2),
        (CheckpointError("d"), 2),
        (TrainingError("c"), 1),
        (OSError(28, "No space left on device"), 1),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_commands_print_errors_as_sentences(error, code, debug, capsys):
    @command
    def main(argv=None):
        assert argv == ["x"]
        raise error

    with pytest.raises(SystemExit) as ended:
        main(["--debug", "x"] if debug else ["x"])
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert said.endswith(f"error: {error}\n")
    assert ("Traceback (most recent call last)" in said) == debug
    assert debug or said == f"error: {error}\n"


def test_every_error_of_the_package_is_of_one_family():
    family = {e for e in vars(errors).values() if isinstance(e, type)}
    assert all(issubclass(e, errors.HTFAError) for e in family) and len(family) == 8
    another = re.compile(r"^class \w+\((\w*Error|Exception)\)", re.M)
    for path in Path(errors.__file__).parent.rglob("*.py"):
        assert path.name == "errors.py" or not another.search(path.read_text()), path


def test_ctrl_c_ends_a_command_without_a_traceback(capsys):
    @command
    def main(argv=None):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_programming_errors_keep_their_traceback():
    @command
    def main(argv=None):
        raise KeyError("x")

    with pytest.raises(KeyError):
        main([])


def loop(tmp_path, step_fn, **settings):
    defaults = {
        "name": "train", "step_fn": step_fn, "put": lambda batch: batch, "num_steps": 4,
        "log_every": 2,
        "writer": MetricWriter(tmp_path), "samples_per_step": 2,
        "due": lambda step: True, "after_step": lambda step, state: None,
        "save": lambda state: None, "max_bad_records": 1, "guard": LossGuard(TrainConfig()),
        "stop": StopSignal(),
    }  # fmt: skip
    return Loop(**(defaults | settings))


def batches(errors=()):
    fields = {name: np.zeros(1) for name in Batch.__annotations__}
    for i in range(9):
        yield Loaded(Batch(**fields), [f"r{i}"], [e for at, e in errors if at == i])


def count_up(state, batch):
    step = state["step"] + 1
    return {"step": step}, {"loss": step * 1.0, "finite": True}


def test_the_loop_reports_means_and_stops_at_the_last_step(tmp_path):
    called = []
    state, stopped = loop(
        tmp_path, count_up, after_step=lambda i, s: called.append((i, s["step"]))
    ).run({"step": 1}, batches())
    assert state == {"step": 4} and not stopped
    assert called == [(2, 2), (3, 3), (4, 4)]
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["train/loss"]) for x in lines] == [(2, 2.0), (4, 3.5)]


def test_a_step_without_a_gradient_norm_is_left_out_of_the_mean(tmp_path):
    def step(state, batch):
        state, metrics = count_up(state, batch)
        return state, metrics | {"grad_norm": np.nan if state["step"] == 3 else 2.0}

    loop(tmp_path, step, log_every=4).run({"step": 0}, batches())
    (row,) = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["train/grad_norm"] == 2.0


def test_a_resumed_loop_writes_the_means_that_it_would_have_written(tmp_path):
    """Although the checkpoint came in the middle of the steps of a mean."""
    loop(tmp_path / "a", count_up, log_every=3).run({"step": 0}, batches())
    saved, stop = [], StopSignal()
    stop.requested = True
    halved = loop(
        tmp_path / "b", count_up, log_every=3, stop=stop,
        save=lambda state: saved.append(list(halved.window)),
    )  # fmt: skip
    halved.run({"step": 0}, batches())
    assert [m["loss"] for m in saved[0]] == [1.0]
    loop(tmp_path / "b", count_up, log_every=3, window=saved[0]).run({"step": 1}, batches())

    def rows(run):
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [(row["step"], row["train/loss"]) for row in map(json.loads, lines)]

    assert rows("a") == rows("b") == [(3, 2.0), (4, 4.0)]


def test_the_loop_ends_at_too_many_bad_records(tmp_path, caplog):
    with caplog.at_level("WARNING"), pytest.raises(DataError, match="max_bad_records=1.*third"):
        loop(tmp_path, count_up).run({"step": 0}, batches([(0, "the first"), (2, "the third")]))
    assert "skipped: the first" in caplog.text


def test_the_loop_finishes_its_step_when_asked_to_stop(tmp_path):
    def ask(step, state):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    saved = []
    with StopSignal() as stop:
        state, stopped = loop(tmp_path, count_up, after_step=ask, stop=stop, save=saved.append).run(
            {"step": 0}, batches()
        )
    assert state == {"step": 2} and stopped and saved == [state]


@pytest.mark.parametrize("first,second", [("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_the_second_signal_kills_whichever_it_is(first, second):
    code = (
        "import signal\n"
        "from htfa_jax.common.signals import StopSignal\n"
        "with StopSignal() as stop, stop.patiently():\n"
        f"    signal.raise_signal(signal.{first})\n"
        "    assert stop.requested\n"
        "    try:\n"
        f"        signal.raise_signal(signal.{second})\n"
        "    finally:\n"
        "        print('went on')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.Signals[second] and ended.stdout == "", ended.stderr


def test_a_signal_with_nothing_to_finish_stops_there_and_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped, match="SIGTERM"), StopSignal():
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_panel_shows_every_scene_and_every_image(tmp_path):
    def row(shade, answers=1):
        images = {name: np.full((8, 8, 3), shade) for name in ("original", "completion")}
        said = [Prediction(0, "color", "?", "red", "blue", None)] * answers
        return PanelRow("scene", images | {"alpha": np.full((8, 8), 0.5)}, said)

    sizes = []
    for rows in ([row(0.2)], [row(0.2), row(0.8, 7)]):
        (tmp_path / "panel.png").write_bytes(panel_png(rows))
        image = read_png((tmp_path / "panel.png").read_bytes())
        sizes.append(image.shape)
        for shade in (51, 204)[: len(rows)]:  # an image of one shade is a large even area
            assert (image == shade).all(axis=-1).mean() > 0.04
    assert sizes[0][1] == sizes[1][1] and sizes[0][0] < sizes[1][0]


def test_scores_without_text_or_images_have_a_table():
    scores = {
        "samples": 2,
        "losses": {"code_loss": 1.0, "loss": 0.3},
        "alignment": {"boxes": 2, "identity: no box": 0},
        "fusion": {"alpha_mean": 0.5},
    }
    assert "2 scenes  code_loss 1.0000" in report.score_table(scores)
    assert "no box" not in report.score_table(scores)
    assert report.scalars(scores) == {"code_loss": 1.0, "loss": 0.3, "alpha_mean": 0.5}
    assert tiny().loss.text_weight  # tables of full evaluations: test_evaluate


def test_public_names_are_found_and_others_are_not():
    import htfa_jax

    for name in htfa_jax.__all__:
        assert getattr(htfa_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Confg'"):
        htfa_jax.Confg  # noqa: B018


def test_the_panel_writes_what_a_model_says_as_it_is():
    said = [
        Prediction(0, "color", "?", text, "blue", None) for text in ("$^$", "a $\\foo$ b", "\x11")
    ]
    row = PanelRow("$_$", {"original": np.zeros((8, 8, 3))}, said)
    assert panel_png([row])
