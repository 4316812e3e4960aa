"""How tokens reach their experts and come back: sorted on a device, exchanged between devices, dropped nowhere.

On a mesh every device sorts the choices of its own tokens by expert. Experts are split over the `expert` axis, so the
rows for one device are neighbours: they travel there, meet their experts, and travel back; weights do not. Experts are
gathered over `fsdp`, and their gradients scattered; `tensor` splits their hidden width and results are summed over it.

No expert has a capacity, so the buffer that receives has room for the worst case, all choices of all devices of the
axis: `X M A` rows of D on each of X devices with M tokens, or with the M that travel at a time (`in_parts`). Memory and
all that works on rows element by element pay for the room, products for the rows. What travels in it is the exchange:

| exchange | rows that leave a device | runs on |
| --- | --- | --- |
| `ragged` | those routed to another device: `jax.lax.ragged_all_to_all` | tpu, gpu |
| `padded` | the worst case for each device, the rest zeros: `jax.lax.all_to_all` | anywhere |
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from mfa_jax.axes import RULES
from mfa_jax.kernels.calls import default_device
from mfa_jax.model.grouped import grouped_matmul

EXCHANGES = ("ragged", "padded")
AXIS = "expert"

Experts = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]
"""Gate, up and down projections."""


def resolve_exchange(exchange: str, platform: str) -> str:
    """The exchange on a platform (`cpu`, `gpu`, `tpu`): `auto` is `padded` on CPU and `ragged` elsewhere.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: `ragged` on a CPU.
    """
    if exchange == "auto":
        return "padded" if platform == "cpu" else "ragged"
    if exchange not in EXCHANGES:
        raise ValueError(f"expert_exchange={exchange!r}: must be one of auto, {', '.join(EXCHANGES)}")
    if exchange == "ragged" and platform == "cpu":
        raise NotImplementedError("expert_exchange='ragged': XLA has no ragged all-to-all for cpu; use auto, padded")
    return exchange


# ---- one device ------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def take_rows(
    x: Float[Array, "M D"], order: Int[Array, " P"], inverse: Int[Array, " P"], repeats: int
) -> Float[Array, "P D"]:
    """Rows of `x`, each `repeats` times, in another order: `y_p = x[order_p // repeats]`, `P = M repeats`.

    Args:
      order: a permutation of 0 .. P - 1.
      inverse: its inverse; by it the gradient is a gather and a sum, where that of plain indexing is a scatter.
    """
    return x[order // repeats]


def _take_rows_forward(x: Array, order: Array, inverse: Array, repeats: int) -> tuple[Array, Array]:
    return take_rows(x, order, inverse, repeats), inverse


def _take_rows_backward(repeats: int, inverse: Array, gradient: Array) -> tuple[Array, None, None]:
    return jnp.sum(gradient[inverse].reshape(-1, repeats, gradient.shape[-1]), axis=1), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def sorted_by(keys: Int[Array, " P"]) -> tuple[Int[Array, " P"], Int[Array, " P"]]:
    """The order that sorts the keys, equal ones as they come, and its inverse."""
    order = jnp.argsort(keys, stable=True)
    places = jnp.arange(len(order), dtype=order.dtype)
    return order, jnp.zeros_like(order).at[order].set(places, unique_indices=True)


def swiglu_of_groups(
    rows: Float[Array, "P D"], experts: Experts, sizes: Int[Array, " E"], implementation: str
) -> Float[Array, "P D"]:
    """A SwiGLU for each row, with the weights of its group's expert."""
    W_gate, W_up, W_down = experts
    product = functools.partial(grouped_matmul, sizes=sizes, implementation=implementation)
    return product(jax.nn.silu(product(rows, W_gate)) * product(rows, W_up), W_down)


