"""Scores that were changed by hand are named, not a traceback."""

import json

import pytest

from htfa_jax.errors import CheckpointError
from htfa_jax.inference.export import evaluations

GOOD = {
    "step": 7,
    "answers": {"color": {"all": {"accuracy": float("nan")}}},
    "images": {"all": {"completed": {"psnr": 20}}},
}


def read(folder, scores, table=b"a table"):
    path = folder / "evaluation/test/metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scores))
    path.with_name("table.txt").write_bytes(table)
    return evaluations(folder, 7)


def test_scores_are_found(tmp_path):
    assert read(tmp_path, GOOD)["test"]["table.txt"] == "a table"
    assert read(tmp_path, {"step": 7})
    assert read(tmp_path, GOOD | {"step": 8}) == {}


@pytest.mark.parametrize(
    "scores,place",
    [
        ({"answers": {"color": {}}}, "answers > color > all > accuracy"),
        ({"answers": {"color": {"all": {"accuracy": "x"}}}}, "answers > color > all > accuracy"),
        ({"answers": {"color": [1]}}, "answers > color > all > accuracy"),
        ({"answers": 5}, "answers > a kind of question"),
        ({"answers": None}, "answers > a kind of question"),
        ({"images": {"all": {}}}, "images > all > completed > psnr"),
        ({"images": "x"}, "images > all > completed > psnr"),
        ({"images": {"all": {"completed": {"psnr": 10**400}}}}, "images > all > completed > psnr"),
    ],
)
def test_a_score_that_is_missing_is_named(tmp_path, scores, place):
    with pytest.raises(CheckpointError, match=f"metrics.json has no number at {place}: evaluate"):
        read(tmp_path, GOOD | scores)


def test_a_table_that_is_no_text(tmp_path):
    with pytest.raises(CheckpointError, match="table.txt cannot be read"):
        read(tmp_path, GOOD, b"\xff")
