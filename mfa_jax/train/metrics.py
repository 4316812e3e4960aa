"""What a run tells while it trains: `metrics.jsonl`, TensorBoard, a bar, the peak of the chip."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from mfa_jax.config import require

log = logging.getLogger(__name__)

# Dense bfloat16 FLOP/s of one jax device, by how its `device_kind` starts; the first match counts.
_PEAK_FLOPS = (
    # TPU: cloud.google.com/tpu/docs, system architecture, "peak compute per chip (bf16)". A device is a chip, but
    # half a chip on v2, v3 and 7x.
    ("TPU v2", 22.5e12), ("TPU v3", 61.5e12), ("TPU v4 lite", 138e12), ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5", 459e12), ("TPU v6", 918e12), ("TPU7x", 1153.5e12),
    # NVIDIA data sheets, tensor cores without sparsity (half of the number printed with it).
    ("NVIDIA GB200", 2500e12), ("NVIDIA B200", 2250e12), ("NVIDIA GH200", 989.4e12), ("NVIDIA H200 NVL", 835.5e12),
    ("NVIDIA H200", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835.5e12),
    ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA A100", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12),
    ("NVIDIA L4", 121e12), ("NVIDIA A10G", 70e12),
)


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of a device at its peak; None where that is not known (CPU, other chips, a part of one), or
    where there is no bfloat16 (T4, V100)."""
    kind = device.device_kind
    return next((flops for start, flops in _PEAK_FLOPS if kind.startswith(start) and " MIG " not in kind), None)


class MetricsWriter:
    """Writes `<workdir>/metrics.jsonl`, a JSON object a line with its `step`, and TensorBoard events if installed.

    JSON has no NaN: a value that is not finite is written as `null`, and what it was under `nonfinite`.

    Args:
      workdir: created if it is not there.
      start_step: the step that the run goes on from; -1 where it begins. Lines past it (of a run that was cut off
        after its last checkpoint), and a last line that was cut off, move to `metrics.dropped.jsonl`, so that no step
        is told twice.
      enabled: False writes nothing (every process but the first).
      tensorboard: whether to write TensorBoard events too, to `<workdir>/tensorboard`.

    Raises:
      OSError: the folder cannot be written to.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, start_step: int = 0, enabled: bool = True,
                 tensorboard: bool = True) -> None:
        self.path = Path(workdir) / "metrics.jsonl"
        self._file: Any = None
        self._events: _Events | None = None
        if not enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_lines(self.path, start_step)
        # Unbuffered: what the disk refuses would be tried again with the next line, and where the file is closed.
        self._file = self.path.open("ab", buffering=0)
        if tensorboard:
            self._events = _event_writer(self.path.parent / "tensorboard", start_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line; numbers may be jax scalars. Lists of numbers (the tokens of each expert) go to the line
        alone, not to TensorBoard.

        Raises:
          ValueError: a value that is neither a scalar nor a string nor a list, or is called `step` or `nonfinite`.
          OSError: the line was not written (disk full, ...): nothing of it is in the file, and the next may be tried.
        """
        if self._file is None:
            return
        plain = {name: _plain(name, value) for name, value in values.items()}
        odd = {name: str(v) for name, v in plain.items() if isinstance(v, float) and not math.isfinite(v)}
        line = {"step": step, **plain, **dict.fromkeys(odd), **({"nonfinite": odd} if odd else {})}
        try:
            self._append(json.dumps(line, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise OSError(error.errno, f"the metrics of step {step} were not written: {error.strerror}",
                          str(self.path)) from error
        if self._events is not None:
            try:
                self._events.write(step, {k: v for k, v in plain.items() if not isinstance(v, (str, list))})
            except OSError as error:
                log.warning("%s: no TensorBoard events from step %d on (%s); metrics.jsonl has all", self.path.parent,
                            step, error.strerror)
                self._events.close()
                self._events = None

    def _append(self, line: bytes) -> None:
        """The whole line, or nothing of it."""
        start = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line):]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _plain(name: str, value: Any) -> float | int | str | list[int] | list[float]:
    require(name not in ("step", "nonfinite"), "metric", name, "is the writer's own")
    if isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, list):
        require(all(isinstance(item, (int, float)) and math.isfinite(item) for item in value), f"metric {name}", value,
                "must be a list of finite numbers")
        return value
    require(getattr(value, "shape", None) == (), f"metric {name}", value,
            "must be a scalar or a string, or a list of numbers")
    return value.item()


