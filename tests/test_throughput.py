"""Where the time of a run goes, what is read ahead, which flags compile it, and what is said when memory runs out."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
import types
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfa_jax import axes
from mfa_jax.config import TrainConfig
from mfa_jax.data import Batches
from mfa_jax.train import compiler_flags, goodput, loop, parts, processes, run
from mfa_jax.train.checkpoint import Checkpoints, CheckpointWriteError
from mfa_jax.train.compiler_flags import Flag, compiler_options
from mfa_jax.train.compiling import DeviceMemoryError, DoesNotFitError, Memory, compile_program, explaining_memory
from mfa_jax.train.feed import Feed
from mfa_jax.train.goodput import Goodput
from mfa_jax.train.profiling import ProfileWindow
from tests.test_train import config_for, corpus, metric_lines, saved_leaves, train_on_one  # noqa: F401  # a fixture

pytestmark = pytest.mark.xdist_group("train")


# ---- goodput ---------------------------------------------------------------------------------------------------


def test_goodput_is_what_no_phase_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.0, 103.0, 110.0])
    monkeypatch.setattr(goodput, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    found = Goodput()
    with found.phase("compile"):
        pass
    found.add("data", 1.0)
    metrics = found.metrics()
    assert metrics["goodput"] == pytest.approx(0.6)
    assert metrics["seconds/compile"] == 3.0 and metrics["seconds/data"] == 1.0 and metrics["seconds/steps"] == 6.0
    assert sum(value for name, value in metrics.items() if name != "goodput") == pytest.approx(10.0)


def test_a_phase_counts_although_it_ends_in_an_error() -> None:
    found = Goodput()
    with pytest.raises(RuntimeError), found.phase("restore"):
        time.sleep(0.01)
        raise RuntimeError("no")
    assert found.metrics()["seconds/restore"] >= 0.01
    assert found.summary().startswith("goodput ") and "compile" not in found.summary()


# ---- data ------------------------------------------------------------------------------------------------------


class Counting(Batches):
    """A loader of batches 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.drawn = 0

    def __next__(self) -> dict[str, np.ndarray]:
        self.drawn += 1
        return {"inputs": np.full((2, 4), self.drawn - 1, np.int32)}

    def get_state(self) -> dict[str, int | str]:
        return {"next_index": self.drawn}


def test_what_was_read_ahead_is_not_in_the_place_of_a_checkpoint() -> None:
    mesh = axes.make_mesh((1,) * 5, jax.devices()[:1])
    loader, clock = Counting(), Goodput()
    feed = Feed(loader, mesh, clock)
    assert feed.place == {"next_index": 0}
    done = jax.block_until_ready(jnp.zeros(()))
    for number in range(3):
        batch = feed.take()
        np.testing.assert_array_equal(batch["inputs"], np.full((2, 4), number))
        assert feed.place == {"next_index": number + 1}
        feed.read_ahead(done)
        assert loader.drawn == number + 2 and feed.place == {"next_index": number + 1}
    assert clock.metrics()["seconds/data"] > 0, "the devices were waiting: it counts"
    before = clock.metrics()["seconds/data"]
    feed.read_ahead(mock.Mock(is_ready=lambda: False))
    assert clock.metrics()["seconds/data"] == before, "the devices were busy all the while"



# ---- a whole run -----------------------------------------------------------------------------------------------


