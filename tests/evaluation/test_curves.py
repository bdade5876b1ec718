import json

import pytest

from htfa_jax.errors import DataError
from htfa_jax.evaluation.curves import curves_figure, read_curves


@pytest.fixture
def run(tmp_path):
    lines = [
        {"step": 2, "time": 1.0, "train/loss": 3.0, "train/text_loss": 2.0},
        {"step": 4, "time": 2.0, "train/loss": 2.5, "train/text_loss": 1.5},
        {
            "step": 4,
            "time": 3.0,
            "validation/loss": 2.7,
            "validation/accuracy/occlusion_ratio": 0.25,
        },
        {"step": 4, "time": 9.0, "train/loss": 2.4, "train/text_loss": 1.4},
    ]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return tmp_path


def test_a_step_that_was_made_again_counts_once(run):
    assert read_curves(run) == {
        "train/loss": [(2, 3.0), (4, 2.4)],
        "train/text_loss": [(2, 2.0), (4, 1.4)],
        "validation/loss": [(4, 2.7)],
        "validation/accuracy/occlusion_ratio": [(4, 0.25)],
    }


def test_every_curve_is_drawn_under_its_name(run):
    losses, answers = curves_figure(run).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in losses.lines}
    assert drawn == {"loss": [3.0, 2.4], "text": [2.0, 1.4], "loss, validation": [2.7]}
    (line,) = answers.lines
    assert line.get_label() == "occlusion ratio" and list(line.get_ydata()) == [0.25]


def test_half_a_last_line_is_that_of_a_run_that_writes_it(run):
    whole = read_curves(run)
    with (run / "logs/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "time": 9.5, "train/lo')
    assert read_curves(run) == whole
    with (run / "logs/metrics.jsonl").open("a") as file:
        file.write('\n{"step": 8, "time": 9.9, "train/loss": NaN}\n')
    with pytest.raises(DataError, match="metrics.jsonl, line 5: not valid JSON"):
        read_curves(run)


def test_a_line_of_something_else_is_named(run):
    for line in (
        {"train/loss": 1.0},
        {"step": "6", "train/loss": 1.0},
        {"step": 6, "train/loss": 10**400},
    ):
        (run / "logs/metrics.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(DataError, match="metrics.jsonl has a line that is not a step's"):
            read_curves(run)


def test_a_folder_without_lines_is_named(tmp_path):
    with pytest.raises(DataError, match="metrics.jsonl: expected the workdir of a run"):
        read_curves(tmp_path)
