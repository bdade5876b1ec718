"""Earlier name of `htfa_jax.config`, for preset files that import `override` from here."""

from htfa_jax.config.io import load_config, override

__all__ = ["load_config", "override"]
