"""Flags of XLA that hide the time of collectives behind arithmetic, by platform."""

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


FLAGS: dict[str, tuple[Flag, ...]] = {"gpu": (), "tpu": ()}


def compiler_options(platform: str, devices: int, environment: Mapping[str, str] = os.environ) -> dict[str, bool]:
    """The flags for a program on so many devices: none on one, where nothing is exchanged, nor on other platforms.

    A flag that the user gives, in XLA_FLAGS or LIBTPU_INIT_ARGS, with whatever value, is the user's.
    """
    given = " ".join(environment.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    users = set(re.findall(r"--(\w+)", given))
    flags = FLAGS.get(platform, ()) if devices > 1 else ()
    return {flag.name: flag.value for flag in flags if flag.name not in users}
