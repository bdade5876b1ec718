"""What a run would need: devices, parameters, tokens, operations, memory; nothing is run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, load_config, override
from htfa_jax.data.batch import Batch, cached_spec
from htfa_jax.errors import TrainingError
from htfa_jax.evaluation.report import columns
from htfa_jax.models import flops
from htfa_jax.models.factory import build_model
from htfa_jax.sharding.layout import Layout
from htfa_jax.training.optim import frozen_pattern, learning_rate, make_optimizer
from htfa_jax.training.state import TrainState, frozen_dtype, new_state
from htfa_jax.training.step import compile_train_step, params_dtype
from htfa_jax.training.topologies import Target, collectives

log = logging.getLogger(__name__)


def size_table(shapes: Mapping[str, Any], config: Config) -> str:
    """Parameters of each component, trainable and frozen, as text."""
    frozen, trainable = param_paths.split(shapes, frozen_pattern(config))

    def row(name: str, paths_: list[str]) -> str:
        counts = [
            sum(math.prod(flat[p].shape) for p in paths_ if p in flat)
            for flat in (trainable, frozen)
        ]
        return f"{name:<12}{counts[0]:>16,}{counts[1]:>16,}"

    names = dict.fromkeys(path.split(".")[0] for path in shapes)
    lines = [f"{'parameters':<12}{'trainable':>16}{'frozen':>16}"]
    lines += [row(n, [p for p in shapes if p.split(".")[0] == n]) for n in names]
    return "\n".join([*lines, row("all", list(shapes))])


def abstract_batch(config: Config, samples: int, text_length: int) -> Batch:
    """Shapes and types of a batch."""
    size = config.image_size
    image, mask = ((samples, size, size, 3), jnp.uint8), ((samples, size, size), jnp.bool_)
    box, flag = ((samples, 4), jnp.float32), ((samples,), jnp.bool_)
    tokens = ((samples, text_length), jnp.int32)
    kinds = {
        **dict.fromkeys(("image_orig", "image_recon", "image_target"), image),
        **dict.fromkeys(("object_mask", "occluder_mask"), mask),
        **dict.fromkeys(("region_orig", "region_recon", "bbox_orig", "bbox_recon"), box),
        **{name: flag for name in Batch.__annotations__ if name.startswith("has_")},
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": ((samples, text_length), jnp.float32),
        "weight": ((samples,), jnp.float32),
        "index": ((samples,), jnp.int32),
    }
    for name, (shape, dtype) in cached_spec(config).items():
        kinds[name] = (samples, *shape), dtype
    return Batch(**{name: jax.ShapeDtypeStruct(*kind) for name, kind in kinds.items()})


@dataclasses.dataclass(frozen=True)
class Abstract:
    """A run's training step and the shapes of what it takes; nothing is allocated.

    Attributes:
      step: as `compile_train_step` makes it.
      state, frozen, batch: shapes and types.
      optimizer: of the step.
      layout: where they would be.
      shapes: of all parameters, by path.
    """

    step: jax.stages.Wrapped
    state: TrainState
    frozen: Flat
    batch: Batch
    optimizer: optax.GradientTransformation
    layout: Layout
    shapes: Flat

    def lower(self) -> jax.stages.Lowered:
        """The step's program, for the devices of the layout."""
        return self.step.lower(self.state, self.frozen, self.batch)

    def device_bytes(self) -> dict[str, int]:
        """Bytes on each device, by kind."""

        def total(tree: Any, shardings: Any) -> int:
            sizes = jax.tree.map(
                lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize,
                tree,
                shardings,
            )
            return sum(jax.tree.leaves(sizes))

        shardings = self.layout.state(self.state)
        return {
            "trained weights": total(self.state["params"], shardings["params"]),
            "optimizer state": total(self.state["opt_state"], shardings["opt_state"]),
            "frozen weights": total(self.frozen, self.layout.frozen(self.frozen)),
        }

    def step_bytes(self, config: Config) -> dict[str, int]:
        """Bytes on each device that a step needs beside, by kind, activations not counted."""
        layout, params = self.layout, self.state["params"]

        def shard(path: str, sharding_of: Any) -> int:
            return math.prod(sharding_of(path, params[path].shape).shard_shape(params[path].shape))

        width = params_dtype(config).itemsize
        copy = 0
        if layout.mesh.size > 1 or width < 4:
            copy = width * sum(shard(path, layout.used) for path in params)
        # Of several accumulation steps they add up in float32.
        width = 4 if config.train.accumulation_steps > 1 else width
        gradients = width * sum(shard(path, layout.stored) for path in params)
        return {"compute-dtype parameters": copy, "gradients": gradients}


