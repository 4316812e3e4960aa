"""What a training step with experts has become for H100s: by a program written by hand, as kept, and compiled."""
# ruff: noqa: E501

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import aot_experts, aot_gpu
from mfa_jax.plan import costs, hlo
from mfa_jax.presets import model_preset

ROOT = Path(__file__).resolve().parent.parent
KEPT = json.loads((ROOT / "experiments/results/gpu/experts.json").read_text())["steps"]
PROGRAM = """HloModule jit_step, is_scheduled=true

%product_computation (rows: bf16[4,16], w: bf16[16,6]) -> bf16[4,6] {
  %rows = bf16[4,16]{1,0} parameter(0)
  %w = bf16[16,6]{1,0} parameter(1)
  ROOT %dot = bf16[4,6]{1,0} dot(%rows, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/experts/ragged_dot_general"}
}

ENTRY %main (rows: bf16[4,16], w: bf16[16,6], v: bf16[6,6]) -> bf16[4,6] {
  %rows = bf16[4,16]{1,0} parameter(0)
  %w = bf16[16,6]{1,0} parameter(1)
  %v = bf16[6,6]{1,0} parameter(2)
  %product = bf16[4,6]{1,0} fusion(%rows, %w), kind=kCustom, calls=%product_computation, metadata={op_name="jit(step)/experts/ragged_dot_general"}, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %sent = ((bf16[4,6]{1,0}, bf16[8,6]{1,0:S(7)}, s64[2]{0}, s64[2]{0}, s64[2]{0}, s64[2]{0}), bf16[8,6]{1,0:S(7)}) ragged-all-to-all-start(%product, %product), replica_groups={{0,1}}
  %n = s32[2]{0} constant({2,2})
  %weights = bf16[2,6,8]{2,1,0} broadcast(%v), dimensions={0}
  %kernel = bf16[4,8]{1,0} custom-call(%n, %product, %weights), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/experts/body"}
  %gradient = bf16[2,6,8]{2,1,0} custom-call(%n, %n, %product, %kernel), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/experts/body"}
  ROOT %other = bf16[4,6]{1,0} dot(%product, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/attention/dot_general"}
}
"""


def test_products_of_experts_are_told_from_others() -> None:
    module = hlo.parse(PROGRAM)
    counted = costs.count(module)
    masked, of_kernels = 2 * 4 * 16 * 6, 2 * (2 * 4 * 6 * 8)
    for gpus in (1, 2):
        assert aot_experts.grouped(module, counted, gpus) == {
            "kernels": {"mosaic_gpu": 2, "__triton_gemm": 1}, "flops": masked + of_kernels / gpus}
    assert aot_experts.exchanged(counted) == {"all-to-all": 4 * 6 * 2 // 2}


def test_flops_that_experts_want() -> None:
    """Three products of two widths, three times (forward, and two gradients), in all layers but the first."""
    model = model_preset("nano-mfa-moe")
    assert model.moe is not None
    each = 2 * model.model_dim * model.moe.expert_dim
    assert aot_experts.wanted_flops(model, 100) == 9 * (model.num_layers - 1) * 100 * 2 * each


def test_a_model_without_experts_is_named() -> None:
    with pytest.raises(ValueError, match="model='nano-mfa': must have experts, such as small-mfa-moe"):
        aot_experts.AotExpertsConfig(model="nano-mfa")
    with pytest.raises(ValueError, match="gpus=0: must be at least 1"):
        aot_experts.AotExpertsConfig(gpus=(1, 0))


def require_products(steps: list[dict], seq: int, rows: int) -> None:
    """By XLA each row meets every expert, whether they are on one GPU or split; by the kernels its own, of padded
    widths. What travels is what is routed."""
    assert [(step["experts"], step["gpus"] > 1) for step in steps] == [
        (name, split) for name in ("ragged_dot", "mosaic_gpu") for split in (False, True)]
    for step in steps:
        model, X = model_preset(step["model"]), step["gpus"]
        assert model.moe is not None
        D, F = model.model_dim, model.moe.expert_dim
        padding = (-(-D // 64) * 64) * (-(-F // 64) * 64) / (D * F)
        by_kernels = step["experts"] == "mosaic_gpu"
        expected = padding if by_kernels else model.moe.num_experts
        assert step["grouped_flops_over_wanted"] == pytest.approx(expected, abs=0.01)
        assert (list(step["grouped"]["kernels"]) == ["mosaic_gpu"]) == by_kernels
        sent = 4 * (model.num_layers - 1) * rows * seq * model.moe.experts_per_token * D * 2 * (X - 1) / X
        assert (step["ragged_exchanges"] > 0) == (X > 1)
        assert step["sent"].get("all-to-all", 0) == pytest.approx(sent, rel=1e-3), "there and back, twice"


def test_the_steps_that_are_kept() -> None:
    """`experiments.aot_experts --output experiments/results/gpu/experts.json` writes them anew."""
    require_products(KEPT, seq=4096, rows=8)


@pytest.mark.slow
@pytest.mark.skipif(not aot_gpu.can_compile(), reason="it takes JAX 0.11 and its CUDA plug-in: make aot-gpu")
def test_a_step_compiles_for_one_h100_and_for_two() -> None:
    done = subprocess.run([sys.executable, "-m", "experiments.aot_experts", "--model", "tiny-mfa-moe", "--gpus", "1", "2",
                           "--rows", "2", "--seq", "256"], cwd=ROOT, capture_output=True, text=True, timeout=900,
                          env={**os.environ})
    assert done.returncode == 0, done.stderr
    require_products([json.loads(line) for line in done.stdout.splitlines()], seq=256, rows=2)
