"""Pretrained weights: what `config.pretrained` names, as one dictionary of parameters."""

from __future__ import annotations

import logging

from htfa_jax.checkpoints import weights
from htfa_jax.checkpoints.loading import load_run
from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config
from htfa_jax.models.factory import Model, build_model

# Of a component and a loss: what a run leaves out where that loss has no weight.
LEFT_OUT = {("vq", "code_weight"): r"decoder\..*", ("decoder", "text_weight"): r"(embed|head)\..*"}

log = logging.getLogger(__name__)


def load_pretrained(config: Config, model: Model) -> Flat:
    """The weights that `config.pretrained` names, as `{path: array}`; says what starts random."""
    if config.pretrained.run is not None:
        _, loaded, step, _ = load_run(config.pretrained.run, lambda c: build_model(c).shapes)
        # A tokenizer encoder that trains may be new in this run: it starts as a copy.
        copied, needed = param_paths.split(model.shapes, r"vq_encoder\..*")
        weights.check_shapes(
            loaded, needed | (copied if set(copied) & set(loaded) else {}), config.pretrained.run
        )
        log.info("all weights from %s, step %d", config.pretrained.run, step)
        return loaded
    loaded = {}
    for component, family in weights.FAMILIES.items():
        folder, sizes = getattr(config.pretrained, component), getattr(config, component)
        inside, _ = param_paths.split(model.shapes, rf"{component}\..*")
        if not inside:
            continue
        if folder is None:
            _say_random(config, component)
            continue
        shapes = {path.removeprefix(component + "."): s for path, s in inside.items()}
        # Position embeddings are made for one size of images.
        facts = {"image_size": config.image_size} if component == "siglip" else {}
        unused = "|".join(
            names
            for (owner, weight), names in LEFT_OUT.items()
            if owner == component and not getattr(config.loss, weight)
        )
        arrays = weights.load_component(folder, family, sizes, shapes, unused=unused, **facts)
        loaded |= {f"{component}.{path}": value for path, value in arrays.items()}
        log.info("%s: weights from %s", component, folder)
    if config.pretrained.htfa is not None:
        loaded |= weights.load_levels(config, model.shapes)
    return loaded


def _say_random(config: Config, component: str) -> None:
    if component != "vq" and not config.is_frozen(component):
        freeze = getattr(config.freeze, component)
        flag = f", whatever freeze.{component}=True says" if freeze else ""
        log.warning("%s: no pretrained weights; it starts random and is trained%s", component, flag)
    else:
        log.warning("%s: starts random and stays so; results will mean nothing", component)
