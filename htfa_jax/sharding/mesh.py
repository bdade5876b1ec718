"""The mesh axes that the batch is sharded over, and the device that a program is compiled for."""

from typing import NamedTuple

import jax

# Mesh axes that a batch is sharded over.
BATCH_AXES = ("data", "fsdp")


def ambient_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh of the program that is being traced; None if there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


class Backend(NamedTuple):
    """What a program is compiled for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      generation: of an NVIDIA GPU, its major compute capability (8: Ampere, 9: Hopper); else 0.
    """

    platform: str
    generation: int = 0


def backend() -> Backend:
    """What the code being traced will run on.

    A step may be compiled for devices that this machine does not have: the mesh knows them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if platform != "gpu":
        return Backend(platform)
    here = [d for d in jax.local_devices() if d.platform == "gpu"]
    # JAX itself takes a GPU that is not here for one of generation 8.
    major = here[0].compute_capability.split(".")[0] if here else "8"
    return Backend("gpu", int(major) if major.isdigit() else 0)


def keep_batch_sharded(x: jax.Array) -> jax.Array:
    """Keeps activations [B, ...] sharded along the batch: weights travel, activations do not."""
    if ambient_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(BATCH_AXES))
