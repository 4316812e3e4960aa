"""The benchmark of the decode kernels: what it checks, orders, leaves out and concludes. Nothing asserts on time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_decode_kernel
from experiments.bench_decode_kernel import BenchDecodeKernelConfig, points
from experiments.decode_kernel import data
from experiments.decode_kernel.points import Point, Sizes, compile_points, measure_point
from experiments.decode_kernel.sides import Side, sides
from experiments.decode_kernel.speed import make_copy
from experiments.decode_kernel.targets import targets
from experiments.kernel_cases import PAPER, Case

SIZES = Sizes(cold_bytes=2**15, round_seconds=0.001, rounds=3)


def measured(case: Case, length: int | None, found: dict[str, Side], batch: int = 3) -> dict[str, Any]:
    point = Point("tiny", case, batch, length, (16, 64), slow_sides=True)
    programs = compile_points([point], found, SIZES)
    return measure_point(point, found, programs[point.name], make_copy(2**12), SIZES, dispatch_s=1e-5)


def changed(side: Side, change: Any, **fields: Any) -> Side:
    return dataclasses.replace(side, attend=lambda case, call, full: change(side.attend, case, call, full), **fields)


def test_what_is_wrong_fails_with_the_reason_and_is_not_timed() -> None:
    def blind(attend: Any, case: Case, call: dict[str, Any], full: bool) -> Any:
        return attend(case, call | {"lengths": jnp.full_like(call["lengths"], 64)}, full)

    def raising(*_: Any) -> Any:
        raise RuntimeError("no such shape")

    right = sides(torch=False)["xla"]
    record = measured(Case(2, 16), 64, {
        "right": right, "off": changed(right, lambda attend, *call: 1.1 * attend(*call), ours=False),
        # Right on the rows that are timed, which are full; it reads the nan of those that are not.
        "blind": changed(right, blind), "raising": changed(right, raising),
        "unfit": dataclasses.replace(right, obstacle=lambda case, S: f"not {S} tokens")})
    found = record["sides"]
    assert {name: side["status"] for name, side in found.items()} == {
        "right": "ok", "off": "failed", "blind": "failed", "raising": "failed", "unfit": "left out"}
    assert "outputs differ" in found["off"]["reason"] and "nan" in found["blind"]["reason"]
    assert found["raising"]["reason"] == "RuntimeError: no such shape" and found["unfit"]["reason"] == "not 64 tokens"
    assert [name for name, side in found.items() if "seconds" in side] == ["right"]
    assert record["valid_bytes"] == 3 * 64 * 2 * 16 * 2 and record["flops"] == 3 * 64 * 2 * 2 * (16 + 16)
    right_found = found["right"]
    assert record["caches"] == 3 and record["cold"] and len(right_found["rounds"]) == SIZES.rounds
    assert right_found["bytes_per_s"] == pytest.approx(record["valid_bytes"] / right_found["seconds"])
    assert right_found["share_of_copy"] == pytest.approx(right_found["bytes_per_s"] / record["copy_bytes_per_s"])
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("length", [64, None])
@pytest.mark.parametrize("case", [Case(4, 16), Case(4, 16, K=2), Case(4, 20, value_width=16)])
def test_peers_decode_what_we_decode(case: Case, length: int | None) -> None:
    found = measured(case, length, {name: side for name, side in sides().items() if name != "torch flex"})["sides"]
    able = {name for name, side in found.items() if side["status"] != "left out"}
    assert able >= {"xla", "jax.nn xla"}
    assert {found[name]["status"] for name in able} == {"ok"}, found


def test_what_peers_can_not_do_is_said() -> None:
    turned = measured(Case(4, 16, value_width=16, rope=True), 64, sides())["sides"]
    assert turned["xla"]["status"] == "ok"
    assert turned["jax.nn xla"]["reason"] == "can't turn keys that are stored before rope"
    int8 = measured(Case(4, 16, cache_dtype="int8"), 64, sides())["sides"]
    assert int8["jax.nn xla"]["reason"] == "reads no cache of int8 with a scale a token"


@pytest.mark.parametrize("case", [Case(2, 16), Case(4, 16, K=2, cache_dtype="int8")])
def test_garbage_lies_past_every_length(case: Case) -> None:
    lengths = data.border_lengths(32, 8, seed=0)
    assert {0, 1, 31, 32} <= set(lengths.tolist()) and lengths.max() <= 32
    call = data.random_call(case, 32, 0, jnp.asarray(lengths), float("nan"))
    stored = call["k_scale"] if case.cache_dtype == "int8" else call["k"][..., 0]
    held = np.arange(32) < lengths[:, None]
    np.testing.assert_array_equal(np.isfinite(np.asarray(stored, np.float32)),
                                  held[:, None].repeat(2, 1) if case.K == 2 else held)
    other = data.random_call(case, 32, 1, jnp.asarray(lengths), 0.0)
    assert not np.array_equal(call["q"], other["q"])


def test_a_mix_is_between_the_shortest_and_the_longest() -> None:
    rows = data.timed_lengths(None, (32768, 8192, 1024), 64, seed=0)
    assert rows.min() >= 1024 and rows.max() <= 32768 and len(set(rows.tolist())) > 60
    assert data.timed_lengths(8192, (32768,), 3, seed=0).tolist() == [8192] * 3


def test_what_matters_most_comes_first() -> None:
    config = BenchDecodeKernelConfig(output="x")
    order = points(config, config.scale)
    names = [point.name for point in order]
    assert names[:5] == ["MFA 64x256 bfloat16 64 x 32768", "MFA-KR 64x256 bfloat16 64 x 32768",
                         "MLA 128x(512+64) bfloat16 64 x 32768", "GQA 64/4x128 bfloat16 64 x 32768",
                         "MFA 64x256 int8 64 x 32768"]
    # Eight variants in two types, four lengths at batches of 64 and 8, and no mix of one row.
    assert len(set(names)) == len(names) == 8 * 2 * (4 + 4 + 3)
    assert names.index("paper-7b-mha bfloat16 64 x 32768") < names.index("MFA 64x256 bfloat16 8 x 32768")
    assert names.index("MFA 64x256 int8 1 x 1024") < names.index("paper-7b-mha bfloat16 8 x 32768")
    assert {point.batch for point in order if point.slow_sides} == {64}
    assert all(point.caches(Sizes()) * point.valid_bytes(0) >= 3 * 50 * 2**20 or point.caches(Sizes()) == 64
               for point in order)
    assert PAPER["paper-7b-mfa-kr"] == Case(26, 256, value_width=256, rope=True)


def test_a_scale_of_its_own_and_queries_of_the_type_of_a_float32_cache(tmp_path: Path) -> None:
    config = BenchDecodeKernelConfig(output=str(tmp_path / "record.json"), cases=("paper-7b-mfa",), layer=False,
                                     cache_dtypes=("float32", "int8"), torch=False, tiny=True,
                                     leave_out=("jax.nn xla",))
    scale = dataclasses.replace(config.scale, batches=(1,), lengths=(32,))
    assert [point.case.dtype for point in points(config, scale)] == ["float32", "bfloat16"]
    record = bench_decode_kernel.measure(config, scale)
    assert [p["name"] for p in record["points"]] == ["paper-7b-mfa float32 1 x 32", "paper-7b-mfa int8 1 x 32"]
    assert record["points"][0]["sides"]["xla"]["error"] < 1e-5
    assert all("jax.nn cudnn" in p["sides"] and "jax.nn xla" not in p["sides"] for p in record["points"])


def test_targets_are_ratios_of_what_was_measured() -> None:
    def point(variant: str, dtype: str, ours: float, peer: float | None = None) -> dict[str, Any]:
        return {"name": f"{variant} {dtype}", "variant": variant, "cache_dtype": dtype, "batch": 64, "length": 32768,
                "auto": "fast", "sides": {"fast": {"ours": True, "seconds": ours, "share_of_copy": 1e-3 / ours},
                                          "peer": {"ours": False} | ({} if peer is None else {"seconds": peer})}}

    found = {x["target"]: x for x in targets({"layer": [], "points": [
        point("MFA 64x256", "bfloat16", 1e-3, 2e-3), point("MFA-KR 64x256", "bfloat16", 0.5e-3),
        point("MFA 64x256", "int8", 0.8e-3, 0.4e-3)]})}
    share = found["MFA 64x256 bfloat16 64 x 32768: share of the copy's bandwidth"]
    assert share["found"] == pytest.approx(1.0) and share["met"] is True
    assert found["MFA 64x256 bfloat16 64 x 8192: share of the copy's bandwidth"]["met"] is None
    assert found["MFA-KR over MFA, bfloat16 64 x 32768: times as fast"]["found"] == pytest.approx(2.0)
    slow = found["MFA 64x256 int8 over bfloat16, 64 x 32768: times as fast"]
    assert slow["found"] == pytest.approx(1.25) and slow["met"] is False
    worst = found["best peer's time over ours, at the worst point (MFA 64x256 int8)"]
    assert worst["found"] == pytest.approx(0.5) and worst["met"] is False
    failed = point("MFA 64x256", "bfloat16", 1e-3, 2e-3)
    del failed["sides"]["fast"]["seconds"]
    worst = targets({"layer": [], "points": [failed]})[-1]
    assert worst["found"] == 0 and worst["met"] is False


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end(tmp_path: Path) -> None:
    config = BenchDecodeKernelConfig(output=str(tmp_path / "record.json"), cases=("MFA 64x256", "MFA-KR 64x256"),
                                     cache_dtypes=("bfloat16",), rounds=2, tiny=True)
    record = bench_decode_kernel.measure(config)
    assert json.loads((tmp_path / "record.json").read_text()) == json.loads(json.dumps(record))
    assert [p["name"] for p in record["points"]] == [p.name for p in points(config, config.scale)]
    assert not record["skipped"]
    assert {p["sides"]["xla"]["status"] for p in record["points"]} == {"ok"}
    assert [x["sides"]["xla"]["status"] for x in record["layer"]] == ["ok", "ok"]
    # S_q, its norm, Q, S_k, S_v and O of the tiny layer, in bfloat16; 64 tokens of two rows of two arrays.
    weights = 64 * 32 + 32 + 32 * 4 * 16 + 2 * 64 * 16 + 4 * 16 * 64
    assert record["layer"][0]["bytes"] == {"weights": 2 * weights, "states": 2 * 2 * 64 * 2,
                                           "cache": 2 * 64 * 2 * 16 * 2}
    assert bench_decode_kernel.to_table(record).row_count == 10 + 5
    bench_decode_kernel.save_plots(record, str(tmp_path / "plots"))
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"bfloat16.png", "roofline.png"}


def test_a_spent_budget_skips_and_says_so(tmp_path: Path) -> None:
    config = BenchDecodeKernelConfig(output=str(tmp_path / "record.json"), cases=("MFA 64x256",), budget_seconds=1e-6,
                                     tiny=True, layer=False)
    record = bench_decode_kernel.measure(config)
    assert record["points"] == []
    assert [x["point"] for x in record["skipped"]] == [p.name for p in points(config, config.scale)]
    assert {x["reason"] for x in record["skipped"]} == {"out of time"}
    with pytest.raises(ValueError, match="nothing was measured that could be drawn"):
        bench_decode_kernel.save_plots(record, str(tmp_path))


@pytest.mark.parametrize(("fields", "message"), [
    ({"cases": ("MFA 1x1",)}, "cases='MFA 1x1': must be of MFA 64x256, "),
    ({"cache_dtypes": ("int4",)}, "cache_dtypes='int4'"), ({"rounds": 0}, "rounds=0"),
    ({"budget_seconds": 0.0}, "budget_seconds=0.0"),
    # What `auto` takes can't be left out, nor what is not there.
    ({"leave_out": ("xla",)}, "leave_out='xla': must be of jax.nn xla, "),
    ({"torch": False, "leave_out": ("torch flex",)}, "leave_out='torch flex'")])
def test_bad_input_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchDecodeKernelConfig(output="x", **fields)
