"""A run that hangs says where; one without memory says what helps."""

import time

import jax
import jax.numpy as jnp
import pytest
from support import tiny

from htfa_jax.errors import TrainingError
from htfa_jax.training import plan
from htfa_jax.training.loop import Watchdog


def stand_still(seconds):
    time.sleep(seconds)


@pytest.mark.slow
def test_stacks_are_printed_without_a_step_and_not_with_them(tmp_path):
    path = tmp_path / "stacks"
    with path.open("w") as file:
        with Watchdog(0.5, file) as watchdog:
            for _ in range(8):
                time.sleep(0.1)
                watchdog.beat()
            assert path.read_text() == ""
            stand_still(0.8)
        said = path.read_text()
        assert said.startswith("Timeout (0:00:00.5") and "in stand_still" in said
        time.sleep(0.6)  # over
        with Watchdog(0, file) as watchdog:
            watchdog.beat()
    assert path.read_text() == said


def test_a_device_without_memory_gets_the_values_that_help(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "describe_plan", lambda config: "  peak 17 MiB")
    config = tiny(train__remat="dots", train__batch_size=4)
    with (
        pytest.raises(TrainingError) as error,
        plan.out_of_memory_explained(config, tmp_path),
    ):
        jax.block_until_ready(jax.jit(lambda: jnp.zeros(2**50, jnp.int8))())
    said = str(error.value)
    assert said.startswith("a device has too little memory: ") and "1125899906842" in said
    for helps in (
        "train.dtype=bfloat16 (is float32)",
        "train.remat=full (is dots)",
        "train.batch_size (is 4)",
        "optim.name=adamw_8bit (is adamw), in a new --workdir",
        "data.max_text_length",
        f"scripts/plan.py --config {tmp_path / 'config.json'}",
        "  peak 17 MiB",
    ):
        assert helps in said, said
    lean = tiny(train__remat="full", train__batch_size=1, train__dtype="bfloat16")
    assert not any("remat" in line or "train.b" in line for line in plan.remedies(lean))


def test_other_errors_of_devices_stay_as_they_are(tmp_path):
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        plan.out_of_memory_explained(tiny(), tmp_path),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
