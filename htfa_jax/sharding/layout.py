"""How arrays lie on devices: a mesh (data, fsdp, tensor), a table of paths, three modes.

`replicated` keeps everything on every device. `zero2` shards float32 weights, optimizer moments
and gradients over `fsdp`, as DeepSpeed's ZeRO stage 2 does (Rajbhandari et al., "ZeRO: Memory
Optimizations Toward Training Trillion Parameter Models", 2020); the compute-dtype parameters of a
step are replicated. `fsdp` shards these and the frozen weights too. In every mode `tensor` shards
the matrices of the decoder and of SigLIP between heads and between hidden units, and a batch is
sharded over (data, fsdp). XLA's partitioner inserts the communication.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, get
from htfa_jax.errors import ConfigError
from htfa_jax.sharding.mesh import BATCH_AXES

AXES = ("data", "fsdp", "tensor")
# Smaller parameters are not worth a message of their own.
MIN_SIZE = 1024
# Thinner slices than a sixteenth make TPU compilers fall back to all-reduce.
MAX_FSDP, MANY_DEVICES = 16, 32

_COLUMNS = r"(siglip|decoder)\.layers\.(attention\.[qkv]_proj|gate_proj|up_proj|fc1)"
_ROWS = r"(siglip|decoder)\.layers\.(attention\.o_proj|down_proj|fc2)"
# Mesh axes of a parameter's last dimensions. What names no `fsdp` is sharded along its largest one.
# The embedding is sharded along its width. Along the vocabulary, every lookup would need an
# all-gather of token ids.
TABLE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (_COLUMNS + r"\.kernel", ("fsdp", "tensor")),
    (_COLUMNS + r"\.bias", ("tensor",)),
    (_ROWS + r"\.kernel", ("tensor", "fsdp")),
    (r"decoder\.embed\.embedding", (None, ("tensor", "fsdp"))),
    (r"decoder\.head\.kernel", ("fsdp", "tensor")),
)
# What the `tensor` axis must divide.
_TENSOR_DIVIDES = """
    siglip.num_heads siglip.mlp_dim decoder.num_heads decoder.num_kv_heads decoder.mlp_dim
    decoder.embed_dim
""".split()


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that `config.sharding` asks for.

    Args:
      config: of the run.
      devices: to use; None for all of all processes.

    Raises ConfigError if the sizes do not give that number of devices, or if `tensor` does not
    divide the heads and widths that it shards.
    """
    devices = jax.devices() if devices is None else list(devices)
    total, wanted = len(devices), config.sharding
    sizes = {"data": wanted.data, "fsdp": wanted.fsdp, "tensor": wanted.tensor}
    if sizes["data"] is None:
        rest = total // max(sizes["tensor"], 1)
        many = sizes["fsdp"] == -1 and rest > MANY_DEVICES and rest % MAX_FSDP == 0
        sizes["data"] = rest // MAX_FSDP if many else 1
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: total // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != total:
        raise ConfigError(
            f"sharding.data={wanted.data}, sharding.fsdp={wanted.fsdp}, sharding.tensor="
            f"{wanted.tensor} make a mesh of {known} x the rest, which {total} devices do not "
            "fill: their product must be the number of devices (-1 takes what is left)"
        )
    for name in _TENSOR_DIVIDES:
        if get(config, name) % sizes["tensor"]:
            raise ConfigError(
                f"{name}={get(config, name)} must be a multiple of sharding.tensor="
                f"{sizes['tensor']}"
            )
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


