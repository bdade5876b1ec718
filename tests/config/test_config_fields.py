"""Every field of the configuration reaches the code: changing it changes something observable."""

import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import random_batch, tiny, write_dataset

from htfa_jax.checkpoints.manager import open_checkpoints
from htfa_jax.common.param_paths import split
from htfa_jax.config import Config, leaves, override
from htfa_jax.data.batch import split_for_accumulation
from htfa_jax.data.held_objects import builder
from htfa_jax.data.pipeline import (
    Loaded,
    evaluation_batches,
    num_steps,
    samples_per_step,
    training_batches,
)
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.data.splits import cache_folder, open_split, open_tokenizer
from htfa_jax.errors import CheckpointError, ConfigError, DataError, TrainingError
from htfa_jax.evaluation.evaluator import Evaluator, Report
from htfa_jax.inference.chat import checked_query
from htfa_jax.inference.sampler import GeneratedText
from htfa_jax.models.factory import build_model
from htfa_jax.models.losses import count, loss_and_metrics
from htfa_jax.models.registration import normalize_image
from htfa_jax.sharding.layout import Layout
from htfa_jax.training import encoder_cache, evaluations, vq_stage
from htfa_jax.training import trainer as train_module
from htfa_jax.training.loss_guard import LossGuard
from htfa_jax.training.optim import frozen_pattern, learning_rate, make_optimizer
from htfa_jax.training.plan import abstract_batch
from htfa_jax.training.pretrained import load_pretrained
from htfa_jax.training.state import new_params, new_state
from htfa_jax.training.step import make_train_step

# What nothing but speed or a place depends on.
EXEMPT = {
    "vq_train.perceptual_weight": "needs a folder of weights; test_train_vq shows what it does",
    "data.num_workers": "changes only how fast batches come; test_pipeline shows they are equal",
    "data.num_threads": "changes only how fast batches come; test_pipeline shows they are equal",
}

BASE = {
    "optim.schedule": "cosine_restarts",
    "optim.learning_rate_factors": ((r"level1\..*", 2.0),),
    "data.text_buckets": (70, 90),
    "pretrained.random_components": "as_configured",
    "data.validation": None,
    "data.test": None,
}


# Each of these turns a configuration into something that can be compared.


def shapes(config):
    """The parameters."""
    return {path: s.shape for path, s in build_model(config).shapes.items()}


