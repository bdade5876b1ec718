"""Earlier name of `htfa_jax.evaluation.curves`."""

from htfa_jax.evaluation.curves import curves_figure

__all__ = ["curves_figure"]
