"""Who a process joins, by its environment, and what processes do where they disagree."""

from __future__ import annotations

import os
import signal
from unittest import mock

import jax
import pytest
from etils import epath

from mfa_jax import axes
from mfa_jax.train import processes
from mfa_jax.train.cluster import Cluster, find_cluster, joined, label

SLURM = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(("environment", "tpu", "method"), [
    ({}, False, None),
    (EXPLICIT, False, "deactivate"),
    (SLURM, False, "slurm"),
    ({**SLURM, **EXPLICIT}, False, "deactivate"),
    ({**SLURM, "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, False, "slurm"),
    ({**SLURM, "SLURM_NTASKS": "1"}, False, None),
    ({**SLURM, "MFA_JAX_CLUSTER": "none"}, False, None),
    ({"MFA_JAX_CLUSTER": "mpi4py"}, False, "mpi4py"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, False, "ompi"),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, False, None),
    ({}, True, "gcetpu"),
    ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, "gketpu"),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_SKIP_MDS_QUERY": "1"}, True, "gketpu"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
    ({**KUBERNETES, "TPU_WORKER_HOSTNAMES": "pod-0"}, True, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_PROCESS_ADDRESSES": "a:8471"}, True, None),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True, "gketpu"),
    (KUBERNETES, False, "k8s"),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None),
    ({**KUBERNETES, "TPU_WORKER_HOSTNAMES": "a,b"}, True, "gketpu"),
])
def test_the_environment_decides(environment: dict[str, str], tpu: bool, method: str | None) -> None:
    found = find_cluster(environment, tpu)
    assert (None if found is None else found.method) == method


def test_explicit_settings_are_taken_as_they_are() -> None:
    assert find_cluster(EXPLICIT, tpu=True) == Cluster("deactivate", "JAX_NUM_PROCESSES=4", "10.0.0.1:1234", 4, 3)


@pytest.mark.parametrize(("environment", "message"), [
    ({"MFA_JAX_CLUSTER": "slurn"}, "MFA_JAX_CLUSTER='slurn': must be none or one of slurm, "),
    ({"JAX_NUM_PROCESSES": "4"}, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID is not set"),
    ({**EXPLICIT, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: must be below JAX_NUM_PROCESSES=4"),
    ({**EXPLICIT, "JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES=0: must be at least 1"),
    ({**EXPLICIT, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES='four': must be a whole number"),
    ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, "set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"),
    ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS='4': of several tasks this is one that srun did not start"),
])
def test_what_is_not_clear_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_cluster(environment, tpu=False)


def test_a_cluster_that_jax_cannot_join_is_no_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFA_JAX_CLUSTER", "ompi")
    with pytest.raises(ValueError, match=r"=ompi: .* which JAX cannot join \(\w*Error: "), joined():
        raise AssertionError("went on alone")
    monkeypatch.setenv("MFA_JAX_CLUSTER", "none")
    with joined():
        assert label() == ""


# ---- agreement: what the others say comes from a list ----


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What processes 1, 2, ... give; this one is process 0 of them."""
    said: list[str] = []
    monkeypatch.setattr(processes, "gather", lambda text: [text, *said])
    monkeypatch.setattr(processes.jax, "process_count", lambda: 1 + len(said))
    return said


def test_processes_that_differ_are_named(others: list[str]) -> None:
    others.extend(["steps 10", "steps 20", "steps 10"])
    with pytest.raises(ValueError, match=r"config: process 2 has another than process 0: \.\.\.'steps 20', not"):
        processes.require_same("config", "steps 10")
    others[1] = "steps 10"
    processes.require_same("config", "steps 10")


def test_a_failure_of_one_is_a_failure_of_all(others: list[str]) -> None:
    others.extend(["", "file is cut"])
    with pytest.raises(LookupError, match="^process 2: file is cut$"):
        processes.agreeing(lambda: 7, LookupError)
    others[1] = ""
    assert processes.agreeing(lambda: 7, LookupError) == 7

    def fails() -> int:
        raise LookupError("no such file")

    with pytest.raises(LookupError, match="^process 0: no such file$"):
        processes.agreeing(fails, LookupError)
    others[:] = ["no such file", "no such file"]
    with pytest.raises(LookupError, match="^no such file$"):
        processes.agreeing(fails, LookupError)


def test_the_others_follow_process_0(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes, "gather", lambda text: [done.append("gather") or "", text])
    assert processes.leader_first(lambda: done.append("action") or 3) == 3
    assert done == ["gather", "action"]
    monkeypatch.setattr(processes, "gather", lambda text: ["failed: disk full", text])
    with pytest.raises(ValueError, match="process 0 failed: disk full"):
        processes.leader_first(lambda: done.append("not done"))
    assert "not done" not in done


def test_a_folder_of_one_host_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: epath.Path) -> None:
    monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes, "gather", lambda text: [".write-test-0-99", text] if "write" in text else ["", ""])
    with pytest.raises(ValueError, match="must be one that all processes share"):
        processes.require_shared(epath.Path(tmp_path) / "run")
    (tmp_path / "run" / ".write-test-0-99").write_text("")
    processes.require_shared(epath.Path(tmp_path) / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".write-test-0-99"]


@pytest.mark.parametrize(("failure", "waits"), [
    (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), True),
    (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), True),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
])
def test_a_failure_of_devices_waits_for_a_number_whatever_was_made_of_it(
    failure: Exception, waits: bool, others: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others.append("")
    slept: list[float] = []
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    with pytest.raises(OSError, match="not written"), processes.naming_the_lost():
        try:
            raise failure
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            raise OSError(5, "checkpoint was not written") from error
    assert [seconds > processes.HEARTBEAT_SECONDS for seconds in slept] == [True] * waits
    with pytest.raises(ValueError, match="steps"), processes.naming_the_lost():
        raise ValueError("steps")
    assert len(slept) == waits


def test_one_process_stops_at_its_own_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with processes.stop_signals() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_leaves_the_save_alone_and_a_second_interrupt_does_not() -> None:
    died: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: died.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), processes.stop_signals() as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop(1) and not died
            os.kill(os.getpid(), signal.SIGINT)
            assert stop(2)
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert died == [signal.SIGTERM], "as it was before"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("platform", "refused"), [("tpu", True), ("gpu", False)])
def test_tpus_of_several_slices_are_refused(
    platform: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs of several hosts have such numbers, too."""
    devices = [mock.Mock(platform=platform, slice_index=i // 4) for i in range(8)]
    made = axes.make_mesh((1,) * 5, jax.devices()[:1])
    monkeypatch.setattr(axes.jax, "make_mesh", lambda *_, **__: made)
    assert axes.make_mesh(devices=devices[:4]) is made
    if not refused:
        assert axes.make_mesh(devices=devices) is made
        return
    with pytest.raises(NotImplementedError, match="mesh: the 8 TPUs are of 2 slices; accepted: those of one slice"):
        axes.make_mesh(devices=devices)
