"""One point of `bench_decode_kernel`: compiled, checked, timed."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import take_turns
from experiments.decode_kernel.data import (
    TOLERANCE,
    border_lengths,
    difference,
    random_call,
    reference,
    timed_lengths,
)
from experiments.decode_kernel.sides import Side, as_jax, as_torch, release, torch_program, wait
from experiments.decode_kernel.speed import Copy, repeated
from experiments.kernel_cases import Case
from mfa_jax.kernels import default_device, resolve

MAX_CACHES = 64
GPU_OPTIONS = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
"""The decodes of a program do not depend on each other, and a CUDA graph could run several at once."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How long is measured, and against what."""

    cold_bytes: int = 3 * 50 * 2**20
    """That the caches of a program take together: three times the last-level cache of an H100."""
    round_seconds: float = 0.02
    rounds: int = 7
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Point:
    """A variant with its type of cache, a batch and a length."""

    variant: str
    case: Case
    batch: int
    length: int | None
    """Tokens of every row; None for a mix."""
    lengths: tuple[int, ...]
    """Shortest and longest of the mix among them."""
    slow_sides: bool = False
    """Whether sides that compile for many seconds are measured too."""

    @property
    def name(self) -> str:
        return f"{self.variant} {self.case.cache_dtype} {self.batch} x {self.length or 'mix'}"

    @property
    def S(self) -> int:
        """Tokens allocated: no more than the longest row holds."""
        return self.length or max(self.lengths)

    def rows(self, seed: int) -> np.ndarray:
        """Tokens of each row."""
        return timed_lengths(self.length, self.lengths, self.batch, seed)

    def valid_bytes(self, seed: int) -> int:
        return int(self.rows(seed).sum()) * self.case.token_bytes

    def caches(self, sizes: Sizes) -> int:
        """Independent caches that a program rotates through."""
        return min(MAX_CACHES, math.ceil(sizes.cold_bytes / self.valid_bytes(sizes.seed)))

    def left_out(self, side: Side) -> str | None:
        """Why a side is not measured here; None if it is."""
        if side.compiles_slowly and not self.slow_sides:
            return "compiles for many seconds a shape: only measured at the largest batch and two longest lengths"
        return side.obstacle(self.case, self.S)


Programs = dict[str, Any]
"""By name: `random`, `reference` and those of the JAX sides, compiled, or the exception that compiling one gave."""


def compile_points(points: list[Point], sides: dict[str, Side], sizes: Sizes) -> dict[str, Programs]:
    """All JAX programs of some points, compiled side by side; before anything is timed, since XLA uses the device."""
    lowered: dict[tuple[str, str], Any] = {}
    for point in points:
        int32 = jax.ShapeDtypeStruct((), jnp.int32)
        lengths = jax.ShapeDtypeStruct((point.batch,), jnp.int32)
        make = functools.partial(random_call, point.case, point.S)
        call = jax.eval_shape(make, int32, lengths, jax.ShapeDtypeStruct((), jnp.float32))
        lowered[point.name, "random"] = _lower(make, int32, lengths, jax.ShapeDtypeStruct((), jnp.float32))
        lowered[point.name, "reference"] = _lower(functools.partial(reference, point.case), call)
        for name, side in sides.items():
            if side.library == "jax" and point.left_out(side) is None:
                program = functools.partial(_decode_all, side, point.case, point.length is not None)
                lowered[point.name, name] = _lower(program, [call] * point.caches(sizes))
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(lowered, pool.map(_compile, lowered.values()), strict=True))
    return {point.name: {name: x for (of, name), x in compiled.items() if of == point.name} for point in points}


def _decode_all(side: Side, case: Case, full: bool, calls: list[dict[str, Any]]) -> list[Any]:
    # As one function that is called often, it is traced and lowered once.
    one = jax.jit(lambda call: side.attend(case, call, full and not side.ours))
    return [one(call) for call in calls]


def _lower(function: Callable[..., Any], *arguments: Any) -> Any:
    # A peer may refuse a shape in any way it likes; what it says goes into the record.
    try:
        return jax.jit(function).lower(*arguments)
    except Exception as error:
        return error


def _compile(lowered: Any) -> Any:
    options = GPU_OPTIONS if default_device().platform == "gpu" else None
    try:
        return lowered if isinstance(lowered, Exception) else lowered.compile(compiler_options=options)
    except Exception as error:
        return error


