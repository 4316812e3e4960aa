"""The letters, the logical axes, the mesh axes, and the strict table between them.

Letters (einsum subscripts and shape annotations, upper case unless noted; a letter has one size):

  B batch · T query positions · S cached positions · D model width · N query heads · K key heads · G = N/K ·
  H head width on the query-key side · h value width · C latent width · Q query rank · R rope width ·
  F feed-forward width · E experts · A experts of a token · V vocabulary · L layers

Parameters name their axes with the fields of `AxisRules`; a name that is not a field, or two names of one array on
one mesh axis, is an error. The scanned layer axis is never sharded: XLA's partitioner computes wrong gradients for
stacked weights whose layer axis it splits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Mesh axes of each logical axis; the fields are the logical names."""

    batch: tuple[str, ...] | None = ("data", "fsdp", "expert")
    sequence: tuple[str, ...] | str | None = "context"
    embed: tuple[str, ...] | str | None = "fsdp"
    act_embed: tuple[str, ...] | str | None = None
    heads: tuple[str, ...] | str | None = "tensor"
    kv_heads: tuple[str, ...] | str | None = "tensor"
    head_dim: tuple[str, ...] | str | None = None
    latent: tuple[str, ...] | str | None = None
    query_rank: tuple[str, ...] | str | None = None
    inner_rank: tuple[str, ...] | str | None = "fsdp"
    """What a second factor (MFA's `Q`, MLA's up projections) is summed over: it has no axis of the model's width."""
    ffn: tuple[str, ...] | str | None = "tensor"
    experts: tuple[str, ...] | str | None = "expert"
    vocab: tuple[str, ...] | str | None = "tensor"
    layers: None = None

    def spec(self, *names: str | None) -> PartitionSpec:
        """The partition of an array whose axes have these logical names (None: not split).

        Raises:
          ValueError: an unknown name, or a mesh axis used twice.
        """
        known = {f.name for f in dataclasses.fields(self)}
        used: list[str] = []
        entries = []
        for name in names:
            if name is not None and name not in known:
                raise ValueError(f"logical axis {name!r} is unknown; accepted: {', '.join(sorted(known))}")
            entry = None if name is None else getattr(self, name)
            for axis in (entry,) if isinstance(entry, str) else entry or ():
                if axis in used:
                    raise ValueError(f"axes {names}: mesh axis {axis!r} would be used twice")
                used.append(axis)
            entries.append(entry)
        return PartitionSpec(*entries)


RULES = AxisRules()


def make_mesh(sizes: Sequence[int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices with the axes of `MESH_AXES`; one size may be -1 (the rest), None is `(-1, 1, 1, 1, 1)`.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or are not positive but for one of -1.
      NotImplementedError: TPUs of several slices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    # GPUs have the attribute, too: there it tells hosts apart, which are no hindrance.
    slices = {d.slice_index for d in devices if getattr(d, "platform", None) == "tpu" and hasattr(d, "slice_index")}
    if len(slices) > 1:
        raise NotImplementedError(f"mesh: the {count} TPUs are of {len(slices)} slices; accepted: those of one slice, "
                                  f"since no mesh axis is laid over the network between slices")
    shape = list(sizes) if sizes is not None else [-1, 1, 1, 1, 1]
    if shape.count(-1) > 1 or any(size < 1 for size in shape if size != -1):
        raise ValueError(f"mesh {tuple(shape)}: sizes must be positive, but for one that may be -1, the rest")
    if -1 in shape:
        rest = math.prod(s for s in shape if s != -1)
        shape[shape.index(-1)] = max(count // rest, 1)
    if math.prod(shape) != count:
        wanted = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise ValueError(f"mesh {wanted} needs {math.prod(shape)} devices, there are {count}; "
                         f"the sizes must multiply to {count}")
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis that is no product of whole dimensions of the torus takes parts of them
        laid = mesh_utils.create_device_mesh(tuple(shape), devices, allow_split_physical_axes=True)
        return Mesh(laid, MESH_AXES, axis_types=types)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the partition of an activation; does nothing where no mesh is set.

    A `sequence` that its mesh axis does not divide, such as the one token of decoding, is not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    shards = mesh.shape.get("context", 1)
    fitting = [None if name == "sequence" and x.shape[axis] % shards else name for axis, name in enumerate(names)]
    return jax.lax.with_sharding_constraint(x, RULES.spec(*fitting))


def gather_sequence(x: jax.Array) -> jax.Array:
    """`x [B, T, ...]` with its whole sequence on every device.

    Pinned as it was made first: else the partitioner gathers what `x` was made from.
    """
    rest = (None,) * (x.ndim - 2)
    return constrain(constrain(x, "batch", "sequence", *rest), "batch", None, *rest)


def splits(shape: Sequence[int], *names: str | None) -> list[tuple[str, ...]] | None:
    """Mesh axes that split each axis of an array, for `shard_map` on the ambient mesh; None where there is none.

    Axes of size 1 are left out, and those that do not divide what they would split: their devices then compute the
    same. There is no mesh to split over inside a `shard_map` either.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in RULES.spec(*names)]
    entries = [tuple(axis for axis in entry if mesh.shape[axis] > 1) for entry in entries]
    return [entry if size % math.prod(mesh.shape[axis] for axis in entry) == 0 else ()
            for size, entry in zip(shape, entries, strict=True)]


def shardings(abstract: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of each leaf of a tree of boxed (logically partitioned) abstract parameters.

    Raises:
      ValueError: a size does not divide over its mesh axes; the leaf, the size and the axes are named.
    """
    def one(path: Any, leaf: Any) -> NamedSharding:
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        shape = leaf.value.shape if isinstance(leaf, nn.LogicallyPartitioned) else leaf.shape
        spec = RULES.spec(*names)
        for size, name, entry in zip(shape, names, spec, strict=False):
            parts = math.prod(mesh.shape[a] for a in ((entry,) if isinstance(entry, str) else entry or ()))
            if size % parts:
                raise ValueError(f"{jax.tree_util.keystr(path)}: axis {name!r} of size {size} does not divide over "
                                 f"mesh {entry}={parts}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
