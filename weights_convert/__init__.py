"""Weights of published PyTorch checkpoints as this project's parameters.

One table of rules per family (`siglip`, `vq`, `internlm2`), one strict engine (`convert`).
"""
