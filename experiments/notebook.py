"""How large the notebooks run: `pick` takes a value by the device, or by the environment variable
`MFA_JAX_NOTEBOOK_SIZE`.

| size | taken | meant for |
| --- | --- | --- |
| `tiny` | only where the variable says so | a check that everything runs; what comes out means nothing |
| `cpu` | on CPUs | a few minutes on two cores |
| `accelerator` | on GPUs and TPUs | a few minutes on a T4 or one TPU chip |
"""

from __future__ import annotations

import os
from typing import TypeVar

import jax

from mfa_jax.config import require
from mfa_jax.kernels import default_device

VARIABLE = "MFA_JAX_NOTEBOOK_SIZE"
SIZES = ("tiny", "cpu", "accelerator")

T = TypeVar("T")


def size() -> str:
    """The size of this run, one of `SIZES`.

    Raises:
      ValueError: the environment variable names another one.
    """
    by_device = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    named = os.environ.get(VARIABLE, by_device)
    require(named in SIZES, VARIABLE, named, f"must be one of {', '.join(SIZES)}, or not set: then {by_device} here")
    return named


def pick(*, tiny: T, cpu: T, accelerator: T) -> T:
    """Of three values the one of this run's size."""
    return {"tiny": tiny, "cpu": cpu, "accelerator": accelerator}[size()]


def fast_dtype() -> str:
    """What this device multiplies fastest: bfloat16, or float32 on CPUs and on GPUs before Ampere (T4, V100), which
    have no units for bfloat16."""
    device = default_device()
    slow = device.platform == "cpu" or (device.platform == "gpu" and device.compute_capability < 8)
    return "float32" if slow else "bfloat16"
