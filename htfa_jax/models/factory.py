"""The model of a configuration, and the shapes of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config
from htfa_jax.models.htfa import HTFA
from htfa_jax.models.layers import streams

# Parameters stored in float32 always: rounding the codebook would change which code is nearest.
CODEBOOK = r"vq\.codebook"
# The generation head, which starts from the codes unless it is loaded.
CODE_HEAD = "level3.head_generate.kernel"
# Parameters whose copy stays float32: alpha moves by less than bfloat16 can tell.
ALPHA = r"level1\..*"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's structure without its weights.

    Attributes:
      graphdef: static structure, for `merge`.
      shapes: `{path: ShapeDtypeStruct}` of all parameters.
    """

    graphdef: Any
    shapes: Flat

    def merge(self, *params: Mapping[str, Any]) -> HTFA:
        """The module with these weights, which together must be all."""
        flat = {path: value for group in params for path, value in group.items()}
        return nnx.merge(self.graphdef, param_paths.unflatten(flat))


def build_model(config: Config, decoding: bool = False) -> Model:
    """The structure of the model that a configuration describes; allocates nothing.

    Args:
      config: of the run.
      decoding: the layout of the decoder's weights (see `models.internlm2`).
    """

    def make() -> HTFA:
        return HTFA(config, decoding=decoding, rngs=streams(0))

    graphdef, state = nnx.split(nnx.eval_shape(make))
    return Model(graphdef, param_paths.flatten(state))
