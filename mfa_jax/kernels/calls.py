"""What a decode backend is asked before it is called: the facts of a call, and of the device it would run on."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

SCALED = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))
"""Types of stored elements that have a scale a token."""


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes and types of one call of `decode_attention`, those of one key head."""

    T: int
    """New tokens of a row."""
    N: int
    """Query heads that share the keys."""
    S: int
    """Keys allocated."""
    H: int
    """Width of a key."""
    h: int
    """Width of a value."""
    dtype: Any
    """Of the queries."""
    cache_dtype: Any
    """Of the cached keys and values."""
    shared: bool
    """Keys serve as values."""
    rope: bool = False
    """Keys are stored before rope."""
    alibi: bool = False
    """Scores have ALiBi's bias."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What kernels are chosen by."""

    platform: str
    """`cpu`, `gpu` or `tpu`."""
    kind: str = ""
    """As JAX names it, such as `TPU v5 lite` or `NVIDIA H100 80GB HBM3`."""
    compute_capability: float = 0.0
    """Of an NVIDIA GPU, such as 9.0; else 0."""
    cores: int = 0
    """Streaming multiprocessors of a GPU; 0 where that is not known, or it is none."""


_HOPPER = re.compile(r"NVIDIA (H100|H200|H800|H20|GH200)\b")


def kept_as_words() -> bool:
    """Whether narrow floats of a cache are written, read and carried as integers here: on CPUs, see `words`."""
    return default_device().platform == "cpu"


def default_device() -> Device:
    """Of the ambient mesh, whose devices may be compile-only; else `jax.default_device`, where one is set (or the first
    of a platform); else the first of the default backend."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.platform == "gpu":
        # An abstract device has no compute capability.
        capability = 9.0 if _HOPPER.match(abstract.device_kind) else 0.0
        return Device("gpu", abstract.device_kind, capability, abstract.num_cores or 0)
    if abstract is not None:
        return Device(abstract.platform, abstract.device_kind)
    config: Any = jax.config
    chosen = config.jax_default_device
    device = jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return Device(device.platform, device.device_kind)
    return Device(device.platform, device.device_kind, float(device.compute_capability), device.core_count)
