"""The model of a configuration, and the shapes of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from htfa_jax.common import param_paths
from htfa_jax.common.param_paths import Flat
from htfa_jax.config import Config
from htfa_jax.models.decoding import Decoder
from htfa_jax.models.htfa import HTFA
from htfa_jax.models.internlm2 import InternLM2
from htfa_jax.models.layers import make_rngs

# Parameters that are float32 wherever they are stored or computed with: alpha moves by less than
# bfloat16 can tell, and rounding the codebook would change which code is nearest.
FLOAT32_PARAMS = r"level1\..*|vq\.codebook"
# The generation head, which starts from the codes unless it is loaded.
CODE_HEAD = "level3.head_generate.kernel"


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


def build_model(config: Config, decoder: type[Decoder] = InternLM2) -> Model:
    """The structure of the model that a configuration describes; allocates nothing.

    Args:
      config: of the run.
      decoder: the form of the decoder; see `HTFA`.
    """

    def make() -> HTFA:
        return HTFA(config, decoder=decoder, rngs=make_rngs(0))

    graphdef, state = nnx.split(nnx.eval_shape(make))
    return Model(graphdef, param_paths.flatten(state))
