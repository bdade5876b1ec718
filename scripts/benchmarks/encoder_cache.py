"""What keeping the work of frozen encoders on disk costs and saves (`training.encoder_cache`).

    python scripts/benchmarks/encoder_cache.py --config configs/debug.py \
        --config.held_objects.num_train=64

Weights are random, which changes no time. For each of nothing, codes, features and both: time and
disk space to make it, time to load an update's samples, and the median time of a training step,
compiled before, and what of it the processor worked (of a CPU that others use too, the steadier
figure). The four take turns, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from htfa_jax.checkpoints.manager import save_frozen
from htfa_jax.common.cli import command
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config, override
from htfa_jax.config.io import ConfigFlags, parse_args
from htfa_jax.data.pipeline import Collate, SampleLoader, samples_per_step
from htfa_jax.data.splits import open_split, open_tokenizer
from htfa_jax.models.factory import build_model
from htfa_jax.sharding.layout import Layout
from htfa_jax.training import encoder_cache
from htfa_jax.training.optim import learning_rate, make_optimizer
from htfa_jax.training.state import new_params, new_state
from htfa_jax.training.step import compile_train_step, put_update

KEPT = {
    "nothing": {},
    "codes": {"data.cache_codes": True},
    "features": {"data.cache_features": True},
    "both": {"data.cache_codes": True, "data.cache_features": True},
}


@dataclasses.dataclass(frozen=True)
class MeasureArgs:
    """Measures the encoder cache with --config (default: the preset `standard`)."""

    config: ConfigFlags
    repeats: int = 10  # steps of each kind


class Side:
    """A run that keeps some of it, or nothing."""

    def __init__(self, config: Config, folder: Path, trainable: Flat, frozen: Flat):
        self.layout, model, records = (
            Layout(config),
            build_model(config),
            open_split(config, "train"),
        )
        optimizer = make_optimizer(config.optim, schedule := learning_rate(config.optim, 100))
        self.frozen = frozen
        # Steps take the memory of their state, and all sides start from the same weights.
        trainable = jax.tree.map(jnp.copy, trainable)
        self.state = new_state(config.train, trainable, optimizer, self.layout)
        names = save_frozen(folder, config, frozen)
        start = time.perf_counter()
        # Of this measurement alone, so that it is made now.
        apart = override(config, {"data.cache_dir": tempfile.mkdtemp(dir=folder)})
        params = {**trainable, **frozen}
        kept = encoder_cache.open_or_make(apart, model, params, names, records, self.layout)
        self.making = time.perf_counter() - start
        self.bytes = sum(path.stat().st_size for path in kept.files.values()) if kept else 0
        tokenizer = open_tokenizer(config, folder, records)
        self.samples = min(samples_per_step(config.train, self.layout.num_shards), len(records))
        loader, collate = SampleLoader(records, tokenizer, config, kept), Collate(config, tokenizer)
        self.load = lambda: collate([loader(i) for i in range(self.samples)]).batch
        self.batch = put_update(config.train, self.layout, self.load())
        args = (config, model, optimizer, schedule, self.layout, self.state, self.frozen)
        self.run = compile_train_step(*args)
        self.loading, self.stepping, self.working = [], [], []

    def step(self) -> float:
        """One step; its loss, which waits for it."""
        self.state, metrics = self.run(self.state, self.frozen, self.batch)
        return float(metrics["loss"])

    def measure(self) -> None:
        """One more timing of loading and of a step."""
        start = time.perf_counter()
        self.load()
        loaded, worked = time.perf_counter(), time.process_time()
        self.step()
        self.loading.append(loaded - start)
        self.stepping.append(time.perf_counter() - loaded)
        self.working.append(time.process_time() - worked)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse_args(MeasureArgs, argv)
    config = override(args.config, {"pretrained.random_components": "as_configured"})
    with tempfile.TemporaryDirectory() as folder:
        weights = new_params(config, build_model(config), {}, Layout(config))
        sides = {
            name: Side(override(config, changes), Path(folder), *weights)
            for name, changes in KEPT.items()
        }
        losses = {name: side.step() for name, side in sides.items()}  # which compiles it
        for _ in range(args.repeats):
            for side in sides.values():
                side.measure()
    for name, side in sides.items():
        print(
            f"{name:<9} made in {side.making:6.1f} s, {side.bytes / 1e6:8.2f} MB; "
            f"{side.samples} samples load in {statistics.median(side.loading):.4f} s; "
            f"a step takes {statistics.median(side.stepping):.4f} s "
            f"({min(side.stepping):.4f} to {max(side.stepping):.4f}; "
            f"{statistics.median(side.working):.4f} s of the processor); "
            f"first loss {losses[name]:.5f}"
        )


if __name__ == "__main__":
    main()
