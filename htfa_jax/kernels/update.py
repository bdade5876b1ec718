"""An update that is applied or left out, decided on the device."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax

from htfa_jax.sharding import mesh

Tree = TypeVar("Tree")


def update_if(condition: jax.Array, update: Callable[[Tree], Tree], old: Tree) -> Tree:
    """`jax.lax.cond(condition, update, lambda old: old, old)`.

    On GPUs a branch makes the host read the condition, and the GPU waits for it: 3.3 ms between two
    steps of `standard` on an H200. There XLA selects while it writes the update (0.3 ms, no more
    memory). For a selection a CPU's program would keep both states.
    """
    if mesh.backend().platform == "gpu":
        return jax.tree.map(functools.partial(jax.lax.select, condition), update(old), old)
    return jax.lax.cond(condition, update, lambda old: old, old)
