"""What the benchmarks share: a peer with our weights, runs that take turns, and a record of the machine.

The peer is `transformers.LlamaForCausalLM` in eager PyTorch. Its random weights are written as a checkpoint and read
by `mfa_jax.convert`, and both models must give the same logits before anything is timed.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mfa_jax.config import GQAConfig, ModelConfig, PositionConfig, require
from mfa_jax.convert import load_pretrained
from mfa_jax.model.transformer import Transformer

MODEL = ModelConfig(
    vocab_size=4096, num_layers=8, model_dim=512, ffn_dim=1376, tie_embeddings=True,
    attention=GQAConfig(num_heads=8, num_kv_heads=8, head_dim=64), position=PositionConfig(base=10000.0),
)
"""The model that is timed: 25 M parameters beside the embedding, as MHA; the peer can be any `GQAConfig`."""

LOGIT_TOLERANCE = 1e-3
"""Largest difference of logits between the two models, over the largest logit."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """One kind of run, timed over and over; CPU seconds over wall seconds are the cores it kept busy."""

    first_call_s: float
    """The warm-up call: compilation and one run."""
    median_s: float
    """Wall seconds of a run."""
    median_user_s: float
    """CPU seconds of all threads in the program."""
    median_system_s: float
    """CPU seconds of all threads in the kernel: page faults, mostly."""
    seconds: tuple[float, ...]
    """Wall seconds of each run, in order."""

    @property
    def compile_s(self) -> float:
        """What the warm-up call took beyond a run; for an eager peer, its lazy set-up."""
        return max(0.0, self.first_call_s - self.median_s)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A `transformers` model, our config and parameters with the same weights, and how far their logits differ."""

    torch: Any
    model: Any
    config: ModelConfig
    params: Any
    logit_difference: float
    """Largest difference over the largest logit."""


def use_threads(threads: int) -> None:
    """Binds the process to its first `threads` cores, which is how XLA's CPU client is told the size of its pool.

    To be called before JAX meets its devices; PyTorch is told by `make_peer`.

    Raises:
      ValueError: the process may not use as many cores.
      NotImplementedError: the system can't bind a process to cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise NotImplementedError(f"threads={threads}: {platform.system()} can't bind a process to cores, Linux can")
    cores = sorted(os.sched_getaffinity(0))
    require(1 <= threads <= len(cores), "threads", threads, f"must be in 1 .. {len(cores)}, the cores of this process")
    os.sched_setaffinity(0, cores[:threads])


def take_turns(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Calls each of `runs` once to warm up, then all of them in turn, `repeats` times: A B C A B C ...

    A load from elsewhere on the machine then falls on all of them alike. A run must return when its work is done.
    """
    require(repeats >= 1, "repeats", repeats, "must be at least 1")
    first = {name: _timed(call)[0] for name, call in runs.items()}
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, call in runs.items():
            taken[name].append(_timed(call))
    found = {}
    for name, rows in taken.items():
        wall, user, system = zip(*rows, strict=True)
        found[name] = Timing(first[name], statistics.median(wall), statistics.median(user),
                             statistics.median(system), wall)
    return found


def _timed(call: Callable[[], object]) -> tuple[float, float, float]:
    """Wall, user and system seconds of a call."""
    cpu, start = os.times(), time.perf_counter()
    call()
    wall, after = time.perf_counter() - start, os.times()
    return wall, after.user - cpu.user, after.system - cpu.system


def import_peer() -> tuple[Any, Any]:
    """The modules torch and transformers.

    Raises:
      ValueError: one of them is not installed.
    """
    try:
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(f"peer: {error.name} is not installed; pip install \"mfa_jax[bench]\"") from error


def make_peer(config: ModelConfig, threads: int, seed: int) -> Peer:
    """A `LlamaForCausalLM` of the shape of `config` with random float32 weights, and the same weights as ours.

    Raises:
      ValueError: torch or transformers is missing, `config` is not GQA with rope in float32, or the logits differ.
    """
    attention, position = config.attention, config.position
    require(isinstance(attention, GQAConfig), "model.attention.kind", attention.kind, "the peer has gqa only")
    require(position.kind == "rope" and position.scaling is None and config.inv_freq is None, "model.position",
            position, "the peer is built with plain rope")
    require(config.dtype == config.param_dtype == "float32", "model.dtype", config.dtype, "both compute in float32")
    torch, transformers = import_peer()
    assert isinstance(attention, GQAConfig)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.model_dim, intermediate_size=config.ffn_dim,
        num_hidden_layers=config.num_layers, num_attention_heads=attention.num_heads, head_dim=attention.head_dim,
        num_key_value_heads=attention.num_kv_heads, rms_norm_eps=config.norm_eps, max_position_embeddings=8192,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": position.base},
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        read, params = load_pretrained(folder)
    same = dataclasses.replace(read, attention_implementation=config.attention_implementation, remat=config.remat)
    require(same == config, "model", config, f"the peer's checkpoint was read as {same}")

    tokens = random_tokens(config, 2, 64, seed)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    ours = np.asarray(jax.jit(lambda p, t: Transformer(config).apply({"params": p}, t)[0])(params, tokens))
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    require(difference < LOGIT_TOLERANCE, "logit_difference", difference,
            f"must be below {LOGIT_TOLERANCE}: a benchmark of another model says nothing")
    return Peer(torch, model, config, params, difference)


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int) -> np.ndarray:
    """Token ids `[batch, length]`, uniform."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on, and its load now: names and versions, no paths."""
    versions: dict[str, str | None] = {}
    for package in ("jax", "jaxlib", "flax", "optax", "torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": threads, "platform": jax.default_backend(),
            "python": platform.python_version(), "versions": versions, "load_before": os.getloadavg()}


def show(record: dict[str, Any], to_table: Callable[[dict[str, Any]], Table], *, as_json: bool) -> None:
    """The record on the terminal, as one JSON object or as a table."""
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        Console().print(to_table(record))


def write(path: str | Path, record: dict[str, Any]) -> None:
    """The record as a JSON file, in place of what was there, at once: a reader never meets half of it.

    Raises:
      OSError: the file can't be written.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(target)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    named = [f"{key.replace('_', ' ')} {found[key]}" for key in ("cpu family", "model") if key in found]
    return ", ".join([found.get("model name", platform.processor() or platform.machine()), *named])
