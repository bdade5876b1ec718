"""HTFA in JAX: answers questions about a partly hidden object and completes its image."""

import importlib

# Loaded when asked for: workers that draw scenes or read records need no JAX.
_PUBLIC = {
    "Config": "htfa_jax.config",
    "load_config": "htfa_jax.config",
    "HTFA": "htfa_jax.models.htfa",
    "HTFAInference": "htfa_jax.inference.engine",
    "Completion": "htfa_jax.inference.options",
    "Decoding": "htfa_jax.inference.options",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
