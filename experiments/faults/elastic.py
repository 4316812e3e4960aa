"""One process of a job that reads a large array: what of it comes to this host?

    python -m experiments.faults.elastic --folder one --make
    python -m experiments.launch --processes 4 -- -m experiments.faults.elastic --folder one --again four
    python -m experiments.launch --processes 2 -- -m experiments.faults.elastic --folder four

The array is split over all devices. Each process prints a JSON object: bytes of the array, of this process's part, read
from files, and by how much the most memory that the process ever held grew (buffers, and what checks the sum, too).
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tensorstore
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.cli import parse, run
from mfa_jax.train import cluster
from mfa_jax.train.checkpoint import Checkpoints

SHAPE = (8192, 8192)
"""256 MiB of float32."""


@dataclasses.dataclass(frozen=True)
class ElasticConfig:
    """Reads the array from the checkpoint in a folder, and may save it again."""

    folder: str = "elastic"
    """Folder of the checkpoint, that all processes share."""
    make: bool = False
    """Save a new array there instead of reading."""
    again: str | None = None
    """Folder to save to what was read; none for not at all."""


def array_at(mesh: jax.sharding.Mesh) -> jax.Array:
    """Normal numbers, which hardly compress, made where they belong; the same on every mesh."""
    where = NamedSharding(mesh, PartitionSpec("x"))
    make = jax.jit(lambda: jax.random.normal(jax.random.key(0), SHAPE, jnp.float32), out_shardings=where)
    return make()


def mesh_of_all() -> jax.sharding.Mesh:
    return jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))


def restore(folder: str | Path) -> tuple[jax.Array, dict[str, Any]]:
    """The array, split over all devices, and what it took."""
    where = NamedSharding(mesh_of_all(), PartitionSpec("x"))
    before, held = _bytes_read(), _peak_bytes()
    with Checkpoints(folder, read_only=True) as checkpoints:
        found = checkpoints.restore({"large": {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=where)}})
    assert found is not None, f"{folder} holds no checkpoint"
    array = found.items["large"]["w"]
    part = sum(shard.data.nbytes for shard in array.addressable_shards)
    return array, {"process": jax.process_index(), "processes": jax.process_count(), "array": array.nbytes,
                   "part": part, "read": _bytes_read() - before, "grew": _peak_bytes() - held}


def _bytes_read() -> int:
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(int(value["value"]) for metric in found for value in metric["values"])


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    config = parse(ElasticConfig)
    with cluster.joined():
        if config.make:
            _save(config.folder, array_at(mesh_of_all()))
            return
        array, report = restore(config.folder)
        sys.stdout.write(json.dumps(report) + "\n")
        if config.again is not None:
            _save(config.again, array)


def _save(folder: str, array: jax.Array) -> None:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"large": {"w": array}}, {}, wait=True)


if __name__ == "__main__":
    with cluster.leaving_at_once():
        run(main, label=cluster.label)
