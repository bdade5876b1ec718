"""Old names of fields, flags, metrics and of the API: they work, and say the new one."""

import json
import logging

import numpy as np
import pytest

from htfa_jax.checkpoints.integrity import listing
from htfa_jax.config import Config, load_config, override, renamed
from htfa_jax.config.io import fields_without_value, to_dict
from htfa_jax.config.renamed import current_flags, current_scores, takes_old_names
from htfa_jax.data.records import parse_record
from htfa_jax.evaluation.curves import read_curves
from htfa_jax.infer import InferArgs
from htfa_jax.inference.answer_attention import AnswerAttention
from htfa_jax.inference.options import Completion


@pytest.fixture(autouse=True)
def said(caplog):
    renamed._said.clear()
    caplog.set_level(logging.WARNING, "htfa_jax")
    return caplog


def test_a_config_json_of_an_earlier_version(tmp_path, said):
    values = to_dict(override(Config(), {"loss.occluded_cell_weight": 3.0}))
    values["loss"]["hidden_cell_weight"] = values["loss"].pop("occluded_cell_weight")
    values["train"]["best_metric"] = "psnr/hidden"
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    config = load_config(path)
    assert config.loss.occluded_cell_weight == 3.0
    assert config.train.best_metric == "psnr/occluded"
    assert "loss.hidden_cell_weight is now called loss.occluded_cell_weight" in said.text
    assert "metric psnr/hidden is now called psnr/occluded" in said.text
    load_config(path)
    assert said.text.count("is now called") == 2  # once each
    assert fields_without_value(path) == []


def test_flags(said):
    old = ["--config.loss.hidden_cell_weight=2", "--completion.passes", "4", "--limits.visits=3"]
    assert current_flags(old) == [
        "--config.loss.occluded_cell_weight=2",
        "--completion.refinement_steps",
        "4",
        "--limits.sessions=3",
    ]
    assert said.text.count("is now called") == 3


def test_lines_of_metrics_that_a_run_of_then_wrote(tmp_path):
    (tmp_path / "logs").mkdir()
    line = {"step": 4, "time": 2.0, "validation/accuracy/hidden_share": 0.25}
    (tmp_path / "logs/metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert read_curves(tmp_path) == {"validation/accuracy/occlusion_ratio": [(4, 0.25)]}


def test_the_command_takes_an_old_flag(monkeypatch, tmp_path):
    from htfa_jax import infer

    taken = []
    monkeypatch.setattr(infer, "predict", lambda args, *_: taken.append(args) or (0, 1))
    infer.main(["--demo", "--output_dir", str(tmp_path), "--completion.passes", "5"])
    assert taken[0].completion.refinement_steps == 5 and isinstance(taken[0], InferArgs)


def test_kinds_of_questions_on_a_command_line():
    old = ["hidden_share", "--questions", "category", "hidden_share", "--split", "hidden_share"]
    new = ["hidden_share", "--questions", "category", "occlusion_ratio", "--split", "hidden_share"]
    assert current_flags(old) == new


def test_parameters_and_attributes_of_the_python_api(said):
    assert Completion(passes=3) == Completion(refinement_steps=3)
    assert Completion(passes=3).passes == 3
    attention = AnswerAttention(("a",), np.zeros((1, 1, 1, 4)), np.zeros((1, 4)), 4)
    assert attention.words == ("a",)
    assert "parameter passes is now called refinement_steps" in said.text
    assert "AnswerAttention's attribute words is now called tokens" in said.text
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = attention.nothing
    with pytest.raises(TypeError, match="nothing"):
        Completion(nothing=1)


def test_an_attribute_of_another_class_is_no_old_name():
    @takes_old_names
    class Plain:
        pass

    with pytest.raises(AttributeError, match="words"):
        _ = Plain().words


def test_kinds_of_questions_in_records(said):
    raw = {
        "image_orig": "a.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nHow much?", "kind": "hidden_share"},
            {"from": "gpt", "value": "30 percent"},
        ],
    }
    record = parse_record(raw, "data.jsonl, line 1", lambda name: name)
    assert record.turns[0].kind == "occlusion_ratio"
    assert "kind of question hidden_share is now called occlusion_ratio" in said.text


def test_metrics_of_earlier_evaluations_and_checkpoints(tmp_path):
    old = {"pictures": {"hidden": {"completed": {"psnr": 3.0}}}, "answers": {"both_right": {}}}
    assert current_scores(old) == {
        "images": {"occluded": {"completed": {"psnr": 3.0}}},
        "answers": {"joint": {}},
    }
    step = tmp_path / "checkpoints" / "5"
    (step / "metrics").mkdir(parents=True)
    (step / "metrics" / "metrics").write_text(json.dumps({"psnr/hidden": 14.5}))
    (step / "_CHECKPOINT_METADATA").write_text("{}")
    (saved,) = listing(tmp_path)
    assert saved.metrics == {"psnr/occluded": 14.5}
