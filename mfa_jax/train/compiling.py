"""Compiling a step before it runs: with the flags of its platform, and knowing what memory it takes."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from mfa_jax.config import TrainConfig
from mfa_jax.train.compiler_flags import compiler_options


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    arguments: int
    """What the program is given: training state and batch, or parameters and caches."""
    output: int
    aliased: int
    """Of the output, what lies where an argument lay."""
    temporaries: int
    """As the compiler sums them up; they need not all live at once, so that the peak may be below."""
    code: int
    peak: int
    """At any time, arguments counted in."""


def memory_of(program: Any) -> Memory:
    """What the compiler says of a compiled program's memory."""
    found = program.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes, output=found.output_size_in_bytes, aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes, code=found.generated_code_size_in_bytes, peak=found.peak_memory_in_bytes)


class DoesNotFitError(Exception):
    """A program that needs more memory than a device has, says its compiler; what a kernel may take on the chip is no
    part of that.

    Attributes:
      needed: bytes that the compiler counted, the whole of the program or its temporaries alone; None if it did not
        say.
      limit: bytes that it has to give; None if it did not say.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        sizes = _SIZES.search(message)
        self.needed = _to_bytes(sizes[1] or sizes[3]) if sizes else None
        self.limit = _to_bytes(sizes[2] or sizes[4]) if sizes else None


_SIZE = r"([\d.]+[KMGT]?)"
_SIZES = re.compile(rf"Used {_SIZE} of {_SIZE} hbm|HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")


def _to_bytes(text: str) -> int:
    power = "KMGT".find(text[-1]) + 1
    return round(float(text[:-1] if power else text) * 1024**power)


def compile_program(lowered: Any, platform: str, devices: int) -> Any:
    """`lowered.compile()` with the flags that `compiler_flags` has for that platform and so many devices.

    Raises:
      DoesNotFitError: the program needs more memory than a device has.
      JaxRuntimeError: what else the compiler says, such as of a kernel that needs more memory on the chip.
    """
    try:
        return lowered.compile(compiler_options=compiler_options(platform, devices))
    except jax.errors.JaxRuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise DoesNotFitError(str(error)) from error


def use_compilation_cache(folder: str | None) -> None:
    """Keeps what this process compiles from now on in a folder, and takes from there what is in it; None: as it was.

    JAX decides what is worth keeping: programs that took longer than `jax_persistent_cache_min_compile_time_secs`. An
    entry that cannot be read is a warning, and the program is compiled.
    """
    if folder is not None and jax.config.values["jax_compilation_cache_dir"] != folder:
        compilation_cache.set_cache_dir(folder)
        compilation_cache.reset_cache()  # JAX settles on a folder when it first compiles


# ---- running out of memory -------------------------------------------------------------------------------------


class DeviceMemoryError(MemoryError):
    """A device ran out of memory; the message has what the compiled step needs, what there is, and what takes less."""


@contextlib.contextmanager
def explaining_memory(config: TrainConfig, device: jax.Device, memory: Memory | None = None) -> Iterator[None]:
    """Turns what XLA raises within into a `DeviceMemoryError`.

    Args:
      device: one of this process; what it has to give is asked of it, and others cannot be asked.
      memory: of the compiled step, which is what a plan tells; None while it is being compiled.
    """
    try:
        yield
    except DoesNotFitError as error:
        raise DeviceMemoryError(_explanation(config, error, error.needed, error.limit, "")) from error
    except jax.errors.JaxRuntimeError as error:
        if not _out_of_memory(error) or memory is None:
            raise
        stats = device.memory_stats()  # None on a CPU
        limit = None if stats is None else stats.get("bytes_limit")
        parts = f" ({_size(memory.arguments)} state and batch, {_size(memory.temporaries)} temporaries)"
        # The CPU's compiler leaves temporaries out of its peak.
        whole = memory.arguments + memory.output - memory.aliased + memory.temporaries
        needed = whole if device.platform == "cpu" else memory.peak
        raise DeviceMemoryError(_explanation(config, error, needed, limit, parts)) from error


_OF_A_DEVICE = re.compile(r"hbm|HBM|Out of memory|OUT_OF_MEMORY|Failed to allocate|Attempting to (allocate|reserve)")
"""What XLA says of a device's own memory: the compiler for TPUs, then CPUs and GPUs, and TPUs as they run."""


def _out_of_memory(error: Exception) -> bool:
    """Of the device; memory on the chip (VMEM, SMEM, shared memory) is exhausted with the same code."""
    return "RESOURCE_EXHAUSTED" in str(error) and _OF_A_DEVICE.search(str(error)) is not None


def _explanation(config: TrainConfig, error: Exception, needed: int | None, limit: int | None, parts: str) -> str:
    remat = [] if config.model.remat == "full" else [f"model.remat=full (now {config.model.remat})"]
    less = [*remat, f"accumulate above {config.accumulate}", f"data.batch_size below {config.data.batch_size}",
            "more devices on mesh.fsdp or mesh.tensor"]
    has = "how much it has is not known" if limit is None else f"{_size(limit)} is what it has to give"
    return (f"a device ran out of memory: a training step needs {_size(needed)} of each device{parts}, and {has}; "
            f"less memory: {', '.join(less)}. The compiler's message: {str(error).splitlines()[0]}")


def _size(count: int | None) -> str:
    return "more than it has" if count is None else f"{count / 2**30:.2f} GiB"
