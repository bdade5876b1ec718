"""HTFA in JAX: answers questions about a partly hidden object and paints it whole."""
