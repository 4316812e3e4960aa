"""The benchmark of training on one accelerator, at a size that any machine can do."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import jax
import pytest

from experiments import bench_mfu
from experiments.bench_mfu import BenchMfuConfig, measure, measure_pair, pairs, to_table
from mfa_jax.capacity import model_parameters
from mfa_jax.config import MFAConfig, ModelConfig


@pytest.mark.slow
def test_a_tiny_run_measures_both_models_and_records_what_failed(tmp_path: Path) -> None:
    config = BenchMfuConfig(str(tmp_path / "mfu.json"), ("dense", "cudnn"), rounds=2, steps=1, tiny=True)
    record = measure(config)
    assert json.loads(Path(config.output).read_text()) == json.loads(json.dumps(record))
    dense, cudnn = record["pairs"]["tiny, dense"], record["pairs"]["tiny, cudnn"]
    for name, side in dense["sides"].items():
        assert side["status"] == "ok" and side["losses"][0] > side["losses"][2], name
        assert side["tokens_per_s"] == pytest.approx(2 * 64 / side["seconds"])
        flops = dense["models"][name]["flops_per_token"]
        assert side["flops_per_s"] == pytest.approx(flops * side["tokens_per_s"])
        # No peak is known of a CPU.
        assert side["mfu"] is None and side["predicted_bytes"] > 0
    assert all("runs on gpu, not on cpu" in side["reason"] for side in cudnn["sides"].values())
    assert to_table(record).row_count == 4
    again = measure_pair(pairs(tiny=True)["tiny"], "dense", config, peak=1e12, first=False)["sides"]["mfa"]
    assert again["mfu"] == pytest.approx(again["flops_per_s"] / 1e12)


@pytest.mark.parametrize("failing", ["", "mfa"])
def test_only_the_first_side_was_alone(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it failed at its first step: the peak that it left is not that of the second."""
    pair = pairs(tiny=True)["tiny"]

    class Side:
        def __init__(self, model: ModelConfig, *_: object) -> None:
            self.name = "mfa" if isinstance(model.attention, MFAConfig) else "mha"
            self.loss = 9.0

        def run(self, steps: int) -> float:
            if self.name == failing:
                raise RuntimeError("out of memory")
            self.loss -= steps
            return self.loss

        def predicted_bytes(self) -> int:
            return 1

    monkeypatch.setattr(bench_mfu, "_Side", Side)
    monkeypatch.setattr(jax, "devices", lambda: [mock.Mock(memory_stats=lambda: {"peak_bytes_in_use": 7})])
    sides = measure_pair(pair, "dense", BenchMfuConfig("unused", rounds=1, steps=1), None, first=True)["sides"]
    assert sides["mha"]["peak_bytes"] is None
    assert sides["mfa"]["status"] == "failed" if failing else sides["mfa"]["peak_bytes"] == 7


def test_both_models_of_a_pair_have_as_many_parameters() -> None:
    """To within what a feed-forward width of another multiple of 8 would change."""
    for name, pair in pairs(tiny=False).items():
        mha, mfa = (model_parameters(model).total for model in (pair.mha, pair.mfa))
        assert abs(mfa - mha) <= 12 * pair.mha.model_dim * pair.mha.num_layers + 3 * pair.mha.model_dim, name


def test_an_unknown_kind_of_attention_is_named() -> None:
    with pytest.raises(ValueError, match="implementations='flash'"):
        BenchMfuConfig("out.json", implementations=("flash",))  # type: ignore[arg-type]
