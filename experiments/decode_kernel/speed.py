"""What a device can do at most, measured in the run that is compared with it; and runs long enough to be timed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MAX_CALLS = 1000


class Copy(NamedTuple):
    """A copy of an array on the device, what bandwidth is compared with."""

    run: Callable[[], Any]
    nbytes: int
    """That one run moves: read and written."""


def make_copy(size: int) -> Copy:
    """A copy of an array of `size` bytes."""
    x, copy = jnp.ones(size // 4, jnp.float32), jax.jit(jnp.copy)
    return Copy(lambda: copy(x), 2 * x.nbytes)


def multiplier(size: int, dtype: str = "bfloat16") -> Callable[[], Any]:
    """A product of two square matrices: `2 size^3` FLOPs."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(jnp.matmul)
    return lambda: product(a, b)


def dispatcher(arrays: int) -> Callable[[], Any]:
    """A program of so many small arguments that does next to nothing: what the call of any program costs."""
    given = [jnp.zeros(8, jnp.int32) + i for i in range(arrays)]
    program = jax.jit(lambda xs: xs[0] + 1, keep_unused=True).lower(given).compile()
    return lambda: program(given)


def repeated(run: Callable[[], Any], wait: Callable[[Any], None], seconds: float) -> tuple[Callable[[], None], int]:
    """`run` as often as takes about `seconds`, which waits once at its end, and how often that is.

    Calls are handed over without waiting for each other, so that a device that takes longer for one than Python takes
    to hand it over is never idle between two.
    """
    wait(run())
    calls, taken = 1, 0.0
    while taken < seconds / 4 and calls < MAX_CALLS:
        # Twice, since the first calls of a program can be slower.
        calls = 2 * calls
        start = time.perf_counter()
        for _ in range(calls):
            out = run()
        wait(out)
        taken = time.perf_counter() - start
    calls = min(MAX_CALLS, max(1, math.ceil(calls * seconds / taken)))

    def several() -> None:
        for _ in range(calls):
            out = run()
        wait(out)

    return several, calls


def speed(run: Callable[[], Any], seconds: float, rounds: int) -> float:
    """Median seconds of one call."""
    several, calls = repeated(run, jax.block_until_ready, seconds)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        several()
        taken.append((time.perf_counter() - start) / calls)
    return statistics.median(taken)
