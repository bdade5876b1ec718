"""The mesh axes that the batch is sharded over, and the device that a program is compiled for."""

import jax

# Mesh axes that cut a batch.
BATCH_AXES = ("data", "fsdp")


def ambient_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh of the program that is being traced; None if there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def target() -> str:
    """What the code being traced will run on: "cpu", "tpu", or "gpu" and its generation.

    A step may be compiled for devices that this machine does not have: the mesh knows them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if platform != "gpu":
        return platform
    here = [d for d in jax.local_devices() if d.platform == "gpu"]
    # JAX itself takes a GPU that is not here for one of generation 8.
    return f"gpu {here[0].compute_capability.split('.')[0] if here else 8}"


def keep_batch_cut(x: jax.Array) -> jax.Array:
    """Keeps activations [B, ...] cut along the batch, so that weights travel and they do not."""
    if ambient_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(BATCH_AXES))
