"""The record of a run: strict JSON, each step once, the bar, the peak of the chip."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mfa_jax.train.metrics import MetricsWriter, Progress, peak_flops


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_one_strict_json_object_a_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "new" / "run", tensorboard=False) as writer:
        writer.write(10, {"loss": jnp.float32(1.5), "tokens": 4096, "lr": np.float64(0.25), "note": "warm"})
        assert len(lines(writer.path)) == 1, "flushed at once"
        writer.write(20, {"loss": float("nan"), "grad": jnp.asarray(-jnp.inf), "fine": jnp.bfloat16(2)})
    assert lines(writer.path) == [
        {"step": 10, "loss": 1.5, "tokens": 4096, "lr": 0.25, "note": "warm"},
        {"step": 20, "loss": None, "grad": None, "fine": 2.0, "nonfinite": {"loss": "nan", "grad": "-inf"}}]


def test_resuming_tells_each_step_once_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (10, 20, 30, 40):
            writer.write(step, {"loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 50, "lo')  # killed while writing
    with MetricsWriter(tmp_path, start_step=20, tensorboard=False) as writer:
        assert [line["step"] for line in lines(path)] == [10, 20]
        writer.write(30, {"loss": -30.0})
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(10, 10.0), (20, 20.0), (30, -30.0)]
    dropped = (tmp_path / "metrics.dropped.jsonl").read_text().splitlines()
    assert dropped == ['{"step": 30, "loss": 30.0}', '{"step": 40, "loss": 40.0}', '{"step": 50, "lo']
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_a_line_that_the_disk_refuses_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """A file that takes ten bytes more: then a whole line, or nothing of it."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(10, {"loss": 1.0})
        size, file = writer.path.stat().st_size, writer._file

        def write(data: bytes) -> int:
            left = size + 10 - writer.path.stat().st_size
            if left <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return file.write(data[:left])

        writer._file = mock.Mock(wraps=file, write=write)
        with pytest.raises(OSError, match="the metrics of step 20 were not written: No space left") as caught:
            writer.write(20, {"loss": 2.0})
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(writer.path))
        writer._file = file
        writer.write(30, {"loss": 3.0})
    assert [line["step"] for line in lines(writer.path)] == [10, 30]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_ends_the_events_of_tensorboard_and_nothing_else(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    with caplog.at_level(logging.WARNING, "mfa_jax"), MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        assert writer._events is not None
        records = writer._events._writer._py_recordio_writer
        records._writer.close()
        records._writer = full = Path("/dev/full").open("wb")
        for step in range(2, 30):
            writer.write(step, {f"value {i}": 1.0 for i in range(20)})
        with contextlib.suppress(OSError):  # what it still holds
            full.close()
    assert caplog.text.count("no TensorBoard events from step 2 on (No space left on device)") == 1
    assert len(lines(writer.path)) == 29


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_bad_values(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match="metric loss=.*must be a scalar or a string"):
            writer.write(1, {"loss": jnp.ones(2)})
        with pytest.raises(ValueError, match="metric='step': is the writer's own"):
            writer.write(1, {"step": 1})
        with pytest.raises(ValueError, match=r"metric counts=\[1, nan\]: must be a list of finite numbers"):
            writer.write(1, {"counts": [1, float("nan")]})
        assert lines(writer.path) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError, match="file"):
        MetricsWriter(tmp_path / "file" / "run", tensorboard=False)


def test_tensorboard_events_hold_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    with MetricsWriter(tmp_path) as writer:
        writer.write(10, {"loss": 1.5, "note": "text is for the JSON alone"})
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1 and b"loss" in events[0].read_bytes() and b"note" not in events[0].read_bytes()


def test_without_tensorboard_it_is_said_once_and_the_rest_is_written(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # what an import finds where it is not installed
    with caplog.at_level(logging.INFO, "mfa_jax"), MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 2.0})
    assert caplog.text.count("tensorboardX is not installed") == 1
    assert len(lines(writer.path)) == 2 and not (tmp_path / "tensorboard").exists()


def test_progress_is_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with Progress(30, console=Console(file=out, width=40)) as progress:
        progress.update(20, loss=5.25, tokens_per_second=12345.6)
        progress.print("saved [10/30]")
        progress.update(30, loss=4.0, tokens_per_second=1.0)
    first, saved, last = out.getvalue().splitlines()
    assert first == "step 20/30  loss 5.2500  12,346 tokens/s  ETA ?"
    assert saved == "saved [10/30]"
    assert last == "step 30/30  loss 4.0000  1 tokens/s  ETA 0:00:00"


def test_progress_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 1060.0])
    monkeypatch.setattr("mfa_jax.train.metrics.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    out = io.StringIO()
    with Progress(1000, console=Console(file=out, width=80)) as progress:
        progress.update(10, loss=1.0, tokens_per_second=1.0)
        progress.update(20, loss=1.0, tokens_per_second=1.0)  # 10 steps a minute, 980 to go
    assert out.getvalue().splitlines()[1].endswith("ETA 1:38:00")


def test_progress_is_a_bar_on_a_terminal_and_nothing_when_off() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, force_jupyter=False)
    with Progress(30, console=console) as progress:
        progress.resumed(10, "checkpoints")
        progress.update(30, loss=5.25, tokens_per_second=10.0)
        progress.print("a line above")
    assert "30/30" in out.getvalue() and "loss 5.2500" in out.getvalue() and "━" in out.getvalue()
    assert "resumed at step 10 from checkpoints" in out.getvalue() and "a line above" in out.getvalue()
    out = io.StringIO()
    with Progress(30, enabled=False, console=Console(file=out)) as progress:
        progress.update(1, loss=1.0, tokens_per_second=1.0)
        progress.print("no")
    assert out.getvalue() == ""


@pytest.mark.parametrize(("kind", "teraflops"), [
    ("TPU v4", 275), ("TPU v4 lite", 138), ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459),
    ("TPU v6 lite", 918), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H200", 989.4), ("NVIDIA H200 NVL", 835.5), ("NVIDIA B200", 2250), ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("Tesla T4", None), ("cpu", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GeForce RTX 4090", None)])
def test_peak_flops(kind: str, teraflops: float | None) -> None:
    found = peak_flops(mock.Mock(spec=jax.Device, device_kind=kind))
    assert found is None if teraflops is None else found == teraflops * 1e12


def test_the_cpu_has_no_known_peak() -> None:
    assert peak_flops(jax.devices("cpu")[0]) is None


def test_a_last_line_without_its_end_is_completed_before_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with MetricsWriter(tmp_path, start_step=2) as writer:
        writer.write(3, {"loss": 1.0})
    assert [line["step"] for line in lines(writer.path)] == [1, 2, 3]
