"""What decodes side by side in `bench_decode_kernel`: our backends, and the peers that JAX and PyTorch come with.

A peer sees each key head of each row as a row of its own, with the query heads that share it: the form that costs
every one of them least. It reads the same arrays. What a peer can't do is an obstacle, and recorded as one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernel_cases import Case
from mfa_jax.kernels import IMPLEMENTATIONS, decode_attention, default_device, resolve


@dataclasses.dataclass(frozen=True)
class Side:
    """One implementation: whether it can serve a call, and how it is run."""

    obstacle: Callable[[Case, int], str | None]
    """Why it can't serve a case in caches of so many tokens; None if it can."""
    attend: Callable[[Case, dict[str, Any], bool], Any]
    """Output `[B, T, N, h]` of the arrays of a case; with True, every row is valid to the end of its cache."""
    library: str = "jax"
    """`jax` or `torch`: whose arrays it takes."""
    ours: bool = False
    compiles_slowly: bool = False
    """Takes many seconds a shape; left to the points that matter most."""


def _ours(name: str) -> Side:
    def obstacle(case: Case, S: int) -> str | None:
        try:
            resolve(name, case.call(S), default_device())
        except NotImplementedError as error:
            return str(error)
        return None

    def attend(case: Case, call: dict[str, Any], full: bool) -> Any:
        return decode_attention(**call, scale=case.H**-0.5, value_width=case.value_width, implementation=name)

    return Side(obstacle, attend, ours=True)


def _common_obstacle(case: Case) -> str | None:
    if case.cache_dtype != case.dtype:
        return f"reads no cache of {case.cache_dtype} with a scale a token"
    if case.rope:
        return "can't turn keys that are stored before rope"
    if case.T > 1 or case.alibi:
        return "is given one token without a bias here"
    return None


def _folded(case: Case, call: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """`q [R, G, H]`, `k [R, S, H]`, `v [R, S, h]` and lengths `[R]` of `R = B K` rows; no array is copied."""
    q, k, v = call["q"], call["k"], call["v"]
    B, S, G = q.shape[0], k.shape[-2], case.N // case.K
    k = k.reshape(B * case.K, S, case.H)
    v = k[..., : case.value_width] if v is None else v.reshape(B * case.K, S, case.H)
    lengths = call["lengths"]
    rows = lengths.repeat(case.K) if isinstance(lengths, jax.Array) else lengths.repeat_interleave(case.K)
    return q.reshape(B * case.K, G, case.H), k, v, rows


def _unfolded(case: Case, out: Any) -> Any:
    return out.reshape(-1, 1, case.N, out.shape[-1])


def _dot_product_attention(case: Case, call: dict[str, Any], full: bool, *, implementation: Any) -> Any:
    q, k, v, lengths = _folded(case, call)
    if case.value_width is not None:
        # It wants values as wide as keys; what is too much is cut off after.
        v = k
    limits = {} if full else {"key_value_seq_lengths": lengths}
    # Heads that share their keys, as queries of one head.
    out = jax.nn.dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None], scale=case.H**-0.5,
                                       implementation=implementation, **limits)
    return _unfolded(case, out[:, :, 0, : case.value_width])


def _cudnn_obstacle(case: Case, S: int) -> str | None:
    if default_device().compute_capability < 8:
        return f"cuDNN runs on NVIDIA GPUs, and this is {default_device().platform}"
    if case.H > 256:
        return f"cuDNN takes heads of up to 256, not {case.H}"
    return _common_obstacle(case)


_STOCK = "jax.experimental.pallas.ops.gpu.decode_attention"


def _stock_obstacle(case: Case, S: int) -> str | None:
    if default_device().platform != "gpu":
        return f"runs on GPUs, and this is {default_device().platform}"
    if case.value_width is not None:
        return "wants values as wide as keys"
    try:
        importlib.import_module(_STOCK)
    except ImportError as error:
        return f"is not in this JAX: {error}"
    return _common_obstacle(case)