def routed_experts(
    x: Float[Array, "M D"], chosen: Int[Array, "M A"], weights: Float[Array, "M A"], experts: Experts,
    implementation: str = "auto", exchange: str | None = None,
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """`y_m = sum_a weights_ma expert_chosen_ma(x_m)`, and how many rows the experts of this device served: over all
    devices of the axis, as many as choices were made, or some were lost on the way.

    Args:
      experts: all of them, or with an exchange those of this device of the axis `expert`.
      exchange: how rows travel over that axis; None for no axis.
    """
    flat = chosen.reshape(-1)
    order, inverse = sorted_by(flat)
    rows = take_rows(x, order, inverse, chosen.shape[1])
    if exchange is None:
        sizes = jnp.bincount(flat, length=len(experts[0])).astype(jnp.int32)
        rows, served = swiglu_of_groups(rows, experts, sizes, implementation), jnp.sum(sizes)
    else:
        sizes = jnp.bincount(flat, length=len(experts[0]) * lax.axis_size(AXIS)).astype(jnp.int32)
        rows, served = _elsewhere(rows, sizes, experts, implementation, exchange)
    out = take_rows(rows, inverse, order, 1).reshape(*chosen.shape, x.shape[-1])
    y = jnp.einsum("MAD,MA->MD", out, weights, preferred_element_type=jnp.float32).astype(x.dtype)
    return y, served


def in_parts(
    x: Float[Array, "M D"], chosen: Int[Array, "M A"], weights: Float[Array, "M A"], experts: Experts,
    implementation: str, exchange: str | None, at_once: int | None,
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """`routed_experts`, with an exchange `at_once` tokens at a time, so that there need be room for no more; None for
    all. Backward each part is computed again, for what all of them kept would take the room that is saved.

    Raises:
      ValueError: more tokens than that, which it does not divide.
    """
    M = len(x)
    if exchange is None or at_once is None or M <= at_once:
        return routed_experts(x, chosen, weights, experts, implementation, exchange)
    if M % at_once:
        raise ValueError(f"expert_exchange_tokens={at_once}: must divide the {M} tokens of a device, or be as many")
    pieces = tuple(v.reshape(-1, at_once, v.shape[-1]) for v in (x, chosen, weights))

    def part(piece: tuple[Array, ...]) -> tuple[Array, Array]:
        x, chosen, weights = piece
        return routed_experts(x, chosen, weights, experts, implementation, exchange)

    y, served = lax.map(jax.checkpoint(part, prevent_cse=False), pieces)
    return y.reshape(x.shape), jnp.sum(served)


# ---- the axis of experts ---------------------------------------------------------------------------------------


class Route(NamedTuple):
    """What one of the X devices of the axis sends and gets, in rows."""

    me: Int[Array, ""]
    """Its place on the axis."""
    starts: Int[Array, " X"]
    """Where, in its sorted rows, those for each device begin."""
    counts: Int[Array, " X"]
    """How many there are."""
    arriving: Int[Array, " X"]
    """How many come from each device."""
    returning: Int[Array, " X"]
    """Where, in the sorted rows of each device, those that it sends here begin."""


def make_route(sizes: Int[Array, "X E"], me: Int[Array, ""]) -> Route:
    """The route of device `me` from the choices of each device for each expert, E / X of them on a device."""
    X = len(sizes)
    counts = jnp.sum(sizes.reshape(X, X, -1), axis=2)
    starts = jnp.cumsum(counts, axis=1) - counts
    return Route(me, starts[me], counts[me], counts[:, me], starts[:, me])


def send(rows: Float[Array, "P D"], route: Route, exchange: str) -> Float[Array, "X P D"]:
    """Each device's rows to where their experts are; slot s of the result holds `arriving_s` rows from device s."""
    P, D, X = *rows.shape, len(route.counts)
    if exchange == "ragged":
        return lax.ragged_all_to_all(
            rows, jnp.zeros((X * P, D), rows.dtype), route.starts, route.counts,
            jnp.full((X,), route.me * P, jnp.int32), route.arriving, axis_name=AXIS).reshape(X, P, D)
    place = jnp.arange(P)
    slots = rows[jnp.minimum(route.starts[:, None] + place, P - 1)]
    return lax.all_to_all(jnp.where((place < route.counts[:, None])[..., None], slots, 0), AXIS, 0, 0)


def collect(slots: Float[Array, "X P D"], route: Route, exchange: str) -> Float[Array, "P D"]:
    """The way back of `send`: every row where it was."""
    X, P, D = slots.shape
    if exchange == "ragged":
        return lax.ragged_all_to_all(
            slots.reshape(-1, D), jnp.zeros((P, D), slots.dtype), jnp.arange(X, dtype=jnp.int32) * P, route.arriving,
            route.returning, route.counts, axis_name=AXIS)
    place = jnp.arange(P)
    went_to = jnp.sum(place[:, None] >= jnp.cumsum(route.counts), axis=1)
    return lax.all_to_all(slots, AXIS, 0, 0)[went_to, place - route.starts[went_to]]


def _elsewhere(
    rows: Float[Array, "P D"], sizes: Int[Array, " E"], experts: Any, implementation: str, exchange: str
) -> tuple[Float[Array, "P D"], Int[Array, ""]]:
    """`swiglu_of_groups` of rows sorted by expert, each on the device that has its expert; how many this one served."""
    me, P = lax.axis_index(AXIS), len(rows)
    all_sizes = lax.all_gather(sizes, AXIS)
    route = make_route(all_sizes, me)
    mine = jnp.take(all_sizes.reshape(len(all_sizes), len(all_sizes), -1), me, axis=1)
    # Each slot is sorted by expert; what lies past its rows belongs to none and is sorted behind all.
    expert = jnp.sum(jnp.arange(P)[:, None] >= jnp.cumsum(mine, axis=1)[:, None], axis=2)
    order, inverse = sorted_by(expert.reshape(-1))
    slots = send(rows, route, exchange)
    arrived = take_rows(slots.reshape(-1, slots.shape[2]), order, inverse, 1)
    out = swiglu_of_groups(arrived, experts, jnp.sum(mine, axis=0), implementation)
    # Of those that are in a slot, not of those that were to come: a row past the end of a slot would be lost.
    served = jnp.sum(expert < mine.shape[1])
    return collect(take_rows(out, inverse, order, 1).reshape(slots.shape), route, exchange), served


def experts_over_mesh(
    x: Float[Array, "B T D"], chosen: Int[Array, "B T A"], weights: Float[Array, "B T A"], experts: Experts,
    implementation: str = "auto", exchange: str = "auto", at_once: int | None = None,
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """`in_parts` of each device's own rows, where a mesh is set; a sort is not for the partitioner, nor a kernel.

    Rows are split over those of `data`, `fsdp` and `expert` that divide them, in this order, and the sequence over
    `context` where that divides it; the devices of the others hold the same tokens and compute the same.

    Raises:
      ValueError: experts that do not divide over `expert`, their width over `tensor`, or the model's over `fsdp`;
        tokens that `at_once` does not divide.
    """
    def local(x: Array, chosen: Array, weights: Array, experts: Any, exchange: str | None) -> tuple[Array, Array]:
        flat_x, flat_chosen, flat_weights = (v.reshape(-1, v.shape[-1]) for v in (x, chosen, weights))
        y, served = in_parts(flat_x, flat_chosen, flat_weights, experts, implementation, exchange, at_once)
        return y.reshape(x.shape), served

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return local(x, chosen, weights, experts, None)
    E, D, F = experts[0].shape
    for name, size, axis in (("experts", E, AXIS), ("embed", D, "fsdp"), ("ffn", F, "tensor")):
        if size % mesh.shape[axis]:
            raise ValueError(f"axis {name!r} of size {size} does not divide over mesh {axis}={mesh.shape[axis]}")
    rows: tuple[str, ...] = ()
    left = x.shape[0]
    for axis in RULES.batch or ():
        if left % mesh.shape[axis] == 0:
            rows, left = (*rows, axis), left // mesh.shape[axis]
    sequence = "context" if x.shape[1] % mesh.shape["context"] == 0 else None
    spread = rows if sequence is None else (*rows, sequence)
    way = resolve_exchange(exchange, default_device().platform) if mesh.shape[AXIS] > 1 else None

    def summed(x: Array, chosen: Array, weights: Array, experts: Any) -> tuple[Array, Array]:
        # Gathered in here, gradients come back scattered over `fsdp`. By a gather before they would be summed over all
        # devices that share a device's experts, whole on each, and cut only then.
        experts = tuple(lax.all_gather(w, "fsdp", axis=axis, tiled=True)
                        for w, axis in zip(experts, (1, 1, 2), strict=True))
        y, served = local(x, chosen, weights, experts, way)
        if way is not None and AXIS not in spread:  # all devices of the axis sent the same rows
            served = lax.psum(served, AXIS) // lax.axis_size(AXIS)
        return lax.psum(y, "tensor"), lax.psum(served, spread) if spread else served

    by_rows, whole = PartitionSpec(rows or None, sequence), PartitionSpec()
    widen, narrow = RULES.spec("experts", "embed", "ffn"), RULES.spec("experts", "ffn", "embed")
    # Without the check of replication, which the kernels do not carry.
    return jax.shard_map(
        summed, in_specs=(by_rows, by_rows, by_rows, (widen, widen, narrow)), out_specs=(by_rows, whole),
        check_vma=False)(x, chosen, weights, experts)
