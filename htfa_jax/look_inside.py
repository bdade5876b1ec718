"""Earlier name of `htfa_jax.evaluation.look_inside`."""

from htfa_jax.evaluation.look_inside import (
    answer_figure,
    figures,
    images_figure,
    level2_figure,
    png,
)

__all__ = ["answer_figure", "figures", "level2_figure", "images_figure", "png"]
