"""Ten thousand made-up inputs; `scripts/reliability/fuzz.py` feeds more."""

import pytest
from reliability.fuzz import Targets, feed

# Those that compile a template or read files take longest.
INPUTS = {
    "record": 3000,
    "config.json": 600,
    "overrides": 1400,
    "template": 600,
    "labels": 1900,
    "checkpoint": 1500,
    "weights": 1000,
}


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return Targets(tmp_path_factory.mktemp("fuzz"))


def test_every_reader_is_fed(targets):
    assert targets.all.keys() == INPUTS.keys() and sum(INPUTS.values()) == 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_made_up_input_is_read_or_refused(targets, name):
    feed(targets, name, INPUTS[name])
