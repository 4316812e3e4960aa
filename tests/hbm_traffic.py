"""Counts the bytes that a Pallas TPU kernel moves from HBM to VMEM in interpret mode.

It wraps internals of JAX's interpreter: no public counter exists. An error here after an upgrade of JAX says that the
interpreter changed, not that a kernel is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from jax._src.pallas.mosaic.interpret import interpret_pallas_call


@dataclasses.dataclass
class Traffic:
    copies: int = 0
    """Bytes of the kernel's own asynchronous copies."""
    blocks: int = 0
    """Bytes of the blocks that Pallas fetches for the kernel."""


@contextlib.contextmanager
def count_hbm() -> Iterator[Traffic]:
    traffic = Traffic()
    get, execute_read = interpret_pallas_call.get, interpret_pallas_call.DMA.execute_read

    @functools.wraps(get)
    def counted_get(*args: Any, **kwargs: Any) -> Any:
        result = get(*args, **kwargs)
        if kwargs.get("input_name") is not None:
            traffic.blocks += result[1].nbytes
        return result

    def counted_read(self: Any) -> Any:
        started = self.state == interpret_pallas_call.DmaState.STARTED
        result = execute_read(self)
        if started:
            traffic.copies += self.data_size
        return result

    interpret_pallas_call.get, interpret_pallas_call.DMA.execute_read = counted_get, counted_read
    try:
        yield traffic
    finally:
        interpret_pallas_call.get, interpret_pallas_call.DMA.execute_read = get, execute_read
