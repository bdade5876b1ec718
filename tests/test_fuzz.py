"""Five thousand made-up inputs; `scripts/fuzz.py` feeds more."""

import pytest
from fuzz import Targets, feed

# Those that compile a template or read files take longest.
INPUTS = {
    "record": 1500,
    "config.json": 300,
    "overrides": 700,
    "template": 300,
    "labels": 1000,
    "checkpoint": 700,
    "weights": 500,
}


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return Targets(tmp_path_factory.mktemp("fuzz"))


def test_every_reader_is_fed(targets):
    assert targets.all.keys() == INPUTS.keys() and sum(INPUTS.values()) == 5_000


@pytest.mark.parametrize("name", INPUTS)
def test_made_up_input_is_read_or_refused(targets, name):
    feed(targets, name, INPUTS[name])