def program(function, *args):
    """The operations of a function; nothing is compiled."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*args)))


def loss(config):
    """The loss with dropout."""
    model = build_model(config)
    batch = random_batch(config, size=2)

    def total(params, batch):
        merged = model.merge(params)
        return loss_and_metrics(merged, batch, count(batch, config), jax.random.key(0))

    return program(total, model.shapes, batch)


def refused(config):
    """Which lengths of text a configuration does not take."""
    try:
        override(config, {"data.max_text_length": 80})
    except ConfigError as error:
        return str(error)


def pixels(config):
    """What the encoders see of an image."""
    batch = random_batch(config, size=1)
    return normalize_image(batch.image_orig, batch.region_orig, config.data).tolist()


def initial(config):
    """How weights start and what they are stored as."""
    return program(lambda: new_params(config, build_model(config), {}, Layout(config)))


def frozen(config):
    """Which parameters an optimizer touches."""
    return frozen_pattern(config)


def optimizer(config):
    """The schedule and the update."""
    schedule = learning_rate(config.optim, 100)
    tx = make_optimizer(config.optim, schedule)
    params = {"level1.raw": jnp.ones((4, 4)), "decoder.kernel": jnp.ones((4, 6))}
    update = program(lambda p: tx.update(p, tx.init(p), p), params)
    return update, [float(schedule(i)) for i in (0, 1, 5, 50, 99)]


def step(config):
    """The whole training step."""
    config = override(config, {"level3.generation": False, "loss.code_weight": 0.0})
    model = build_model(config)
    schedule = learning_rate(config.optim, 100)
    tx = make_optimizer(config.optim, schedule)
    trainable = split(model.shapes, frozen_pattern(config))[1]
    layout = Layout(config)
    state = jax.eval_shape(lambda p: new_state(config.train, p, tx, layout), trainable)
    rest = {path: s for path, s in model.shapes.items() if path not in trainable}
    batch = random_batch(config, size=samples_per_step(config.train, 1))
    batch = split_for_accumulation(batch, config.train.accumulation_steps)
    return program(make_train_step(config, model, tx, schedule, layout), state, rest, batch)


def vq_step(config):
    """The loss, the choice of images and the revival of the VQ stage."""
    model = vq_stage.build_vq(config)
    tx = vq_stage.optax.adam(1e-3)
    params = model.shapes
    unused = jax.ShapeDtypeStruct((config.vq.codebook_size,), jnp.int32)
    state = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": params,
        "opt_state": {"tx": jax.eval_shape(tx.init, params), "unused": unused},
        "halted": jax.ShapeDtypeStruct((), bool),
    }
    return program(
        vq_stage.make_step(config, model, tx, Layout(config)), state, random_batch(config, size=2)
    )


def mesh(config):
    """The mesh of 8 imagined devices, and what of a matrix each of them keeps."""
    shapes, real = {}, jax.make_mesh

    def make_mesh(sizes, axes, **options):
        shapes.update(zip(axes, sizes, strict=True))
        return real((1, 1, 1), axes, devices=jax.devices()[:1], axis_types=options["axis_types"])

    jax.make_mesh = make_mesh
    try:
        layout = Layout(config, jax.devices() * 8)
    except ConfigError as error:
        return str(error)
    finally:
        jax.make_mesh = real
    return shapes, [str(f("level2.x", (64, 64)).spec) for f in (layout.stored, layout.used)]


def batches(config):
    """The first batches for training and for evaluation."""
    records = open_split(config, "train")
    folder = cache_folder(config.data)
    tokenizer = open_tokenizer(config, folder, records)
    found = itertools.islice(training_batches(config, records, tokenizer, 0, 2), 3)
    found = [*found, next(evaluation_batches(config, records, tokenizer))]
    return len(tokenizer), [
        (loaded.ids, [np.asarray(x).tobytes() for x in jax.tree.leaves(loaded.batch)])
        for loaded in found
    ]


def plan(config):
    """How many samples and updates."""
    samples = samples_per_step(config.train, 1)
    return samples, num_steps(config.train, 1000, samples)


def embedded(config):
    """What is asked of the embedded dataset."""
    asked = []

    def build(*args, **options):
        asked.append((args, options))
        return Path(config.data.train)

    config = override(config, {f"data.{s}": "held_objects" for s in ("validation", "test")})
    real, builder.build_scenes = builder.build_scenes, build
    try:
        for name in ("train", "validation", "test"):
            open_split(override(config, {"data.train": "held_objects"}), name)
    except DataError:
        pass
    finally:
        builder.build_scenes = real
    cache = str(cache_folder(config.data))
    return [(str(args).replace(cache, ""), options) for args, options in asked]


def opened(config):
    """What opening the data and the weights complains about."""
    said = []
    for attempt in (
        lambda: open_split(config, "train"),
        lambda: open_split(config, "validation"),
        lambda: open_split(config, "test"),
        lambda: open_tokenizer(config, cache_folder(config.data), RecordFile(config.data.train)),
        lambda: load_pretrained(config, build_model(config)),
    ):
        try:
            attempt()
            said.append("")
        except (DataError, CheckpointError) as error:
            said.append(str(error))
    return said


def vq_settings(config):
    """What the VQ stage gives to its loop."""
    seen = {}

    class Loop:
        def __init__(self, **settings):
            seen.update({k: v for k, v in settings.items() if isinstance(v, int | float)})
            self.due, self.after_step = settings["due"], settings["after_step"]
            self.window = []

        def run(self, state, batches):
            seen["saved"] = []
            for i in range(1, 7):
                if self.due(i):
                    self.after_step(i, i)
            raise KeyboardInterrupt

    class Checkpoints:
        def __init__(self, *args, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def resume(self, state, key, what):
            return state, {}

        def save(self, state, meta):
            seen["saved"].append(state)

    real = vq_stage.Loop, vq_stage.Checkpoints, vq_stage.optax.cosine_decay_schedule
    random_params = vq_stage.random_params
    vq_stage.Loop, vq_stage.Checkpoints = Loop, Checkpoints
    vq_stage.random_params = lambda config: {"codebook": jnp.zeros((2, 2))}

    def schedule(*args, **options):
        seen["schedule"] = args
        return real[2](*args, **options)

    vq_stage.optax.cosine_decay_schedule = schedule
    try:
        vq_stage.train_vq(config, cache_folder(config.data) / "vq_run")
    except KeyboardInterrupt:
        pass
    finally:
        vq_stage.Loop, vq_stage.Checkpoints, vq_stage.optax.cosine_decay_schedule = real
        vq_stage.random_params = random_params
    return seen


def skipped(config):
    """How many updates in a row that are not finite a run survives."""
    guard, loaded = LossGuard(config.train), Loaded(None, ["r0"], [])
    for i in range(99):
        try:
            assert not guard.passes("train", i, {"loss": float("nan"), "finite": 0.0}, loaded)
        except TrainingError:
            return i


def run(config):
    """What a run of steps that do nothing logs, evaluates and keeps; its end, if it fails."""
    config = override(
        config,
        {
            "data.validation": config.data.train,
            "data.test": None,
            "train.max_steps": 4,
            "level3.generation": False,
            "loss.code_weight": 0.0,
        },
    )
    workdir = cache_folder(config.data) / "run"
    workdir.mkdir()
    evaluated = []
    losses = iter([3.0, 1.0, 2.0, 4.0] * 2)

    class NoEvaluator:
        def __init__(self, *args):
            pass

        def __call__(self, params, records, max_samples=None, interrupt=None):
            evaluated.append(max_samples)
            value = next(losses)
            scores = {
                "samples": 1,
                "losses": {"loss": value, "text_loss": -value},
                "alignment": {},
                "fusion": {},
            }
            return Report(scores, [], [])

    def make_step(*args):
        def step(state, frozen, batch):
            metrics = {"loss": jnp.float32(1), "finite": jnp.bool_(True)}
            return {**state, "step": state["step"] + 1}, metrics

        return step

    def zeros(config, model, *_):
        weights = {path: np.zeros(s.shape, np.float32) for path, s in model.shapes.items()}
        return split(jax.device_put(weights), frozen_pattern(config))[::-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "compile_train_step", make_step)
        patch.setattr(train_module, "new_params", zeros)
        patch.setattr(evaluations, "Evaluator", NoEvaluator)
        try:
            train_module.train(config, workdir)
            failed = None
        except DataError as error:
            failed = str(error)
    with open_checkpoints(workdir, config.train) as checkpoints:
        best = checkpoints.best_step()
        kept = sorted(int(p.name) for p in checkpoints.folder.iterdir())
    lines = (workdir / "logs" / "metrics.jsonl").read_text().splitlines()
    logged = [row["step"] for row in map(json.loads, lines) if "train/loss" in row]
    profiles = len(list((workdir / "logs").rglob("*.xplane.pb")))
    return failed, best, kept, logged, evaluated, profiles


def kept(config):
    """What a sample of the training step holds, and whether the disk may hold 1,000 of them."""
    try:
        encoder_cache.check(config, 1000)
    except ConfigError as error:
        return str(error)
    return str(abstract_batch(config, 2, 70))


def decoding(config):
    """How answers are decoded and how many rows the panel gets."""
    config = override(config, {"eval.batch_size": 2})
    model = build_model(config)
    records = open_split(config, "train")
    tokenizer = open_tokenizer(config, cache_folder(config.data), records)
    evaluator = Evaluator(config, model, tokenizer, Layout(config))
    asked = []

    def look(params, batch):
        images = {"original": np.zeros((2, 4, 4, 3)), "occlusion_ratio": np.zeros(2)}
        return None, {"samples": 2.0}, images

    def answers(params, cache, prompts, decoding):
        asked.append(decoding)
        return [GeneratedText("", 0.5, np.zeros(1, np.int32), True)] * len(prompts)

    evaluator._look = look
    evaluator._losses = lambda params, batch: {}
    evaluator._sampler.answers = answers
    report = evaluator({}, records)
    return asked, len(report.panel)


# field: (another value, what it changes, settings that it takes)
CASES = {
    "seed": (1, initial),
    "image_size": (96, shapes),
    "fusion": ("tokens", shapes),
    "siglip.patch_size": (16, shapes),
    "siglip.embed_dim": (48, shapes),
    "siglip.num_layers": (1, shapes),
    "siglip.num_heads": (2, loss),
    "siglip.mlp_dim": (40, shapes),
    "siglip.layer_norm_eps": (1e-3, loss),
    "siglip.hidden_act": ("gelu", loss),
    "vq.stem": (4, shapes),
    "vq.base_channels": (16, shapes),
    "vq.channel_multipliers": ((1, 2), shapes),
    "vq.num_res_blocks": (2, shapes),
    "vq.attention": ("lowest", shapes),
    "vq.z_channels": (24, shapes),
    "vq.codebook_size": (30, shapes),
    "vq.codebook_dim": (8, shapes),
    "vq.normalize_codes": (False, loss),
    "vq.has_decoder": (False, shapes),
    "decoder.vocab_size": (700, shapes),
    "decoder.embed_dim": (48, shapes),
    "decoder.num_layers": (1, shapes),
    "decoder.num_heads": (2, loss),
    "decoder.num_kv_heads": (4, shapes),
    "decoder.mlp_dim": (60, shapes),
    "decoder.rope_theta": (1e4, loss),
    "decoder.rope_factor": (2.0, loss),
    "decoder.max_positions": (130, refused),
    "decoder.rms_norm_eps": (1e-3, loss),
    "decoder.dropout": (0.1, loss),
    "decoder.tie_head": (True, shapes),
    "decoder.attention_bias": (True, shapes),
    "level1.alpha": ("map", shapes),
    "level1.init_alpha": (0.7, initial),
    "level1.learnable": (False, shapes),
    "level1.num_scales": (2, loss, {"level1.alpha": "map"}),
    "level1.head_channels": (6, shapes),
    "level2.num_heads": (2, loss),
    "level2.dropout": (0.2, loss),
    "level2.alignment": ("none", loss),
    "level2.values": ("fused", loss),
    "level2.append_reconstruction": (False, shapes),
    "level2.mask_keys": (False, loss),
    "level2.intensity_threshold": (0.2, loss),
    "level3.generation": (False, shapes, {"loss.code_weight": 0.0}),
    "level3.adapter_mlp_dim": (None, shapes),
    "level3.adapter_dropout": (0.3, loss),
    "level3.adapter_norm": (False, shapes),
    "loss.text_weight": (0.5, loss),
    "loss.code_weight": (0.5, loss),
    "loss.label_smoothing": (0.1, loss),
    "loss.occluded_cell_weight": (2.0, loss),
    "loss.text_chunk": (16, loss),
    "freeze.siglip": (False, frozen),
    "freeze.vq": (False, shapes),
    "freeze.decoder": (True, frozen),
    "freeze.adapters": (True, frozen),
    "freeze.level1": (True, frozen),
    "freeze.level2": (True, frozen),
    "pretrained.siglip": ("nowhere", opened),
    "pretrained.vq": ("nowhere", opened),
    "pretrained.decoder": ("nowhere", opened),
    "pretrained.run": ("nowhere", opened),
    "pretrained.htfa": ("nowhere", opened),
    "pretrained.random_components": ("train", frozen),
    "data.train": ("nowhere.json", opened),
    "data.sources": ((("nowhere.json", 1.0),), opened),
    "data.validation": ("nowhere.json", opened),
    "data.test": ("nowhere.json", opened),
    "data.image_root": (".", lambda c: open_split(c, "train").place),
    "data.recon_template": ("{image_orig}", batches),
    "data.tokenizer": ("nowhere", opened),
    "data.tokenizer_vocab_size": (300, batches),
    "data.resize": ("squash", batches),
    "data.image_mean": ((0.4, 0.5, 0.5), pixels),
    "data.image_std": ((0.4, 0.5, 0.5), pixels),
    "data.use_object_mask": (False, loss),
    "data.drop_recon": (0.9, batches),
    "augment.crop": (0.5, batches),
    "augment.flip": (0.9, batches),
    "augment.brightness": (0.5, batches),
    "augment.gamma": (0.5, batches),
    "augment.saturation": (0.5, batches),
    "data.default_query": ("What?", lambda c: checked_query(c.data, None)),
    "data.max_text_length": (20, batches),
    "data.text_buckets": ((80, 90), batches),
    "data.on_error": ("skip", run),
    "data.max_bad_records": (0, run, {"data.on_error": "skip"}),
    "data.cache_dir": ("elsewhere", lambda c: cache_folder(c.data).name == "elsewhere"),
    "data.cache_codes": (True, kept),
    "data.cache_features": (True, kept),
    "data.cache_gb": (1e-6, kept, {"data.cache_codes": True}),
    "held_objects.num_train": (7, embedded),
    "held_objects.num_validation": (7, embedded),
    "held_objects.num_test": (7, embedded),
    "held_objects.seed": (7, embedded),
    "held_objects.answers": ("sentence", embedded),
    "optim.name": ("lion", optimizer),
    "optim.learning_rate": (1e-2, optimizer),
    "optim.learning_rate_factors": ((), optimizer),
    "optim.b1": (0.8, optimizer),
    "optim.b2": (0.8, optimizer),
    "optim.eps": (1e-6, optimizer),
    "optim.weight_decay": (0.1, optimizer),
    "optim.no_decay": (".*kernel", optimizer),
    "optim.clip_norm": (2.0, optimizer),
    "optim.schedule": ("linear", optimizer),
    "optim.num_cycles": (3, optimizer),
    "optim.min_ratio": (0.2, optimizer),
    "optim.warmup_ratio": (0.2, optimizer),
    "optim.warmup_steps": (7, optimizer),
    "sharding.mode": ("fsdp", mesh),
    "sharding.data": (2, mesh),
    "sharding.fsdp": (4, mesh),
    "sharding.tensor": (2, mesh, {"siglip.num_heads": 4}),
    "sharding.reduce_dtype": ("float32", step, {"train.dtype": "bfloat16"}),
    "train.batch_size": (4, plan),
    "train.accumulation_steps": (2, step),
    "train.epochs": (7, plan, {"train.max_steps": None}),
    "train.max_steps": (7, plan),
    "train.dtype": ("bfloat16", loss),
    "train.frozen_dtype": ("bfloat16", initial),
    "train.remat": ("full", loss),
    "train.log_every": (2, run),
    "train.on_nonfinite": ("skip", skipped),
    "train.max_skipped": (2, skipped, {"train.on_nonfinite": "skip"}),
    "train.watchdog_seconds": (60.0, vq_settings),
    "train.profile_steps": (2, run),
    "train.save": ("no", run),
    "train.save_every": (2, run, {"eval.during_training": "no"}),
    "train.keep_checkpoints": (1, run),
    "train.best_metric": ("text_loss", run),
    "train.best_mode": ("max", run),
    "eval.during_training": ("no", run),
    "eval.every": (2, run),
    "eval.batch_size": (4, batches),
    "eval.max_samples": (2, run),
    "eval.max_new_tokens": (9, decoding),
    "eval.panel_samples": (3, decoding),
    "vq_train.num_steps": (5, vq_settings),
    "vq_train.batch_size": (6, vq_settings),
    "vq_train.learning_rate": (1e-2, vq_settings),
    "vq_train.commitment_weight": (0.5, vq_step),
    "vq_train.l1_weight": (0.5, vq_step),
    "vq_train.l2_weight": (0.5, vq_step),
    "vq_train.revive_after": (50, vq_step),
    "vq_train.save_every": (2, vq_settings),
}
RUN = {
    "train.save": "steps",
    "train.save_every": 1,
    "train.log_every": 1,
    "train.keep_checkpoints": 2,
    "eval.during_training": "steps",
    "eval.every": 1,
    "vq_train.save_every": 3,
}


# Fields whose case takes an image of another shape, or one that is not there.
ODD_RECORD = {
    "data.on_error": "missing.png",
    "data.max_bad_records": "missing.png",
    "data.resize": "wide.png",
    "data.recon_template": "orig3.png",
}


def test_every_field_has_a_case_or_a_reason():
    names = {name for name, _ in leaves(Config())}
    assert set(CASES) | set(EXEMPT) == names
    assert not set(CASES) & set(EXEMPT)


@pytest.fixture(scope="module")
def before():
    """What was seen of configurations without their change."""
    return {}


@pytest.mark.parametrize("name", CASES)
def test_it_reaches_the_code(name, dataset, before, tmp_path):
    value, look, needs = (*CASES[name], {})[:3]
    records = dataset
    if name in ODD_RECORD:
        records = write_dataset(tmp_path / "odd", 7)
        Image.new("RGB", (40, 20)).save(records.parent / "wide.png")
        lines = [json.loads(line) for line in records.read_text().splitlines()]
        talk = lines[3]["conversations"]
        lines[3] = {"id": "r3", "image_orig": ODD_RECORD[name], "conversations": talk}
        records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = tiny() if name != "train.epochs" else override(tiny(), needs)
    base = override(base, BASE | (RUN if look in (run, vq_settings) else {}) | needs)

    def seen(value, folder):
        changes = {
            "data.train": str(records),
            "data.cache_dir": str(folder),
        }
        folder.mkdir()
        return look(override(base, changes | ({name: value} if value != "same" else {})))

    if (look, base, records) not in before:
        before[look, base, records] = seen("same", tmp_path / "a")
        assert seen("same", tmp_path / "again") == before[look, base, records]
    assert seen(value, tmp_path / "b") != before[look, base, records]
