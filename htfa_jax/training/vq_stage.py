"""The VQ stage: trains the tokenizer on the images of a dataset.

The main job runs it first when no pretrained VQ is given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from htfa_jax.checkpoints.lock import lock
from htfa_jax.checkpoints.manager import Checkpoints
from htfa_jax.checkpoints.weights import WEIGHTS, read_weights, save_component
from htfa_jax.common import param_paths
from htfa_jax.common.files import made_once
from htfa_jax.common.hashing import short_hash
from htfa_jax.common.logs import MetricWriter, log_to_file
from htfa_jax.common.param_paths import Flat
from htfa_jax.common.signals import StopSignal
from htfa_jax.config import Config
from htfa_jax.config.io import save_config
from htfa_jax.data.batch import Batch
from htfa_jax.data.pipeline import evaluation_batches, training_batches
from htfa_jax.data.records import Dataset
from htfa_jax.data.splits import cache_folder, describe_training_data, open_split
from htfa_jax.errors import ConfigError
from htfa_jax.evaluation.metrics import psnr, squared_error
from htfa_jax.kernels.compiler import jit_light
from htfa_jax.models.factory import Model
from htfa_jax.models.layers import make_rngs
from htfa_jax.models.registration import box_mask, denormalize_image, normalize_image, to_8bit
from htfa_jax.models.vq import VQ
from htfa_jax.sharding.layout import Layout, to_host
from htfa_jax.sharding.processes import first_goes_ahead, is_first
from htfa_jax.training.loop import Loop, duration
from htfa_jax.training.loss_guard import LossGuard, guarded_update, is_usable
from htfa_jax.training.plan import out_of_memory_explained
from htfa_jax.training.state import TrainState
from htfa_jax.training.vq_losses import losses, perceptual_encoder, revive, training_images

log = logging.getLogger(__name__)


def build_vq(config: Config) -> Model:
    """The structure of the tokenizer alone."""
    dtype = jnp.dtype(config.train.dtype)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: VQ(config.vq, dtype=dtype, rngs=make_rngs(0)))
    )
    return Model(graphdef, param_paths.flatten(state))


def random_params(config: Config) -> Flat:
    """Fresh float32 weights."""
    dtype = jnp.dtype(config.train.dtype)

    def random(key: jax.Array) -> Flat:
        return param_paths.flatten(nnx.split(VQ(config.vq, dtype=dtype, rngs=make_rngs(key)))[1])

    return jit_light(random)(jax.random.key(config.seed))


def make_step(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    encoder: tuple[Model, Flat] | None = None,
):
    """(state, batch) -> (state, metrics), compiled. Every device has the whole state.

    Args:
      config: of the run.
      model: structure of the tokenizer.
      optimizer: of its parameters.
      layout: of batches.
      encoder: `perceptual_encoder`; None without that loss.
    """
    everywhere = layout.replicated
    eye, eye_params = encoder or (None, {})

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(everywhere, layout.batch, everywhere),
        out_shardings=everywhere,
    )
    @layout.inside
    def step(
        state: TrainState, batch: Batch, eye_params: Flat
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        see = eye and eye.merge(eye_params)
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        image_key, revive_key = jax.random.split(key)
        image_BHWC = training_images(batch, image_key, config)
        grad = jax.value_and_grad(
            lambda params: losses(model.merge(params), image_BHWC, batch.weight, config, see),
            has_aux=True,
        )
        (loss, aux), grads = grad(state["params"])

        def update(params: Flat, opt_state: Any) -> tuple[Flat, Any]:
            updates, tx_state = optimizer.update(grads, opt_state["tx"], params)
            params = optax.apply_updates(params, updates)
            codebook_CE, unused_C = revive(
                params["codebook"],
                opt_state["unused"],
                aux["codes"],
                jax.lax.stop_gradient(aux["z"]),
                config.vq_train.revive_after,
                revive_key,
            )
            return {**params, "codebook": codebook_CE}, {"tx": tx_state, "unused": unused_C}

        norm = optax.tree.norm(grads)
        usable = is_usable(state, loss, norm)
        new = guarded_update(state, update, usable, config.train)
        unused_C = new["opt_state"]["unused"]
        metrics = {
            "loss": loss,
            "l1": aux["l1"],
            "l2": aux["l2"],
            "commitment": aux["commitment"],
            **({"perceptual": aux["perceptual"]} if see else {}),
            "grad_norm": norm,
            "codes_used": jnp.sum(unused_C < config.vq_train.revive_after // 2),
            "finite": usable,
        }
        return new, metrics

    eye_params = jax.tree.map(
        lambda x: layout.put_parameter(x, x.dtype, everywhere), dict(eye_params)
    )
    return lambda state, batch: step(state, batch, eye_params)


def evaluate(
    config: Config, model: Model, params: Flat, records: Dataset, layout: Layout
) -> dict[str, float]:
    """PSNR of the round trip of a split's targets, and how many codes they use.

    A record without a target counts with its original.
    """

    @functools.partial(jax.jit, out_shardings=layout.replicated)
    @layout.inside
    def sums(params: Flat, batch: Batch):
        vq = model.merge(params)
        has_target_B111 = batch.has_target[:, None, None, None]
        images = jnp.where(has_target_B111, batch.image_target, batch.image_orig)
        image_BHWC = normalize_image(images, batch.region_orig, config.data)
        codes_BM = vq.encode(image_BHWC)
        rgb = [
            to_8bit(denormalize_image(x, config.data)) for x in (vq.decode(codes_BM), image_BHWC)
        ]
        inside_BHW = box_mask(batch.region_orig, image_BHWC.shape[1:3])
        counts_BHW = inside_BHW & (batch.weight > 0)[:, None, None]
        usage_C = jnp.zeros(config.vq.codebook_size).at[codes_BM].add(batch.weight[:, None])
        return jnp.sum(squared_error(*rgb) * counts_BHW), counts_BHW.sum(), usage_C

    error, pixels, usage = 0.0, 0, np.zeros(config.vq.codebook_size)
    shards, share = layout.num_shards, layout.process_share
    for loaded in evaluation_batches(config, records, None, num_shards=shards, share=share):
        more = jax.device_get(sums(params, layout.put(loaded.batch)))
        error, pixels, usage = error + more[0], pixels + more[1], usage + more[2]
    return {"psnr": psnr(error / max(pixels, 1)), "codes_used": float((usage > 0).sum())}


def train_vq(
    config: Config,
    workdir: Path,
    stop: StopSignal | None = None,
    check_held: Callable[[], None] = lambda: None,
) -> Path | None:
    """Trains a tokenizer, resuming what `workdir` holds.

    Args:
      config: of the run.
      workdir: of this stage.
      stop: asked for after every step; None never stops.
      check_held: raises if the workdir is another run's; called before anything is written there.

    Returns the weight folder, `workdir/weights`; None if a signal stopped the training. Raises
    ConfigError if the workdir holds a stage of other settings or data.
    """
    if not config.vq.has_decoder:
        raise ConfigError("vq.has_decoder=False: a tokenizer cannot be trained without a decoder")
    started, layout = time.time(), Layout(config)
    stop = stop or StopSignal()
    folder, settings, key = workdir / "weights", config.vq_train, cache_key(config)
    if settings.batch_size % layout.num_shards:
        raise ConfigError(
            f"vq_train.batch_size={settings.batch_size} must be a multiple of the "
            f"{layout.num_shards} shards that a batch is sharded into"
        )
    records = open_split(config, "train")
    model = build_vq(config)
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.num_steps, alpha=0.05)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b1=0.9, b2=0.99))
    encoder = perceptual_encoder(config) if settings.perceptual_weight else None
    params = random_params(config)
    state = {
        "step": jnp.int32(0),
        "halted": jnp.bool_(False),
        "params": params,
        "opt_state": {
            "tx": optimizer.init(params),
            "unused": jnp.zeros(config.vq.codebook_size, jnp.int32),
        },
    }
    writer = MetricWriter(workdir / "logs", silent=not is_first())
    with Checkpoints(workdir, keep=1, check=check_held) as checkpoints:
        state, meta = checkpoints.resume(state, key, "VQ stage")
        if meta:
            log.info("vq: resuming from step %d", state["step"])
        # Fresh and restored arrays alike, so that both run the same compiled step.
        state = jax.tree.map(lambda x: layout.put_parameter(x, x.dtype, layout.replicated), state)

        def save(state: TrainState) -> None:
            writer.flush()
            checkpoints.save(state, {"key": key, "window": loop.window})

        loop = Loop(
            name="vq",
            step_fn=make_step(config, model, optimizer, layout, encoder),
            put=layout.put,
            num_steps=settings.num_steps,
            log_every=config.train.log_every,
            writer=writer,
            samples_per_step=settings.batch_size,
            due=lambda step: step % settings.save_every == 0,
            after_step=lambda step, state: save(state),
            save=save,
            max_bad_records=config.data.max_bad_records,
            guard=LossGuard(config.train),
            stop=stop,
            check_held=check_held,
            watchdog_seconds=config.train.watchdog_seconds,
            window=meta.get("window", []),
        )
        seen = int(state["step"]) * settings.batch_size
        batches = training_batches(
            config, records, None, seen, settings.batch_size, layout.process_share
        )
        with contextlib.closing(batches):
            state, stopped = loop.run(state, batches)
    if stopped:
        return None
    check_held()
    with first_goes_ahead("vq weights"):
        if is_first():
            weights = {path: to_host(x) for path, x in state["params"].items()}
            save_component(folder, "vq", config.vq, weights)
    if config.data.validation is not None:
        records = open_split(config, "validation")
        scores = evaluate(config, model, state["params"], records, layout)
        writer.write_scalars(
            int(state["step"]), {f"vq_validation/{k}": v for k, v in scores.items()}
        )
        log.info(
            "vq: %d steps in %s; validation targets: %.2f dB, %d of %d codes used",
            int(state["step"]),
            duration(time.time() - started),
            scores["psnr"],
            scores["codes_used"],
            config.vq.codebook_size,
        )
    writer.close()
    return folder


def needs_vq_stage(config: Config) -> bool:
    """Whether a run begins with this stage."""
    given = config.pretrained.vq or config.pretrained.run
    return config.level3.generation and not given and config.pretrained.random_components == "train"


def train_in(workdir: Path, config: Config) -> Path | None:
    """The stage by itself, as `train_vq`: what `workdir` holds is resumed."""
    with (
        lock(workdir) as held,
        log_to_file(workdir / "logs" / "train.log"),
        out_of_memory_explained(config, workdir),
        StopSignal() as stop,
    ):
        save_config(config, workdir / "config.json")
        return train_vq(config, workdir, stop, held.check)


def cached_vq(
    config: Config,
    workdir: Path,
    stop: StopSignal | None = None,
    check_held: Callable[[], None] = lambda: None,
) -> Path | None:
    """The tokenizer that this configuration and data lead to: trained now, or before.

    Of several runs at once one trains it, the others wait.

    Args:
      config: of the run.
      workdir: of the stage, if it has to be trained.
      stop, check_held: as `train_vq` takes them.

    Returns its weight folder; None if a signal stopped the training. Raises OSError if the cache
    cannot be written.
    """
    key, folder = cache_key(config), cached_folder(config)
    if jax.process_count() > 1:
        # Hosts may have caches of their own, of which some hold it; the workdir is shared.
        return train_vq(config, workdir / key, stop, check_held)

    def make() -> None:
        log.info("no pretrained VQ: training one on the images of %s", config.data.train)
        trained = train_vq(config, workdir / key, stop, check_held)
        if trained is not None:
            save_component(folder, "vq", config.vq, read_weights(trained))

    made_once(folder, f"the VQ tokenizer of {config.data.train}", make, holds=WEIGHTS)
    return folder if (folder / WEIGHTS).is_file() else None


def cached_folder(config: Config) -> Path:
    """Where the weight folder is kept; not there before it is trained."""
    return cache_folder(config.data) / "vq" / cache_key(config)


def cache_key(config: Config) -> str:
    """A name for all that the trained tokenizer depends on."""
    data = config.data
    described = [
        dataclasses.asdict(config.vq),
        dataclasses.asdict(config.vq_train),
        [config.seed, config.image_size, config.train.dtype],
        [config.level2.alignment, config.level2.intensity_threshold],
        [data.resize, data.image_mean, data.image_std, data.use_object_mask, data.drop_recon],
        dataclasses.asdict(config.augment),
        [config.pretrained.siglip] if config.vq_train.perceptual_weight else [],
        describe_training_data(config),
    ]
    return short_hash(described)
