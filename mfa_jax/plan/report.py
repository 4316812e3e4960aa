"""What a program needs and how long it would take: compiled for a slice, counted, and set against published peaks.

A predicted time is no measurement. Each instruction is given the longer of its FLOPs at the chip's peak and its bytes
at the bandwidth of HBM, one after another, and the collectives their bytes on the links they cross
(`chips.collective_seconds`). If all exchange hides behind the arithmetic the step takes the longer of the two sums, if
none does their sum: `step_seconds` and `step_seconds_without_overlap`. Compilers also fetch for one instruction while
another computes: what no order of instructions can undercut, with these FLOPs and bytes, is the longest of all
arithmetic, all bytes and all exchange, `least_seconds`. Latency, what the vector unit computes, matrix units that are
not filled, and what a router that is not balanced (`costs`) makes some devices wait come on top.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mfa_jax import capacity
from mfa_jax.config import ModelConfig, TrainConfig
from mfa_jax.plan import hlo
from mfa_jax.plan.chips import Topology, bytes_sent, collective_seconds
from mfa_jax.plan.costs import Collective, Costs, count, decode_loop
from mfa_jax.plan.programs import Decoding, cache_place, lower_decoding, lower_training
from mfa_jax.train.compiling import DoesNotFitError, Memory, compile_program, memory_of


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind over the same mesh axes, in one step."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which the devices of a group differ; empty where the program's text is not understood."""
    devices: int
    """Of a group."""
    calls: int
    bytes_sent: float
    """By each device."""
    seconds: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step of one device, from published peaks: predicted, not measured."""

    flops: float
    """Matrix products that the program computes, what it recomputes counted in."""
    hbm_bytes: int
    compute_seconds: float
    memory_seconds: float
    interconnect_seconds: float
    step_seconds: float
    """Instructions one after another, if all exchange hides behind the arithmetic."""
    step_seconds_without_overlap: float
    mfu: float
    """Model FLOPs utilisation for `step_seconds`."""
    mfu_without_overlap: float
    exchanges: tuple[Exchange, ...]
    unknown_loops: tuple[str, ...]
    unknown_kernels: tuple[str, ...]

    @property
    def least_seconds(self) -> float:
        """Below which no step is: the longest of all arithmetic, all bytes, all exchange."""
        return max(self.compute_seconds, self.memory_seconds, self.interconnect_seconds)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer for one program on one slice."""

    topology: str
    mesh: dict[str, int]
    fits: bool
    bytes_needed: int | None
    """What a program that does not fit asked for (its temporaries alone, where the compiler names only these)."""
    bytes_available: int | None
    """The compiler's limit, where it named it."""
    model_flops: float
    """Closed form of `capacity`, for one device."""
    memory: Memory | None
    prediction: Prediction | None
    compiler_flops: float | None
    """As the compiler counts: each loop body once, kernels not at all, elementwise work counted in."""
    compiler_bytes: float | None
    """As the compiler counts: each loop body once."""
    lower_seconds: float
    compile_seconds: float
    cache: str | None = None
    """In decoding, what the mesh splits of it and what is held more than once: `programs.cache_place`."""


def plan_training(config: TrainConfig, topology: Topology, mesh: Mesh) -> Plan:
    """One update of a run on a mesh of that slice.

    Raises:
      ValueError: a batch or a size of the model that does not divide over the mesh.
    """
    tokens = config.data.batch_size * config.data.sequence_length
    flops = tokens * capacity.training_flops_per_token(config.model, config.data.sequence_length)
    start = time.perf_counter()
    return _plan(lower_training(config, mesh), start, flops, topology, mesh, in_loop=False)


def plan_decoding(decoding: Decoding, topology: Topology, mesh: Mesh) -> Plan:
    """A token for each row, at a full cache, on a mesh of that slice.

    Raises:
      ValueError: a size of the model that does not divide over the mesh.
    """
    flops = decoding.rows * decoding_flops(decoding.model, decoding.capacity)
    start = time.perf_counter()
    plan = _plan(lower_decoding(decoding, mesh), start, flops, topology, mesh, in_loop=True)
    return dataclasses.replace(plan, cache=cache_place(decoding, mesh))