def abstract_step(
    config: Config, devices: Sequence[Any] | None = None, text_length: int | None = None
) -> Abstract:
    """The training step of a configuration, without its arrays.

    Args:
      config: of the run.
      devices: that it would run on, which need not be here; None for those that are.
      text_length: tokens of text; None for the longest of `data.text_buckets`.
    """
    layout, model = Layout(config, devices), build_model(config)
    frozen, trainable = param_paths.split(model.shapes, frozen_pattern(config))
    frozen = {
        path: jax.ShapeDtypeStruct(s.shape, frozen_dtype(path, config.train))
        for path, s in frozen.items()
    }
    schedule = learning_rate(config.optim, 100)
    optimizer = make_optimizer(config.optim, schedule)
    state = jax.eval_shape(lambda p: new_state(config.train, p, optimizer, layout), trainable)
    steps = config.train.accumulation_steps
    length = text_length or config.data.text_buckets[-1]
    batch = abstract_batch(config, config.train.batch_size * layout.num_shards, length)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((steps, *x.shape), x.dtype), batch)
    step = compile_train_step(config, model, optimizer, schedule, layout, state, frozen)
    return Abstract(step, state, frozen, batch, optimizer, layout, model.shapes)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs of each device.

    Attributes:
      kept: bytes by kind that stay from step to step; exact.
      estimated: bytes by kind that a step needs beside; their sum is the compiler's, how it
        divides is worked out from shapes.
      peak: bytes at the worst moment, as the compiler says.
      operations: floating-point operations of a sample, by component of the model.
      collectives: communications in the program's text, by kind.
    """

    kept: dict[str, int]
    estimated: dict[str, int]
    peak: int
    operations: dict[str, float]
    collectives: dict[str, int]


def make_plan(abstract: Abstract, config: Config) -> Plan:
    """Compiles the training step, which takes a minute or more for a large model."""
    compiled = abstract.lower().compile()
    memory, beside = compiled.memory_analysis(), abstract.step_bytes(config)
    rest = memory.temp_size_in_bytes - sum(beside.values())
    return Plan(
        kept=abstract.device_bytes(),
        estimated=beside | {"activations": max(rest, 0)},
        peak=memory.peak_memory_in_bytes,
        operations=flops.training_step(config, config.data.text_buckets[-1]),
        collectives=collectives(compiled.as_text()),
    )


def describe_plan(config: Config, target: Target | None = None) -> str:
    """The plan as text.

    Args:
      config: of the run.
      target: devices that are not here; None for those that are.
    """
    abstract = abstract_step(config, target and target.devices)
    found = make_plan(abstract, config)
    length, train, mesh = config.data.text_buckets[-1], config.train, abstract.layout.mesh
    device = mesh.devices.flat[0]
    patches, codes = config.num_patches, config.num_codes
    operations = sum(found.operations.values())

    def size(kind: str, bytes_: int, note: str = "") -> str:
        return f"  {kind:<18}{bytes_ / 2**20:>10,.0f} MiB{note}"

    lines = [
        f"devices      {mesh.size} x {device.device_kind}; mesh {dict(mesh.shape)}, "
        f"{config.sharding.mode}",
        size_table(abstract.shapes, config),
        f"tokens       {flops.sequence_length(config, length)} per sample: "
        f"{patches} understanding, {codes} generation, up to {length} text (longest bucket)",
        f"operations   {operations / 1e9:,.1f} GFLOP per sample and step ("
        + ", ".join(f"{name} {value / 1e9:,.1f}" for name, value in found.operations.items())
        + ")",
        f"samples      {train.batch_size} x {abstract.layout.num_shards} data shards per "
        f"accumulation step, {train.accumulation_steps} accumulation steps per update",
        "collectives  "
        + (", ".join(f"{n} {kind}" for kind, n in found.collectives.items()) or "none")
        + " in the program (in loops once)",
        "memory of a device",
        *(size(*item) for item in found.kept.items()),
        *(size(*item, "  (estimate)") for item in found.estimated.items()),
        size("peak", found.peak, "  (the compiler's)"),
    ]
    if target is not None:
        verdict = "fits" if found.peak <= target.memory else "DOES NOT FIT"
        lines.append(
            f"  {verdict}: {found.peak / 2**30:.1f} of {target.memory / 2**30:.1f} GiB of a "
            f"{target.name.split(':')[0]} chip"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def out_of_memory_explained(config: Config, workdir: Path) -> Iterator[None]:
    """Raises TrainingError with the values that help, where a device runs out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).removeprefix("RESOURCE_EXHAUSTED: ").split("\n")[0][:300]
        raise TrainingError(
            f"a device has too little memory: {said}\nWhat needs less of it:\n  "
            + "\n  ".join(remedies(config))
            + f"\nWhat `python scripts/plan.py --config {workdir / 'config.json'}` says of this "
            f"configuration:\n{_planned(config)}"
        ) from error