def _stock(case: Case, call: dict[str, Any], full: bool) -> Any:
    q, k, v, lengths = _folded(case, call)
    mqa = importlib.import_module(_STOCK).mqa
    # With its own 256 keys a block, heads of 256 ask for more shared memory than an H100 has.
    block = 256 if case.H <= 128 else 128
    return _unfolded(case, mqa(q, k, v, kv_seq_len=None if full else lengths, sm_scale=case.H**-0.5, block_k=block))


def _torch_obstacle(case: Case, S: int) -> str | None:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return "torch is not installed"
    platform = default_device().platform
    if platform == "gpu" and not torch.cuda.is_available():
        return "this torch has no CUDA"
    if platform not in ("cpu", "gpu"):
        return f"torch is not measured on a {platform}"
    return _common_obstacle(case)


def _sdpa(case: Case, call: dict[str, Any], full: bool) -> Any:
    torch = importlib.import_module("torch")
    q, k, v, lengths = _folded(case, call)
    held = None if full else (torch.arange(k.shape[1], device=k.device) < lengths[:, None])[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=held,
                                                           scale=case.H**-0.5)
    return _unfolded(case, out)


@functools.cache
def _compiled_flex() -> Any:
    torch, flex = importlib.import_module("torch"), importlib.import_module("torch.nn.attention.flex_attention")
    return torch.compile(flex.flex_attention, dynamic=False)


def _flex(case: Case, call: dict[str, Any], full: bool) -> Any:
    if not full:
        raise NotImplementedError("FlexDecoding is measured on rows of one length: a mask a mix would be compiled anew")
    q, k, v, _ = _folded(case, call)
    return _unfolded(case, _compiled_flex()(q[:, :, None], k[:, None], v[:, None], scale=case.H**-0.5, enable_gqa=True))


def sides(torch: bool = True) -> dict[str, Side]:
    """All of them by name, ours first; ours are the implementations that are meant to be fast."""
    slow = {"reference", *(name for name in IMPLEMENTATIONS if name.endswith("interpret"))}
    found = {name: _ours(name) for name in IMPLEMENTATIONS if name not in slow}
    found["jax.nn xla"] = Side(lambda case, S: _common_obstacle(case),
                               functools.partial(_dot_product_attention, implementation="xla"))
    found["jax.nn cudnn"] = Side(_cudnn_obstacle, functools.partial(_dot_product_attention, implementation="cudnn"))
    found["pallas.ops.gpu"] = Side(_stock_obstacle, _stock)
    if torch:
        found["torch sdpa"] = Side(_torch_obstacle, _sdpa, library="torch")
        found["torch flex"] = Side(_torch_obstacle, _flex, library="torch", compiles_slowly=True)
    return found


def as_torch(call: dict[str, Any]) -> dict[str, Any]:
    """The arrays as tensors in the same memory."""
    torch = importlib.import_module("torch")
    jax.block_until_ready(call)
    return {name: None if x is None else torch.from_dlpack(x) for name, x in call.items()}


def torch_program(side: Side, case: Case, calls: list[dict[str, Any]], full: bool) -> Callable[[], Any]:
    """A call that decodes each of `calls` once, in one CUDA graph where there is CUDA: without the cost of a launch
    from Python, which the JAX programs do not have either."""
    torch = importlib.import_module("torch")

    def run() -> list[Any]:
        with torch.inference_mode():
            return [side.attend(case, call, full) for call in calls]

    if not torch.cuda.is_available():
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> list[Any]:
        graph.replay()
        return out

    return replay


def release() -> None:
    """Hands memory back that PyTorch holds on to, for JAX to use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(out: Any) -> None:
    """Until what a side returned has been computed."""
    if isinstance(jax.tree.leaves(out)[0], jax.Array):
        jax.block_until_ready(out)
    elif importlib.import_module("torch").cuda.is_available():
        importlib.import_module("torch").cuda.synchronize()


def as_jax(out: Any) -> jax.Array:
    """One output as a JAX array."""
    return out if isinstance(out, jax.Array) else jnp.from_dlpack(out.contiguous())
