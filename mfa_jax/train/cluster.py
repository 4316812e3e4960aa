"""How a process finds the others that it trains with, and how it leaves them.

`find_cluster` decides by the environment, and the first of these that holds counts:

  MFA_JAX_CLUSTER=none         one process, whatever else is set
  MFA_JAX_CLUSTER=NAME         a cluster as JAX detects it: slurm, gketpu, gcetpu, k8s, ompi, mpi4py
  JAX_NUM_PROCESSES            as it says, with JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS (host:port of process 0)
  SLURM_NTASKS above 1         slurm, each task started by srun
  OMPI_COMM_WORLD_SIZE above 1 ompi
  a TPU on this machine        gketpu where TPU_PROCESS_ADDRESSES (or TPU_WORKER_HOSTNAMES) names several hosts or
                               MEGASCALE_NUM_SLICES is above 1, one process where one host is named; gcetpu where
                               neither they nor TPU_SKIP_MDS_QUERY are set
  JOB_COMPLETION_INDEX         k8s: an indexed Job, where KUBERNETES_SERVICE_HOST is set too
  nothing of it                one process

Who coordinates, how many there are and which one this is are then JAX's to find out. What looks like a cluster and
cannot be joined is an error, never a run of its own. Several slices of TPUs are joined, and then refused: a mesh lies
on one (`axes.make_mesh`). MPI that is not Open MPI (PMI_SIZE) is not looked for; MFA_JAX_CLUSTER=mpi4py names it.
Without that each process is a run of its own, and all but one are refused the workdir.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping

import jax
from jax._src import distributed  # the coordinator's address has no public name

from mfa_jax.config import require
from mfa_jax.train import processes

_GOODBYE_SECONDS = 60  # between the first and the last process that is done

CLUSTER = "MFA_JAX_CLUSTER"
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_METHODS = ("slurm", "gketpu", "gcetpu", "k8s", "ompi", "mpi4py")
_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
"""In JAX's order."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How to join the other processes."""

    method: str
    """JAX's name of the kind of cluster, `deactivate` for one that the environment spells out."""
    reason: str
    """What in the environment says so."""
    address: str | None = None
    count: int | None = None
    index: int | None = None


def find_cluster(environment: Mapping[str, str], tpu: bool) -> Cluster | None:
    """The cluster that this process is one of, as the module says; None for one process.

    Args:
      tpu: whether this machine has TPUs.

    Raises:
      ValueError: settings that contradict each other, or are not complete; the variables are named.
    """
    asked = environment.get(CLUSTER)
    if asked is not None:
        require(asked in (*_METHODS, "none"), CLUSTER, asked, f"must be none or one of {', '.join(_METHODS)}")
        return None if asked == "none" else Cluster(asked, f"{CLUSTER}={asked}")
    if COUNT in environment or INDEX in environment:
        return _explicit(environment)
    if _number(environment, "SLURM_NTASKS") > 1:
        require({"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys(), "SLURM_NTASKS",
                environment["SLURM_NTASKS"], f"of several tasks this is one that srun did not start; start it with "
                f"srun, or set {CLUSTER}=none for one process")
        return Cluster("slurm", f"SLURM_NTASKS={environment['SLURM_NTASKS']}")
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return Cluster("ompi", f"OMPI_COMM_WORLD_SIZE={environment['OMPI_COMM_WORLD_SIZE']}")
    found = _tpu_cluster(environment) if tpu else None
    named = tpu and any(name in environment for name in _HOSTS)  # else every pod of a JobSet would be of a k8s cluster
    if found is None and not named and {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        found = Cluster("k8s", f"JOB_COMPLETION_INDEX={environment['JOB_COMPLETION_INDEX']}")
    require(found is not None or ADDRESS not in environment, ADDRESS, environment.get(ADDRESS),
            f"there is no cluster here that says which process this is; set {COUNT} and {INDEX} too")
    return found


def _explicit(environment: Mapping[str, str]) -> Cluster:
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in environment]
    require(not missing, COUNT, environment.get(COUNT), f"needs all of {ADDRESS}, {COUNT} and {INDEX}; "
            f"{' and '.join(missing)} is not set")
    count, index = _number(environment, COUNT), _number(environment, INDEX)
    require(count >= 1, COUNT, count, "must be at least 1")
    require(index < count, INDEX, index, f"must be below {COUNT}={count}")
    return Cluster("deactivate", f"{COUNT}={count}", environment[ADDRESS], count, index)


def _tpu_cluster(environment: Mapping[str, str]) -> Cluster | None:
    hosts = next((environment[name] for name in _HOSTS if name in environment), None)
    slices = _number(environment, "MEGASCALE_NUM_SLICES")
    if hosts is not None:
        several = "," in hosts or slices > 1
        return Cluster("gketpu", f"{hosts.count(',') + 1} TPU hosts, {max(slices, 1)} slices") if several else None
    return None if "TPU_SKIP_MDS_QUERY" in environment else Cluster("gcetpu", "a TPU VM")


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "0")
    require(value.isdecimal(), name, value, "must be a whole number")
    return int(value)


def _has_tpu() -> bool:
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of its cluster's; nothing may use a device before.

    A body that ends says goodbye to the others; one that raises does not, since they would wait for each other.

    Raises:
      ValueError: what `find_cluster` raises, and a cluster that JAX cannot join.
    """
    cluster = find_cluster(os.environ, _has_tpu())
    if cluster is None:
        yield
        return
    try:
        jax.distributed.initialize(
            cluster.address, cluster.count, cluster.index, cluster_detection_method=cluster.method,
            heartbeat_timeout_seconds=processes.HEARTBEAT_SECONDS, shutdown_timeout_seconds=_GOODBYE_SECONDS)
    except (ValueError, KeyError, RuntimeError, OSError) as error:  # by the kind of cluster and what it lacks
        raise ValueError(f"{cluster.reason}: says that this is a process of a cluster ({cluster.method}), which JAX "
                         f"cannot join ({type(error).__name__}: {error}); {CLUSTER}=none trains as one process"
                         ) from error
    processes.let_sigterm_end()
    sys.stderr.write(f"{label()}joined by {cluster.reason}; process 0 coordinates at "
                     f"{distributed.global_state.coordinator_address}, and where it is lost, all are\n")
    yield
    processes.gather("done")
    jax.distributed.shutdown()


def label() -> str:
    """`process 2 of 4: `, for the beginning of a line; nothing for a process of its own."""
    if not jax.distributed.is_initialized():
        return ""
    return f"process {jax.process_index()} of {jax.process_count()}: "


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """A process of several that fails ends right here, so that the others notice; any other is left alone."""
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        if isinstance(error, SystemExit) and not error.code:
            raise
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # The interpreter's own end would first wait for the others, who wait for this one.
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