def remedies(config: Config) -> list[str]:
    """Fields of the configuration that can still help, those that cost least first."""
    train, found = config.train, []
    if train.dtype == "float32":
        found.append("train.dtype=bfloat16 (is float32)")
    if train.frozen_dtype == "float32":
        found.append("train.frozen_dtype=bfloat16 (is float32)")
    if train.remat != "full":
        found.append(f"train.remat=full (is {train.remat})")
    if config.sharding.reduce_dtype == "float32":
        found.append("sharding.reduce_dtype=compute (is float32)")
    if train.batch_size > 1:
        found.append(
            f"train.batch_size (is {train.batch_size}), with train.accumulation_steps "
            f"(is {train.accumulation_steps}) raised for as many samples per update"
        )
    found.append(f"eval.batch_size (is {config.eval.batch_size}), if an evaluation was under way")
    found.append(
        f"data.max_text_length and the last of data.text_buckets (are "
        f"{config.data.max_text_length} and {config.data.text_buckets[-1]})"
    )
    if jax.device_count() > 1 and config.sharding.mode != "fsdp":
        found.append(f"sharding.mode=fsdp (is {config.sharding.mode})")
    if config.optim.name == "adamw":
        found.append("optim.name=adamw_8bit (is adamw), in a new --workdir")
    if not config.is_frozen("decoder"):
        found.append("freeze.decoder=True, with a pretrained decoder, in a new --workdir")
    return found


def _planned(config: Config) -> str:
    try:
        return describe_plan(config)
    except Exception as error:  # a device without memory may not even compile
        return f"  nothing now: {str(error)[:300]}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a configuration is made of.

    Attributes:
      trainable, frozen: parameters.
      tokens: of a sample with the longest text.
      operations: floating-point operations of a sample in a training step.
      memory: bytes of all weights, moments, gradients and copies; activations not counted.
    """

    trainable: int
    frozen: int
    tokens: int
    operations: float
    memory: int


def sizes(name: str) -> Sizes:
    """What a preset or a file is made of, with pretrained components."""
    config = override(load_config(name), {"pretrained.random_components": "as_configured"})
    abstract = abstract_step(config, jax.devices()[:1])
    length = config.data.text_buckets[-1]
    kept, beside = abstract.device_bytes(), abstract.step_bytes(config)
    return Sizes(
        trainable=_number(abstract.state["params"]),
        frozen=_number(abstract.frozen),
        tokens=flops.sequence_length(config, length),
        operations=sum(flops.training_step(config, length).values()),
        memory=sum(kept.values()) + sum(beside.values()),
    )


def _number(arrays: Mapping[str, Any]) -> int:
    return sum(math.prod(x.shape) for x in arrays.values())


def preset_table(names: Sequence[str]) -> str:
    """Configurations by row, as text."""
    lines = [["preset", "trainable", "frozen", "tokens", "TFLOP", "memory"]]
    for name in names:
        found = sizes(name)
        lines.append(
            [
                name,
                f"{found.trainable / 1e6:,.1f} M",
                f"{found.frozen / 1e6:,.1f} M",
                f"{found.tokens:,}",
                f"{found.operations / 1e12:,.3g}",
                f"{found.memory / 2**30:,.2f} GiB",
            ]
        )
    return columns(lines)
