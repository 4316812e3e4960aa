"""Flags of XLA that hide the time of collectives behind arithmetic, by platform.

Only what was accepted by the compilers we serve is set. For TPUs that is nothing: libtpu hides by default. A training
step of `base-mfa` compiled ahead of time for v5p:2x2x2 (fsdp=4, data=2; libtpu 0.0.42.1) is the same program, letter by
letter, with `xla_tpu_enable_async_collective_fusion` and `.._fuse_all_gather` on and off, and with `.._multiple_steps`
on, the flags that MaxText's `benchmarks/xla_flags_library.py` starts with.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag for a mesh of several devices."""

    name: str
    value: bool
    reason: str
    source: str


FLAGS: dict[str, tuple[Flag, ...]] = {"gpu": (
    Flag("xla_gpu_enable_latency_hiding_scheduler", True,
         "Moves the start of a collective before arithmetic that does not need its result. JAX's documentation gives "
         "false as the default; a step of nano-mfa compiled for four H100s by jax 0.12 (fsdp=4) is the same program "
         "with and without it, every collective around some work, so there it is on already.",
         "docs.jax.dev/en/latest/gpu_performance_tips.html"),
)}
"""By the platform of a device."""


def compiler_options(platform: str, devices: int, environment: Mapping[str, str] = os.environ) -> dict[str, bool]:
    """The flags for a program on so many devices: none on one, where nothing is exchanged, nor on other platforms.

    A flag that the user gives, in XLA_FLAGS or LIBTPU_INIT_ARGS, with whatever value, is the user's.
    """
    given = " ".join(environment.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    users = set(re.findall(r"--(\w+)", given))
    flags = FLAGS.get(platform, ()) if devices > 1 else ()
    return {flag.name: flag.value for flag in flags if flag.name not in users}