def _drop_lines(path: Path, start_step: int) -> None:
    """Keeps the whole lines up to `start_step`; the file is replaced at once, what is dropped is kept beside it."""
    if not path.exists():
        return
    kept: list[str] = []
    dropped: list[str] = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        try:
            keep = json.loads(line)["step"] <= start_step
        except (ValueError, KeyError, TypeError):
            keep = False
        (kept if keep else dropped).append(line + "\n")
    if not dropped and (not text or text.endswith("\n")):
        return
    log.info("%s: %d lines past step %d move to metrics.dropped.jsonl", path, len(dropped), start_step)
    with path.with_name("metrics.dropped.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(dropped)
    fresh = path.with_name("metrics.jsonl.tmp")
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(path)


class _Events:
    """TensorBoard events, written by the thread that calls: that of tensorboardX's `SummaryWriter` ends where the disk
    is full, and whoever writes after that waits for it for ever.

    Raises:
      ImportError: tensorboardX is not installed.
      OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboardX import event_file_writer, summary  # an optional extra, looked for only where it is wanted
        from tensorboardX.proto import event_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = event_pb2.Event, summary.scalar
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))
        # What an earlier start told of later steps is no longer shown.
        self._add(start_step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Raises: OSError: the disk is full; what is in the file may then be cut off."""
        for name, value in scalars.items():
            self._add(step, summary=self._scalar(name, value))
        self._writer.flush()

    def _add(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._event(step=step, wall_time=time.time(), **what))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what was written is on disk; of the rest it was told
            self._writer.close()


def _event_writer(folder: Path, start_step: int) -> _Events | None:
    try:
        return _Events(folder, start_step)
    except ImportError:
        log.info("no TensorBoard events: tensorboardX is not installed (the tensorboard extra); metrics.jsonl has all")
        return None


class Progress:
    """How far a run is: a bar on a terminal, a plain line for each update elsewhere (files, notebooks, CI).

    Args:
      total: steps of the whole run.
      enabled: False shows nothing.
      console: where to; standard error unless given.
    """

    def __init__(self, total: int, *, enabled: bool = True, console: Console | None = None) -> None:
        self.total = total
        self._enabled = enabled
        self._first: tuple[int, float] | None = None
        self._console = console or Console(stderr=True)
        self._bar: Bar | None = None
        if enabled and self._console.is_terminal and not self._console.is_jupyter:
            self._bar = Bar(TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24),
                            TextColumn("{task.fields[text]}"), console=self._console)
            self._task = self._bar.add_task("", total=total, text="starting")
            self._bar.start()

    def resumed(self, step: int, source: object) -> None:
        """Begins at a step that an earlier start reached, and says so."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        self.print(f"resumed at step {step} from {source}")

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Shows the loss, the speed, and the time left at the pace since the first update (so without compiling)."""
        if not self._enabled:
            return
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  ETA {self._remaining(step)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        else:
            self._console.print(f"step {step}/{self.total}  {text}", highlight=False, soft_wrap=True)

    def _remaining(self, step: int) -> str:
        now = time.monotonic()
        first_step, began = self._first = self._first or (step, now)
        if step == first_step:
            return "?" if step < self.total else "0:00:00"
        seconds = round((self.total - step) * (now - began) / (step - first_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def print(self, message: str) -> None:
        """Shows a line of its own, above the bar."""
        if self._enabled:
            self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
