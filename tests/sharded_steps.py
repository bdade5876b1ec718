"""Training steps on 8 virtual devices; `test_sharding` runs this in processes of its own.

python tests/sharded_steps.py CASE... writes a JSON line for each case.
"""

import functools
import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from support import random_batch, random_weights, tiny

from htfa_jax.checkpoints.manager import Checkpoints
from htfa_jax.config import override
from htfa_jax.models.factory import build_model
from htfa_jax.sharding.layout import Layout
from htfa_jax.training import adam_8bit
from htfa_jax.training.optim import learning_rate, make_optimizer
from htfa_jax.training.plan import abstract_step
from htfa_jax.training.state import new_params, new_state
from htfa_jax.training.step import compile_train_step, put_update

STEPS, SAMPLES = 5, 8
# name: (devices, accumulation steps, settings of `sharding`)
CASES = {
    "one": (1, 1, {}),
    "replicated": (8, 1, {"mode": "replicated"}),
    "zero2 data": (4, 2, {"mode": "zero2", "data": 2}),
    "zero2 tensor": (8, 1, {"mode": "zero2", "tensor": 2}),
    "fsdp": (8, 1, {"mode": "fsdp"}),
    "fsdp tensor": (4, 2, {"mode": "fsdp", "data": 1, "tensor": 2}),
}
# Heads and widths that the tensor axis divides; the text loss in several chunks.
SIZES = {
    "siglip__num_heads": 4,
    "decoder__mlp_dim": 64,
    "loss__text_chunk": 24,
    "optim__schedule": "constant",
    "freeze__siglip": False,
    "pretrained__random_components": "as_configured",
}
# Matrices that outweigh everything small, and short sequences: memory is that of weights.
WIDE = {
    "level3__generation": False,
    "loss__code_weight": 0.0,
    "siglip__embed_dim": 256,
    "siglip__num_heads": 8,
    "siglip__mlp_dim": 1024,
    "decoder__embed_dim": 512,
    "decoder__num_heads": 8,
    "decoder__mlp_dim": 2048,
    "decoder__num_layers": 4,
    "level3__adapter_mlp_dim": 1024,
    "train__batch_size": 1,
    "train__accumulation_steps": 2,
    "train__dtype": "bfloat16",
    "train__remat": "full",
    # What takes compiling and has no weights.
    "level2__alignment": "none",
}


def named(settings):
    return {f"sharding.{name}": value for name, value in settings.items()}


class Run:
    """A small model in one of the cases, ready to train."""

    def __init__(self, case, **changes):
        devices, accumulation_steps, settings = CASES[case]
        config = override(tiny(**SIZES | changes), named(settings))
        self.layout = layout = Layout(config, jax.devices()[:devices])
        size = {
            "train.batch_size": SAMPLES // (layout.num_shards * accumulation_steps),
            "train.accumulation_steps": accumulation_steps,
        }
        self.config = config = override(config, size)
        model = build_model(config)
        trainable, self.frozen = new_params(config, model, random_weights(model), layout)
        schedule = learning_rate(config.optim, STEPS)
        optimizer = make_optimizer(config.optim, schedule)
        self.state = new_state(config.train, trainable, optimizer, layout)
        self.step = compile_train_step(
            config, model, optimizer, schedule, layout, self.state, self.frozen
        )

    def train(self, first, last):
        """Losses and gradient norms of some steps."""
        found = []
        for i in range(first, last):
            batch = random_batch(self.config, size=SAMPLES, seed=i)
            batch = put_update(self.config.train, self.layout, batch)
            self.state, metrics = self.step(self.state, self.frozen, batch)
            found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        return found


# One for each case: its step stays compiled, whatever state it is given.
ready = functools.cache(Run)


