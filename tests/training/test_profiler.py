import jax
import jax.numpy as jnp
import pytest

from htfa_jax.training.loop import recorded


@pytest.mark.slow
def test_the_steps_after_the_first_two_are_recorded(tmp_path):
    def distinctive_step(x):
        return jnp.sin(x) @ x

    step = recorded(jax.jit(distinctive_step), tmp_path, 2)
    x = jnp.ones((8, 8))
    written = []
    for _ in range(6):
        x = step(x)
        written.append(len(list(tmp_path.rglob("*.xplane.pb"))))
    assert written == [0, 0, 0, 1, 1, 1]
    (trace,) = tmp_path.rglob("plugins/profile/*/*.xplane.pb")
    assert trace.read_bytes().count(b"distinctive_step") >= 2


def test_nothing_is_recorded_by_default(tmp_path):
    def step(x):
        return x

    assert recorded(step, tmp_path, 0) is step and not list(tmp_path.iterdir())
