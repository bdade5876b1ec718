"""Says whether a run fits on devices that are not here, by compiling its training step for them.

    python scripts/plan.py --config configs/standard.py --topology v5e:2x4
    python scripts/plan.py --config configs/internvl2_8b.py --topology h100:8

TPU slices need `pip install -e .[tpu]`, NVIDIA GPUs `pip install -e .[cuda]`; no device needed.
"""

from __future__ import annotations

import dataclasses
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from htfa_jax.common.cli import command
from htfa_jax.config import override
from htfa_jax.config.io import ConfigFlags, parse_args
from weights_convert.on_demand import with_weights


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Options of the command."""

    config: ConfigFlags
    topology: str | None = None  # v5e:2x4, v5p:2x2x4, v6e:16x16, h100:8, ... (None: what is here)


@command
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = parse_args(
        PlanArgs,
        argv,
        description=__doc__,
        resolve=lambda args, base: with_weights(args.config, base),
    )
    from htfa_jax.training.plan import describe_plan
    from htfa_jax.training.topologies import find

    # Weights are not looked at: what would be pretrained is frozen as it would be with them.
    config = override(args.config, {"pretrained.random_components": "as_configured"})
    print(describe_plan(config, args.topology and find(args.topology)))


if __name__ == "__main__":
    main()