def restored(cases=("one", "fsdp tensor"), **changes):
    """Steps that begin in one case and go on in others, through a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        first = ready("zero2 tensor", **changes)
        before = first.train(0, 3)
        with Checkpoints(Path(folder), keep=1) as checkpoints:
            checkpoints.save(first.state, {})
        found = {}
        for case in cases:
            run = ready(case, **changes)
            like = {name: run.state[name] for name in ("params", "opt_state")}
            with Checkpoints(Path(folder), keep=1) as checkpoints:
                state = checkpoints.restore(3, **like)
            run.state |= {name: state[name] for name in like}
            same = jax.tree.map(
                lambda a, b: bool(np.array_equal(a, b)),
                [first.state[name] for name in like],
                [run.state[name] for name in like],
            )
            params = state["params"]
            wanted = {p: x.sharding == params[p].sharding for p, x in like["params"].items()}
            run.state["step"] = jax.device_put(3, run.layout.replicated)
            found[case] = {
                "same": all(jax.tree.leaves(same)),
                "places": all(wanted.values()),
                "steps": before + run.train(3, STEPS),
            }
    return found


def eight_bits():
    """Steps with 8-bit moments on one device, and from many to one."""
    adam_8bit.MIN_SIZE = 2000  # as large as this model's: words, an MLP, patches
    changes = {"level3__generation": False, "loss__code_weight": 0.0, "optim__name": "adamw_8bit"}
    changes |= {"level2__alignment": "none"}
    return {
        "one": ready("one", **changes).train(0, STEPS),
        "restored": restored(("one",), **changes),
    }


def codes():
    """8-bit moments after updates with given gradients: parts of the whole, how many differ."""
    shapes = {
        "decoder.layers.gate_proj.kernel": (2, 64, 128),
        "decoder.layers.down_proj.kernel": (2, 128, 64),
        "decoder.embed.embedding": (640, 64),
        "level2.q_proj.kernel": (96, 100),
    }
    grads = [
        {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
        for rng in map(np.random.default_rng, range(4))
    ]
    optimizer, found = adam_8bit.scale_by_adam_8bit(0.9, 0.999, 1e-8), []
    for case in ("one", "zero2 tensor"):
        devices, _, settings = CASES[case]
        layout = Layout(override(tiny(**SIZES), named(settings)), jax.devices()[:devices])
        state = {"params": grads[0], "opt_state": optimizer.init(grads[0])}
        places = layout.state(state)
        state = jax.device_put(state["opt_state"], places["opt_state"])
        update = jax.jit(
            lambda g, s: optimizer.update(g, s)[1],
            in_shardings=(places["params"], places["opt_state"]),
            out_shardings=places["opt_state"],
        )
        for grad in grads:
            state = update(jax.device_put(grad, places["params"]), state)
        found.append(state)
    parts = {
        path: [places["params"][path].shard_shape(shape)]
        + [flat[path].sharding.shard_shape(flat[path].shape) for flat in state[1:]]
        for path, shape in shapes.items()
    }
    differ = jax.tree.map(lambda a, b: float(np.mean(np.asarray(a) != np.asarray(b))), *found)
    return {"parts": parts, "differ": max(jax.tree.leaves((differ.mu, differ.nu)))}


def memory():
    """Bytes on a device of 8, by mode: of what is kept, and of what the compiler needs beside."""
    found = {}
    for mode in ("replicated", "zero2", "fsdp"):
        abstract = abstract_step(override(tiny(**SIZES | WIDE), {"sharding.mode": mode}))
        compiled = abstract.lower().compile()
        found[mode] = abstract.device_bytes() | {
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
            "sent images": re.findall(r"= .*,3\].* (?:all-|collective-).*", compiled.as_text()),
            "copy": sum(
                2 * int(np.prod(abstract.layout.used(path, x.shape).shard_shape(x.shape)))
                for path, x in abstract.state["params"].items()
            ),
        }
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        special = {"restored": restored, "8 bits": eight_bits, "codes": codes, "memory": memory}
        found = special[name]() if name in special else ready(name).train(0, STEPS)
        print(json.dumps([name, found]), flush=True)