def measure_point(
    point: Point, sides: dict[str, Side], programs: Programs, copy: Copy, sizes: Sizes, dispatch_s: float
) -> dict[str, Any]:
    """The record of a point: of each side its status (`ok`, `failed` or `left out`), why, its error, and its times.

    Raises:
      JaxRuntimeError: the arrays themselves do not fit, or can't be made. What a side raises is in its record.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        reason = point.left_out(side)
        if reason is not None:
            found[name] = {"status": "left out", "reason": reason}
        elif isinstance(programs.get(name), Exception):
            found[name] = _failed(programs[name])
        else:
            found[name] = _check(point, programs, name, sizes) if side.ours else {"status": "ok", "error": 0.0}
    runs = _checked_runs(point, sides, programs, sizes, found)
    runs["copy"] = repeated(copy.run, wait, sizes.round_seconds)
    timings = take_turns({name: several for name, (several, _) in runs.items()}, sizes.rounds)
    rows, valid, caches = point.rows(sizes.seed), point.valid_bytes(sizes.seed), point.caches(sizes)
    record = {
        "name": point.name, "variant": point.variant, "cache_dtype": point.case.cache_dtype, "batch": point.batch,
        "length": point.length, "rows": rows.tolist(), "valid_bytes": valid, "caches": caches,
        "cold": caches * valid >= sizes.cold_bytes, "flops": int(rows.sum()) * point.case.flops_per_key,
        "auto": resolve("auto", point.case.call(point.S), default_device()),
        "copy_bytes_per_s": copy.nbytes * runs["copy"][1] / timings["copy"].median_s, "sides": found,
    }
    for name in runs.keys() - {"copy"}:
        found[name] |= _figures(record, timings[name].seconds, runs[name][1] * caches, dispatch_s)
    for name, side in sides.items():
        found[name]["ours"] = side.ours
    # Of several gigabytes, and some hold on to each other in cycles.
    del runs
    gc.collect()
    release()
    return record


def _checked_runs(
    point: Point, sides: dict[str, Side], programs: Programs, sizes: Sizes, found: dict[str, dict[str, Any]]
) -> dict[str, tuple[Callable[[], None], int]]:
    """Of the sides that are right so far and decode the timed caches right: runs of a round. Failures go to `found`."""
    calls = [_make(point, programs, sizes.seed + i, point.rows(sizes.seed), 0.0) for i in range(point.caches(sizes))]
    wanted = _reference(programs, calls[0]), _reference(programs, calls[-1])
    runs = {}
    for name, side in sides.items():
        if found[name]["status"] != "ok":
            continue
        # What a peer raises, and when, is its own affair; here it is recorded.
        try:
            run = _runner(point, side, programs.get(name), calls)
            out = run()
            wait(out)
            before, found[name] = found[name]["error"], _compared(out, wanted)
            if found[name]["status"] == "ok":
                found[name]["error"] = max(before, found[name]["error"])
                runs[name] = repeated(run, wait, sizes.round_seconds)
        except Exception as error:
            found[name] = _failed(error)
    return runs


def _reference(programs: Programs, call: Any) -> Any:
    if isinstance(programs["reference"], Exception):
        raise programs["reference"]
    return programs["reference"](call)


def _make(point: Point, programs: Programs, seed: int, lengths: np.ndarray, garbage: float) -> Any:
    if isinstance(programs["random"], Exception):
        raise programs["random"]
    return programs["random"](jnp.int32(seed), jnp.asarray(lengths), jnp.float32(garbage))


def _check(point: Point, programs: Programs, name: str, sizes: Sizes) -> dict[str, Any]:
    """One of ours on rows of every kind of length, with nan past them, and with nan in the memory it is given."""
    lengths = border_lengths(point.S, point.batch, sizes.seed)
    calls = [_make(point, programs, 10**6 + sizes.seed + i, lengths, float("nan"))
             for i in range(min(2, point.caches(sizes)))]
    wanted = [_reference(programs, call) for call in calls]
    try:
        memory = programs[name].memory_analysis()
        given = [calls[i % len(calls)] for i in range(point.caches(sizes))]
        # Freed memory is given to the next that asks for as much: the program's temporaries and its output.
        poison = [jnp.full(size // 4 + 1, jnp.nan, jnp.float32)
                  for size in (memory.temp_size_in_bytes, memory.output_size_in_bytes)]
        jax.block_until_ready(poison)
        del poison
        out = programs[name](given)
        return _compared(out, (wanted[0], wanted[(len(out) - 1) % len(calls)]))
    except Exception as error:
        return _failed(error)


def _compared(out: list[Any], wanted: tuple[Any, Any]) -> dict[str, Any]:
    """The first and the last output, beside those wanted."""
    errors = [float(difference(as_jax(x), y)) for x, y in zip((out[0], out[-1]), wanted, strict=True)]
    # A comparison with nan is false.
    if all(error <= TOLERANCE for error in errors):
        return {"status": "ok", "error": max(errors)}
    return {"status": "failed", "reason": f"outputs differ by {errors} of the largest, more than {TOLERANCE}"}


def _failed(error: Exception) -> dict[str, Any]:
    return {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _runner(point: Point, side: Side, program: Any, calls: list[Any]) -> Callable[[], list[Any]]:
    if side.library == "jax":
        return lambda: program(calls)
    return torch_program(side, point.case, [as_torch(call) for call in calls], point.length is not None)


def _figures(
    point: dict[str, Any], seconds: tuple[float, ...], decodes: int, dispatch_s: float
) -> dict[str, Any]:
    """Of rounds of so many decode steps each."""
    rounds = [s / decodes for s in seconds]
    one = statistics.median(rounds)
    rate = point["valid_bytes"] / one
    return {"seconds": one, "rounds": rounds, "bytes_per_s": rate, "share_of_copy": rate / point["copy_bytes_per_s"],
            "flops_per_s": point["flops"] / one, "tokens_per_s": point["batch"] / one,
            "dispatch_bound": one * point["caches"] < 2 * dispatch_s}
