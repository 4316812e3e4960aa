"""The compiler for TPUs on a machine that has none."""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from mfa_jax import axes
from mfa_jax.plan.chips import Topology

INSTALL = "`make aot-tpu` installs it beside the virtual environment, `pip install libtpu` into it"


def libtpu() -> Path | None:
    """The library that compiles for TPUs: of TPU_LIBRARY_PATH, of `tpu/` in the virtual environment, or installed.

    None where it is not installed.
    """
    beside = Path(sys.prefix, "tpu", "libtpu", "libtpu.so")
    found = importlib.util.find_spec("libtpu")
    if "TPU_LIBRARY_PATH" in os.environ:
        return Path(os.environ["TPU_LIBRARY_PATH"])
    if beside.exists():
        return beside
    return Path(found.origin).with_name("libtpu.so") if found is not None and found.origin is not None else None


def prepare() -> None:
    """Makes this process one that compiles for TPUs and runs on the CPU; to be called before JAX has a backend.

    Raises:
      FileNotFoundError: libtpu is not installed.
    """
    path = libtpu()
    if path is None or not path.exists():
        raise FileNotFoundError(2, f"libtpu, the compiler for TPUs, is not there: {INSTALL}", str(path or "libtpu.so"))
    os.environ.update(TPU_LIBRARY_PATH=str(path), TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4",
                      TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_LOG_DIR="disabled")
    # A compiler that aborts writes the whole module into its logs, gigabytes of it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    jax.config.update("jax_platforms", "cpu")


def mesh_of(topology: Topology, sizes: tuple[int, ...]) -> Mesh:
    """The mesh of such axis sizes (those of `axes.MESH_AXES`, -1 for the rest) over the chips of a slice.

    Raises:
      ValueError: a slice that the compiler does not know, or sizes that do not multiply to its chips.
    """
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except jax.errors.JaxRuntimeError as error:
        slices = ", ".join(Topology(topology.chip, shape).name for shape in topology.chip.slices)
        raise ValueError(f"topology={topology.name!r}: the compiler does not know it ({error}); slices are "
                         f"{slices}") from error
    return axes.make_mesh(sizes, devices)
