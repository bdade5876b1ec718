import numpy as np
import pytest

from htfa_jax.errors import CheckpointError
from weights_convert.convert import Rule, convert, linear, same

RULES = (
    Rule(r"layers\.(\w+)\.kernel", r"block.{layer}.\1.weight", linear),
    Rule(r"norm\.scale", "norm.weight", same),
)


def shapes():
    return {"layers.fc.kernel": np.zeros((2, 3, 4)), "norm.scale": np.zeros(5)}


def tensors():
    rng = np.random.default_rng(0)
    return {
        "block.0.fc.weight": rng.random((4, 3)),
        "block.1.fc.weight": rng.random((4, 3)),
        "norm.weight": rng.random(5),
        "head.weight": rng.random(2),
    }


IGNORED = {r"head\..*": "not needed"}


def test_stacks_layers_and_transposes():
    source = tensors()
    params = convert(shapes(), source, RULES, IGNORED)
    np.testing.assert_array_equal(params["layers.fc.kernel"][1], source["block.1.fc.weight"].T)
    np.testing.assert_array_equal(params["norm.scale"], source["norm.weight"])


@pytest.mark.parametrize(
    "break_it,message",
    [
        (lambda s, t: t.pop("block.1.fc.weight"), "no tensor block.1.fc.weight; nearest is"),
        (lambda s, t: t.update({"extra.weight": np.zeros(1)}), "extra.weight is not used"),
        (lambda s, t: s.update({"other.bias": np.zeros(1)}), "other.bias: 0 rules match"),
        (lambda s, t: t.update({"norm.weight": np.zeros(6)}), r"norm.scale \(5,\) <- norm.weight"),
    ],
)
def test_refuses_what_does_not_fit(break_it, message):
    s, t = shapes(), tensors()
    break_it(s, t)
    with pytest.raises(CheckpointError, match=message):
        convert(s, t, RULES, IGNORED)


def test_refuses_two_rules_for_one_parameter():
    twice = (*RULES, Rule(r"norm\..*", "norm.weight", same))
    with pytest.raises(CheckpointError, match="norm.scale: 2 rules match"):
        convert(shapes(), tensors(), twice, IGNORED)