def record_order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """When a step is issued, a batch drawn, and the flag of a step read."""
    events: list[str] = []
    draw, compiled, read = Batches.__next__, parts.compile_program, loop._Loop._require_finite

    class Step:
        def __init__(self, program: Any) -> None:
            self.memory_analysis, self._program = program.memory_analysis, program

        def __call__(self, *arguments: Any) -> Any:
            events.append("issue")
            return self._program(*arguments)

    def note(name: str, function: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            events.append(name)
            return function(*arguments)
        return noted

    monkeypatch.setattr(parts, "compile_program", lambda *arguments: Step(compiled(*arguments)))
    monkeypatch.setattr(Batches, "__next__", note("draw", draw))
    monkeypatch.setattr(loop._Loop, "_require_finite", note("read", read))
    return events


@pytest.mark.slow
def test_a_run_that_cannot_save_goes_on_if_told_to_and_says_where_its_time_went(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:
    config = config_for(tmp_path / "run", corpus, log_every=1, save_every=2, profile=(2, 2), eval_every=0,
                        on_save_failure="continue", compilation_cache=str(tmp_path / "cache"))
    save = Checkpoints.save
    full = [2]
    events = record_order(monkeypatch)

    def failing(self: Checkpoints, step: int, *rest: Any, **more: Any) -> None:
        if step in full:
            full.remove(step)
            raise CheckpointWriteError(28, f"checkpoint of step {step} was not written: No space left", "there")
        save(self, step, *rest, **more)

    monkeypatch.setattr(Checkpoints, "save", failing)
    cache = {name: jax.config.values[name] for name in ("jax_compilation_cache_dir",
                                                        "jax_persistent_cache_min_compile_time_secs")}
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        result = train_on_one(config)
        assert list((tmp_path / "cache").iterdir()), "nothing was kept of what was compiled"
    finally:
        for name, value in cache.items():
            jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
    issued = [number for number, event in enumerate(events) if event == "issue"]
    assert len(issued) == 6 and all(events[number + 1] == "draw" for number in issued[:-1]), \
        "the next batch is on its way before anything waits for the step"
    assert events.count("draw") == 6, "none past the end, which might be damaged"
    assert "step 2 was not written: No space left; the run goes on" in caplog.text
    lines = metric_lines(config.workdir)
    assert [line.get("failed_saves") for line in lines] == [None, None, 1, 1, 1, 1]
    with Checkpoints(tmp_path / "run" / run.CHECKPOINTS, read_only=True) as checkpoints:
        assert checkpoints.steps() == [4, 6]
    for line in lines:
        assert 0 < line["goodput"] < 1 and line["seconds/compile"] > 0 and line["seconds/restore"] > 0
        assert line["tokens_per_second_per_device"] == line["tokens_per_second"]
    assert lines[-1]["seconds/checkpoint"] > lines[1]["seconds/checkpoint"] == 0
    assert [line["seconds/profile"] > 0 for line in lines] == [False, False, True, True, True, True]
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1
    assert result.metrics["seconds/checkpoint"] > lines[-1]["seconds/checkpoint"], "the last save is in the result"
    full[:] = [8]
    straight = config_for(tmp_path / "run", corpus, steps=8, save_every=2, eval_every=0, on_save_failure="continue")
    with pytest.raises(CheckpointWriteError, match="step 8"):
        train_on_one(straight)  # what was done since is lost, so the last one has to be told
    assert run.load_trained(tmp_path / "run").step == 6
    assert saved_leaves(straight)["embed"].size
    full[:] = [8]
    longer = dataclasses.replace(straight, steps=12)
    monkeypatch.setattr(processes, "stop_signals", lambda: contextlib.nullcontext(lambda step: step >= 8))
    stopped = train_on_one(longer)
    assert stopped.interrupted and not full and run.load_trained(tmp_path / "run").step == 8, "saved after the stop"
    assert "failed_saves" not in stopped.metrics, "those of an earlier start"


def test_each_of_several_processes_has_a_folder_for_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    monkeypatch.setattr(jax.profiler, "start_trace", folders.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    for count in (1, 2):
        monkeypatch.setattr(jax, "process_count", lambda count=count: count)
        with ProfileWindow((0, 1), tmp_path, Goodput()) as window:
            window.at(0, ())
    assert folders == [tmp_path, tmp_path / "process-1"]


@pytest.mark.parametrize("window", [(-1, 2), (3, 0)])
def test_a_window_that_is_none(window: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="profile=.*must be a step from 0 on and a number of steps from 1 on"):
        TrainConfig(profile=window)


# ---- flags -----------------------------------------------------------------------------------------------------


def test_flags_are_for_several_devices_and_the_users_win(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (Flag("xla_one", True, "why", "where"), Flag("xla_two", False, "why", "where"))
    monkeypatch.setattr(compiler_flags, "FLAGS", {"gpu": flags})
    assert compiler_options("gpu", 8, {}) == {"xla_one": True, "xla_two": False}
    assert compiler_options("gpu", 1, {}) == compiler_options("cpu", 8, {}) == {}
    assert compiler_options("gpu", 8, {"XLA_FLAGS": "--xla_one=false --xla_else=1"}) == {"xla_two": False}
    assert compiler_options("gpu", 8, {"LIBTPU_INIT_ARGS": "--xla_two=true"}) == {"xla_one": True}


def test_a_program_is_compiled_with_the_flags_of_its_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_flags, "FLAGS", {"cpu": (Flag("xla_no_such", True, "", ""),)})
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    compile_program(lowered, "cpu", 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such"):
        compile_program(lowered, "cpu", 2)


# ---- memory ----------------------------------------------------------------------------------------------------


def test_running_out_of_memory_says_what_the_step_needs() -> None:
    """XLA really refuses the allocation; the device that says what it has to give is a stand-in."""
    memory = Memory(arguments=3 * 2**30, output=2**30, aliased=2**30, temporaries=2 * 2**30, code=0, peak=4 * 2**30)
    gpu = mock.Mock(platform="gpu", memory_stats=lambda: {"bytes_limit": 2**31})

    def allocate() -> jax.Array:
        return jax.block_until_ready(jax.jit(lambda: jnp.zeros((2**24, 2**24)))())  # a petabyte

    with pytest.raises(DeviceMemoryError) as caught, explaining_memory(TrainConfig(), gpu, memory):
        allocate()
    message = str(caught.value)
    assert "a training step needs 4.00 GiB of each device (3.00 GiB state and batch, 2.00 GiB temporaries)" in message
    assert "2.00 GiB is what it has to give" in message and "model.remat=full (now none)" in message
    assert "RESOURCE_EXHAUSTED" in message and isinstance(caught.value, MemoryError)
    with pytest.raises(DeviceMemoryError, match=r"needs 5.00 GiB .* how much it has is not known"), explaining_memory(
            TrainConfig(), jax.devices()[0], memory):
        allocate()


def test_what_a_device_has_to_give_is_asked_of_one_of_this_process(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    """The first device of the mesh is another process's, and cannot be asked."""
    other = mock.Mock(platform="gpu", memory_stats=mock.Mock(side_effect=jax.errors.JaxRuntimeError("not addressable")))
    mine = mock.Mock(platform="gpu", memory_stats=lambda: {"bytes_limit": 2**31})
    mesh = mock.Mock(devices=np.array([other, mine]), local_devices=[mine])
    monkeypatch.setattr(axes, "make_mesh", lambda *_: mesh)
    monkeypatch.setattr(jax, "set_mesh", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(loop, "require_divisible_batch", lambda *_: None)
    monkeypatch.setattr(loop.starting, "describe", lambda *_: "")
    monkeypatch.setattr(parts.Parts, "build", lambda *_: mock.Mock(memory=Memory(1, 1, 1, 1, 1, 1)))
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    monkeypatch.setattr(Checkpoints, "restore", mock.Mock(side_effect=error))
    with pytest.raises(DeviceMemoryError, match=r"2.00 GiB is what it has to give"):
        train_on_one(config_for(tmp_path / "run", corpus))


def test_a_step_that_does_not_compile_for_its_memory_says_so() -> None:
    refusal = "RESOURCE_EXHAUSTED: ... Used 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G."
    with pytest.raises(DeviceMemoryError, match=r"needs 20.00 GiB of each device, and 15.75 GiB is what it has"), \
            explaining_memory(TrainConfig(), jax.devices()[0]):
        raise DoesNotFitError(refusal)


OF_A_DEVICE = (
    "Ran out of memory on HBM, the total memory required for HLO temporaries (32.00G) exceeds available HBM (15.75G).",
    "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.03G of 15.75G hbm.",
    "Error allocating device buffer: Attempting to allocate 15.65G. That was not possible.; (0x0x0_HBM0)",
    "Attempting to reserve 6.48G at the bottom of memory. That was not possible.",
    "Out of memory allocating 1125899906842624 bytes.",
    "Out of memory while trying to allocate 4770354232 bytes.",
    "Failed to allocate request for 176.00MiB (184549376B) on device ordinal 0",
    ": CUDA_ERROR_OUT_OF_MEMORY: out of memory",
)
ON_THE_CHIP = (
    "Allocation (size=268435456) would exceed memory (size=134217728) :: #allocation2 [shape = 'f32[65536,1024]', "
    "space=vmem, size = 0x10000000, scoped, tag = 'scratch operand'] :: vm.1",
    "Ran out of memory in memory space vmem while allocating on stack for %gmm.1.",
    "Scoped allocation with size 20.00M and limit 16.00M exceeded scoped vmem limit by 4.00M.",
    "Shared memory size limit exceeded: requested 300000, available: 232448",
)


@pytest.mark.parametrize("text", [*OF_A_DEVICE, *ON_THE_CHIP])
def test_what_a_kernel_lacks_on_the_chip_is_no_lack_of_device_memory(text: str) -> None:
    """As the compilers and runtimes for TPU, CPU and GPU put it, while compiling and while running."""
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}")
    lowered = mock.Mock(compile=mock.Mock(side_effect=error))
    with pytest.raises(DoesNotFitError if text in OF_A_DEVICE else jax.errors.JaxRuntimeError, match=re.escape(text)):
        compile_program(lowered, "cpu", 1)
    with pytest.raises(DeviceMemoryError if text in OF_A_DEVICE else jax.errors.JaxRuntimeError), explaining_memory(
            TrainConfig(), jax.devices()[0], Memory(1, 1, 1, 1, 1, 1)):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    memory = Memory(1, 1, 1, 1, 1, 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explaining_memory(
            TrainConfig(), jax.devices()[0], memory):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")
