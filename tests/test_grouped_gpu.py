"""The experts' grouped product by the Hopper kernels: right in the interpreter, compiled for an H100."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

from experiments import bench_experts
from experiments.bench_experts import BenchExpertsConfig
from mfa_jax.kernels import Device
from mfa_jax.model import grouped
from mfa_jax.model.grouped import grouped_matmul, resolve

H100 = Device("gpu", "NVIDIA H100 80GB HBM3", 9.0, 132)
needs_interpreter = pytest.mark.skipif(not hasattr(plgpu, "force_gpu_interpret_mode"),
                                       reason="no interpreter before JAX 0.11")


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if on a GPU of three multiprocessors, whose kernels are interpreted."""
    gpu = types.SimpleNamespace(core_count=3)
    monkeypatch.setattr(transposed_ragged_dot_mgpu, "jax",
                        types.SimpleNamespace(**{**vars(jax), "devices": lambda: [gpu]}))
    monkeypatch.setattr(grouped, "default_device", lambda: H100)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


# Groups that end on a tile of 128 rows, one before it and one behind it; empty ones; rows that no group has.
@needs_interpreter
@pytest.mark.parametrize("sizes", [
    [127, 1, 129, 43], *(pytest.param(sizes, marks=pytest.mark.slow)
                         for sizes in ([128, 0, 128, 44], [0, 0, 300, 0], [5, 100, 0, 60]))], ids=str)
def test_the_kernels_equal_ragged_dot_and_its_gradients(sizes: list[int], on_hopper: None) -> None:
    """Of rows and widths that no tile divides; what no group has is NaN, and shows nowhere."""
    count, D, F = 300, 72, 136
    rows, weights, cotangent = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) / shape[-2]**0.5
                                for i, shape in enumerate([(count, D), (4, D, F), (count, F)]))
    groups, served = jnp.array(sizes, jnp.int32), sum(sizes)

    @functools.partial(jax.jit, static_argnames="name")
    def both(rows: jax.Array, weights: jax.Array, cotangent: jax.Array, name: str) -> Any:
        out, back = jax.vjp(lambda rows, weights: grouped_matmul(rows, weights, groups, name), rows, weights)
        return out, *back(cotangent)

    found = both(rows.at[served:].set(jnp.nan), weights, cotangent.at[served:].set(jnp.nan), "mosaic_gpu")
    expected = both(*(x.astype(jnp.float32) for x in (rows, weights, cotangent.at[served:].set(0))), "ragged_dot")
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == jnp.bfloat16 and x.shape == y.shape
        # One rounding of a float32 sum.
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=2**-8, atol=2**-8 * float(jnp.abs(y).max()) / 16)
    assert not np.any(found[0][served:]) and not np.any(found[1][served:])


def test_where_the_kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, capability in (("cpu", 0.0), ("gpu", 8.0), ("gpu", 10.0), ("tpu", 0.0)):
        with pytest.raises(NotImplementedError, match=f"of compute capability 9 .Hopper., not on {platform} of "
                                                      f"{capability:g}; use auto, ragged_dot"):
            resolve("mosaic_gpu", platform, capability)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(NotImplementedError, match=r"needs JAX 0.11, this is .*; use auto, ragged_dot"):
        resolve("mosaic_gpu", "gpu", 9.0)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert resolve("mosaic_gpu", "gpu", 9.0) == "mosaic_gpu" and resolve("auto", "gpu", 9.0) == "ragged_dot"
    monkeypatch.setattr(grouped, "default_device", lambda: H100)
    with pytest.raises(NotImplementedError, match="bfloat16 or of float16, not float32 and float32"):
        grouped_matmul(jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2]), "mosaic_gpu")


# ---- the benchmark ---------------------------------------------------------------------------------------------

TINY = BenchExpertsConfig(model="tiny-mfa-moe", rows=96, repeats=1)


@pytest.mark.slow
@needs_interpreter
def test_the_benchmark_times_what_serves_after_a_check(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_experts, "default_device", lambda: H100)
    record = bench_experts.measure(TINY)
    assert record["auto"] == "ragged_dot"
    even, skewed = record["points"]
    assert sum(even["sizes"]) == sum(skewed["sizes"]) == 90 and min(skewed["sizes"]) == 0 < min(even["sizes"])
    for point in (even, skewed):
        assert list(point["ratio"]) == ["ragged_dot", "mosaic_gpu"] and point["ratio"]["ragged_dot"] == 1
        assert 0 < point["error"]["mosaic_gpu"] < 1e-2
    assert bench_experts.to_table(record).row_count == 2


def test_a_product_of_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(bench_experts.sides()) == ["ragged_dot"], "what serves on a CPU"
    monkeypatch.setattr(bench_experts, "sides", lambda: {
        "mosaic_gpu": lambda *given: jax.tree.map(lambda x: 1.1 * jnp.nan_to_num(x),
                                                  bench_experts.with_gradients("ragged_dot")(*given))})
    with pytest.raises(ValueError, match="mosaic_gpu.error=.*computes something else"):
        bench_experts.measure(TINY)
    with pytest.raises(ValueError, match="model='tiny-mfa': must have experts"):
        BenchExpertsConfig(model="tiny-mfa")
