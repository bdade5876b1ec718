"""Lists the presets and what each is made of.

    python -m htfa_jax.configs                       # all
    python -m htfa_jax.configs standard debug:tiny   # these; files too

With pretrained SigLIP, VQ and decoder, which are frozen where the configuration freezes them.
tokens: of a sample with the longest text. TFLOP: of a sample in a training step, without what
rematerialisation computes again. memory: weights, optimizer state, gradients and copies, if one
device holds them all; exact, but activations come on top: scripts/plan.py compiles the step for
devices that you name and says what it needs there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import tyro

from htfa_jax.common.cli import command, parse
from htfa_jax.config.io import preset_names


@dataclasses.dataclass(frozen=True)
class ConfigsArgs:
    """Options of the command."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()  # presets or files (none: all presets)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(ConfigsArgs, argv, __doc__)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
    from htfa_jax.training.plan import preset_table

    print(preset_table(args.names or preset_names()))


if __name__ == "__main__":
    main()