def decoding_flops(model: ModelConfig, context: int) -> int:
    """Model FLOPs for one decoded token at a context of so many tokens.

    Attention as `capacity` counts it, and 2 for each other parameter that serves a token (the scales of norms, a few in
    a million, counted in).
    """
    attention, D, L = model.attention, model.model_dim, model.num_layers
    layer = capacity.projection_flops(attention, D) + capacity.attention_flops(attention, context)
    others = capacity.model_parameters(model).active - L * capacity.attention_parameters(attention, D)
    return L * layer + 2 * others


def _plan(lowered: Any, start: float, flops: float, topology: Topology, mesh: Mesh, *, in_loop: bool) -> Plan:
    lowered_at = time.perf_counter()
    memory = prediction = error = None
    compiler: dict[str, float] = {}
    try:
        program = compile_program(lowered, "tpu", mesh.size)
    except DoesNotFitError as refusal:
        error = refusal
    compiled_at = time.perf_counter()
    if error is None:
        memory, compiler = memory_of(program), program.cost_analysis()
        module = hlo.parse(program.as_text())
        costs = count(module, decode_loop(module) if in_loop else None, mesh.shape["expert"])
        prediction = predict(costs, flops, topology, mesh)
    return Plan(
        topology=topology.name, mesh={axis: size for axis, size in mesh.shape.items() if size > 1}, fits=error is None,
        bytes_needed=error.needed if error else None, bytes_available=error.limit if error else None,
        model_flops=flops / mesh.size, memory=memory, prediction=prediction,
        compiler_flops=compiler.get("flops"), compiler_bytes=compiler.get("bytes accessed"),
        lower_seconds=lowered_at - start, compile_seconds=compiled_at - lowered_at)


def predict(costs: Costs, model_flops: float, topology: Topology, mesh: Mesh) -> Prediction:
    """The prediction of the module's docstring for a step of all devices with so many model FLOPs."""
    chip = topology.chip
    found = exchanges(costs, topology, mesh)
    local = sum(w.times * max(w.flops / chip.peak_flops, w.nbytes / chip.hbm_bandwidth) for w in costs.work)
    links = sum(e.seconds for e in found)
    least, most = max(local, links), local + links
    at_peak = model_flops / mesh.size / chip.peak_flops
    return Prediction(
        flops=costs.flops, hbm_bytes=costs.nbytes, compute_seconds=costs.flops / chip.peak_flops,
        memory_seconds=costs.nbytes / chip.hbm_bandwidth, interconnect_seconds=links, step_seconds=least,
        step_seconds_without_overlap=most, mfu=at_peak / least, mfu_without_overlap=at_peak / most,
        exchanges=found, unknown_loops=costs.unknown_loops, unknown_kernels=costs.unknown_kernels)


def exchanges(costs: Costs, topology: Topology, mesh: Mesh) -> tuple[Exchange, ...]:
    """The collectives of a program by kind and mesh axes, those that take longest first."""
    sums: dict[tuple[str, tuple[str, ...], int], list[float]] = collections.defaultdict(lambda: [0, 0, 0])
    for collective, times in costs.collectives:
        if len(collective.group) == 1:
            continue
        crossed, extents = _crossed(collective, mesh, len(topology.shape))
        entry = sums[collective.kind, crossed, len(collective.group)]
        n = len(collective.group)
        entry[0] += times
        entry[1] += times * (bytes_sent(collective.kind, collective.nbytes, n) if n else 0)
        entry[2] += times * (collective_seconds(collective.kind, collective.nbytes, extents, topology) if n else 0)
    found = [Exchange(kind, crossed, n, round(calls), size, seconds)
             for (kind, crossed, n), (calls, size, seconds) in sums.items()]
    return tuple(sorted(found, key=lambda e: -e.seconds))


def _crossed(collective: Collective, mesh: Mesh, dimensions: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Mesh axes that a group crosses, and the chips it spans along each physical dimension."""
    if not collective.group:
        return (), ()
    places = np.stack(np.unravel_index(np.array(collective.group), mesh.devices.shape))
    crossed = tuple(axis for axis, row in zip(mesh.axis_names, places, strict=True) if len(set(row.tolist())) > 1)
    coordinates = [mesh.devices.flat[i].coords for i in collective.group]
    extents = tuple(len({place[i] for place in coordinates}) for i in range(dimensions))
    if math.prod(extents) != len(collective.group):
        # No box: a line through its chips.
        extents = (len(collective.group), *(1,) * (dimensions - 1))
    return crossed, extents
