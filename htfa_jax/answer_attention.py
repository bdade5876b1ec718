"""Earlier name of `htfa_jax.inference.answer_attention`."""

from htfa_jax.inference.answer_attention import View

__all__ = ["View"]