class Layout:
    """Where the arrays of a run are.

    Args:
      config: of the run.
      devices: of the mesh; None for all.

    Attributes:
      mesh: the devices.
      platform: of the devices, as JAX names it.
      num_shards: shards of a batch.
      batch: of arrays whose first axis is samples.
      stacked_batch: of arrays [accumulation steps or layers, samples, ...].
      replicated: of arrays that every device has in full.
    """

    def __init__(self, config: Config, devices: Sequence[jax.Device] | None = None):
        self.mode, self.mesh = config.sharding.mode, make_mesh(config, devices)
        self.platform = self.mesh.devices.flat[0].platform
        self.num_shards = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        self.batch = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        self.stacked_batch = NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())

    def stored(self, path: str, shape: Sequence[int]) -> NamedSharding:
        """Of a trained parameter, its moments and its gradient."""
        return self._named(path, shape, sharded=self.mode != "replicated")

    def used(self, path: str, shape: Sequence[int]) -> NamedSharding:
        """Of what the forward pass reads: the compute-dtype parameters, and frozen parameters."""
        return self._named(path, shape, sharded=self.mode == "fsdp")

    def _named(self, path: str, shape: Sequence[int], *, sharded: bool) -> NamedSharding:
        spec = parameter_spec(path, shape, self.mesh.shape)
        if not sharded:
            spec = [_without_fsdp(entry) for entry in spec]
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def state(self, state: Any) -> Any:
        """Shardings of a training state (or of the shapes of one).

        What has the path and shape of a parameter lies as it does, also if an axis is only one
        long (scales of 8-bit moments), which is not sharded then; the rest is replicated.
        """
        shapes = {path: tuple(leaf.shape) for path, leaf in state["params"].items()}

        def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
            path = getattr(keys[-1], "key", None)
            shape = shapes.get(path, ())
            sizes = list(zip(leaf.shape, shape, strict=False))
            if leaf.ndim != len(shape) or any(n not in (1, full) for n, full in sizes):
                return self.replicated
            spec = self.stored(path, shape).spec
            spec = [x if n == full else None for x, (n, full) in zip(spec, sizes, strict=True)]
            return NamedSharding(self.mesh, PartitionSpec(*spec))

        return jax.tree_util.tree_map_with_path(place, state)

    def frozen(self, frozen: Mapping[str, Any]) -> dict[str, NamedSharding]:
        """Shardings of frozen parameters."""
        return {path: self.used(path, leaf.shape) for path, leaf in frozen.items()}

    def gather(self, params: Flat) -> Flat:
        """Inside a program: parameters as the forward pass reads them."""
        # First held where they are stored, so that what travels has this type, not the stored one.
        constrain = jax.lax.with_sharding_constraint
        return {
            path: constrain(constrain(x, self.stored(path, x.shape)), self.used(path, x.shape))
            for path, x in params.items()
        }

    def scatter(self, grads: Flat) -> Flat:
        """Inside a program: gradients summed over devices, each keeping its part."""
        return {
            path: jax.lax.with_sharding_constraint(x, self.stored(path, x.shape))
            for path, x in grads.items()
        }

    def inside(self, function: Callable) -> Callable:
        """`function`, traced with this mesh around it, which layers ask for."""

        def traced(*args: Any, **options: Any) -> Any:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return function(*args, **options)

        return traced

    @functools.cached_property
    def process_share(self) -> tuple[int, int]:
        """Which part of every batch this process loads: its number, of how many.

        Processes whose devices hold the same samples (a `tensor` axis that spans processes)
        load the same.
        """
        rows: dict[int, set[int]] = {}
        for device, (part,) in self.batch.devices_indices_map((self.num_shards,)).items():
            rows.setdefault(device.process_index, set()).add(part.start or 0)
        groups = sorted({tuple(sorted(part)) for part in rows.values()})
        if sum(map(len, groups)) != self.num_shards or len(set(map(len, groups))) != 1:
            raise ConfigError(
                f"the mesh {dict(self.mesh.shape)} gives processes unequal or overlapping parts of "
                f"a batch ({groups}): choose sharding.tensor so that it fits into a process, or "
                "spans whole ones"
            )
        return groups.index(tuple(sorted(rows[jax.process_index()]))), len(groups)

    def put(self, tree: Any, sharding: NamedSharding | None = None) -> Any:
        """This process's part of a batch as global arrays, sharded along the samples.

        Args:
          tree: host arrays.
          sharding: `batch`, the default, or `stacked_batch`.
        """
        sharding = sharding or self.batch
        if jax.process_count() == 1:
            return jax.device_put(tree, sharding)
        _, num_shares = self.process_share
        axis = sharding.spec.index(BATCH_AXES)

        def global_array(x: np.ndarray) -> jax.Array:
            shape = (*x.shape[:axis], x.shape[axis] * num_shares, *x.shape[axis + 1 :])
            return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)

        return jax.tree.map(global_array, tree)

    def put_parameter(self, value: Any, dtype: Any, sharding: NamedSharding) -> jax.Array:
        """A host array that every process has, cast and laid out; devices see their parts only."""
        if isinstance(value, jax.Array):
            value = to_host(value)
        return jax.make_array_from_callback(
            value.shape, sharding, lambda part: np.array(value[part], dtype)
        )

    def put_parameters(self, params: Mapping[str, Any]) -> Flat:
        """Parameters that nothing trains, laid out as the forward pass reads them."""
        shardings = self.frozen(params)
        return {p: self.put_parameter(x, x.dtype, shardings[p]) for p, x in params.items()}


def parameter_spec(path: str, shape: Sequence[int], mesh: Mapping[str, int]) -> list[Any]:
    """Mesh axes of each dimension of a trained parameter.

    Args:
      path: of the parameter; layers that are stacked have their own axis first, never sharded.
      shape: its shape.
      mesh: sizes by axis.
    """

    def divides(entry: Any, dim: int) -> bool:
        axes = [entry] if isinstance(entry, str) else list(entry or ())
        return dim % math.prod(mesh[axis] for axis in axes) == 0

    ends = param_paths.first_match(TABLE, path, ())[-len(shape) :] if shape else ()
    spec = [None] * (len(shape) - len(ends)) + list(ends)
    spec = [
        entry if divides(entry, dim) else _without_fsdp(entry)
        for entry, dim in zip(spec, shape, strict=True)
    ]
    if math.prod(shape) < MIN_SIZE:
        return [_without_fsdp(entry) for entry in spec]
    if not any(entry != _without_fsdp(entry) for entry in spec):
        first = int(param_paths.is_stacked(path))
        with_fsdp = {None: "fsdp", "tensor": ("tensor", "fsdp")}
        free = [
            (spec[i] is None, dim, i)
            for i, dim in enumerate(shape)
            if i >= first and spec[i] in with_fsdp and divides(with_fsdp[spec[i]], dim)
        ]
        if free:
            i = max(free)[-1]
            spec[i] = with_fsdp[spec[i]]
    return spec


def _without_fsdp(entry: Any) -> Any:
    return "tensor" if isinstance(entry, tuple) else None if entry == "fsdp" else entry


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array, on every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
