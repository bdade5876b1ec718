"""Devices by name, as commands and `HTFAInference` take them."""

from __future__ import annotations

import jax

from htfa_jax.errors import ConfigError

# As PyTorch calls them.
_NAMES = {"cuda": "gpu"}


def find_device(name: jax.Device | str | None) -> jax.Device:
    """A device of this machine.

    Args:
      name: a platform ("cpu", "gpu" or "cuda", "tpu"), one of its devices ("gpu:1"), a device, or
        None for JAX's choice.

    Raises ConfigError that says which there are, if this one is not.
    """
    if isinstance(name, jax.Device):
        return name
    platform, _, number = (name or "").partition(":")
    try:
        found = jax.local_devices(backend=_NAMES.get(platform, platform) or None)
    except RuntimeError as error:  # of JAX, which tells of backends, not of machines
        raise ConfigError(_said(name, str(error).splitlines()[0])) from error
    if number and not (number.isascii() and number.isdigit()):
        raise ConfigError(_said(name, "behind the colon stands a number from 0"))
    if number and int(number) >= len(found):
        raise ConfigError(_said(name, f"there are {len(found)}, counted from 0"))
    return found[int(number or 0)]


def _said(name: str | None, reason: str) -> str:
    there = []
    for platform in ("cpu", "gpu", "tpu"):
        try:
            there += [platform] if jax.local_devices(backend=platform) else []
        except RuntimeError:
            continue
    what = "no device" if name is None else f"device={name}: this machine has no such device"
    return (
        f"{what} ({reason[:200]}). There is: {', '.join(there) or 'none'}. Leave --device out, or "
        "install JAX for it: pip install 'jax[cuda13]' (NVIDIA), 'jax[tpu]' (TPU)"
    )
