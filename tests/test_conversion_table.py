"""The table of conversions: its rows and what makes them the same, what is measured, and what the report says."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.conversion import measure, report, rows, runner
from experiments.conversion.rows import Row, Sizes, plan
from experiments.conversion.runner import Measured, RunConfig
from experiments.studies import records
from mfa_jax.config import DataConfig, DistillationConfig, TrainConfig, to_dict
from mfa_jax.convert import gqa_to_mfa, save_run
from mfa_jax.data import ByteTokenizer
from mfa_jax.train.checkpoint import Checkpoints
from mfa_jax.train.run import CHECKPOINTS
from tests.contract import compiled, model_config

KINDS = tuple(rows.KINDS)
SIZES = Sizes(calibration_rows=8, calibration_tokens=128, text_rows=3, text_tokens=64, tasks=())


def line(row: str, nats: list[float], right: str = "0110", **more: Any) -> Measured:
    """As the runner would have made it; the numbers are invented."""
    kind, _, ratio = row.removesuffix("-healed").rpartition("-") if "-" in row else ("original", "", "1")
    texts = {name: {"nats": nats, "bytes": [40, 50, 60], "tokens": 10} for name in measure.TEXTS}
    settings: dict[str, Any] = {"measure": {"rows": 3, "tokens": 10, "items": 4, "texts": ["a", "b"]}}
    if row.endswith("-healed"):
        settings["healing"] = {"step": 100, "config": {"data": {"batch_size": 10, "sequence_length": 1000}}}
    elif kind != "original":
        settings["convert"] = {"rows": 16, "context": 512, "calibration": ["valid 0123"]}
    cost = {"seconds": 60.0, "peak_bytes": 2.0**30} if "convert" in settings else None
    machine = {"device": "a device", "host": "x", "jax": "1", "commit": "abc", "date": "2026-01-01", "seconds": 9.0}
    return dataclasses.replace(
        Measured("model", row, kind, float(ratio), settings, [384, round(384 / float(ratio))],
                 [134_000_000, 151_000_000], cost, texts,
                 {"local_piqa": {"metric": "acc_norm", "right": right}}, machine), **more)


def test_every_kind_stands_where_it_can_have_the_ratio() -> None:
    found = [row.name for row in plan((1.5, 3.0, 1.0), KINDS, 3, ("mfa_kr-1.5=runs/healed",))]
    assert found == ["original", "mfa_kr-1.5", "mfa-1.5", "key_pca-1.5", "mfa_kr-3", "mfa-3", "key_pca-3",
                     "mean_pool-3", "mfa_kr-1", "mfa-1", "mfa_kr-1.5-healed"]
    assert [row.name for row in plan((2.0, 4.0, 8.0), ("mean_pool",), 4, ())] == ["original", "mean_pool-2",
                                                                                  "mean_pool-4"]


@pytest.mark.parametrize(("call", "message"), [
    ({"kinds": ("mla",)}, "kinds='mla': must be among mfa_kr, mfa, key_pca, mean_pool"),
    ({"ratios": (0.5,)}, "ratios=0.5: must be at least 1"),
    ({"healed": ("mfa_kr-1.5",)}, "healed='mfa_kr-1.5': must be KIND-RATIO=FOLDER"),
    ({"healed": ("mfa_kr-x=runs",)}, "must be KIND-RATIO=FOLDER"),
    ({"healed": ("mfa_kr-0.5=runs",)}, "healed='mfa_kr-0.5=runs': must have a ratio of at least 1"),
])
def test_a_plan_refuses_by_name(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**{"ratios": (2.0,), "kinds": KINDS, "num_kv_heads": 3, "healed": (), **call})


def test_a_run_refuses_test_texts_and_rows_without_a_spread() -> None:
    with pytest.raises(ValueError, match="calibration=.*must not have the test texts books-test, wikitext2-test"):
        RunConfig(source="x", calibration=("books-test",))
    with pytest.raises(ValueError, match="from='': must name a checkpoint, or be left out with --tiny"):
        RunConfig()
    for name in ("text_rows", "items"):
        with pytest.raises(ValueError, match=f"{name}=1: must be at least 2"):
            Sizes(**{name: 1})


def test_what_makes_a_conversion_another_one(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"weights")
    (tmp_path / "text.txt").write_text("some text")

    def settings(row: Row, sizes: Sizes = SIZES) -> dict[str, Any]:
        return rows.conversion_settings(rows.conversion(row, sizes, str(tmp_path / "model.gguf"), None,
                                                        (str(tmp_path / "text.txt"),), "anywhere"))

    row = Row("mfa-2", "mfa", 2.0)
    found = settings(row)
    assert found["source"] == rows.model_digest(str(tmp_path / "model.gguf")) and "out" not in found
    assert found["calibration"][0].startswith("text.txt ") and found["rows"] == 8
    assert settings(Row("mean_pool-2", "mean_pool", 2.0))["calibration"] == []
    assert settings(dataclasses.replace(row, ratio=1.5)) != found
    assert settings(row, dataclasses.replace(SIZES, calibration_rows=9)) != found
    assert rows.same_conversion({name: value for name, value in found.items() if name != "ridge"}, found)
    for other in ({**found, "ridge": 0.5}, {**found, "gone": 1}, {}):
        assert not rows.same_conversion(other, found)
    plain = settings(Row("key_pca-2", "key_pca", 2.0))
    assert rows.same_conversion({**plain, "ridge": 0.5}, plain)
    assert not rows.same_conversion({**plain, "rows": 9}, plain)
    exact = settings(Row("mfa-1", "mfa", 1.0))
    assert rows.same_conversion({**exact, "rows": 9, "context": 7}, exact)  # which it does not read
    assert not rows.same_conversion({**exact, "to": "mfa_kr"}, exact)
    with pytest.raises(ValueError, match="must be a .gguf file or a folder with safetensors"):
        rows.model_digest(str(tmp_path))


def test_a_healed_run_is_what_its_row_says(tmp_path: Path) -> None:
    gqa = compiled(model_config("gqa", vocab_size=264))
    save_run(tmp_path / "run", *gqa_to_mfa(gqa.config, gqa.params), ByteTokenizer())
    runner._require_form(Row("mfa-1-healed", "mfa", 1.0), str(tmp_path / "run"), gqa.config)
    for kind, ratio, wanted in (("mfa_kr", 1.0, "mfa_kr of 32"), ("mfa", 2.0, "mfa of 16"),
                                ("mean_pool", 2.0, "gqa of 16")):
        with pytest.raises(ValueError, match=f"is mfa of 32 cached elements, {kind}-healed must be {wanted}"):
            runner._require_form(Row(f"{kind}-healed", kind, ratio), str(tmp_path / "run"), gqa.config)


def test_a_healed_row_has_no_places(tmp_path: Path) -> None:
    config = TrainConfig(workdir=str(tmp_path / "run"), model=model_config("mfa_kr", vocab_size=264),
                         data=DataConfig(tokenizer=str(tmp_path / "tokens.json"), source=str(tmp_path)),
                         initial=str(tmp_path / "student"), distillation=DistillationConfig(str(tmp_path / "teacher")))
    with Checkpoints(tmp_path / "run" / CHECKPOINTS) as checkpoints:
        checkpoints.save(3, {"params": {"x": jnp.zeros(1)}}, {"config": to_dict(config)}, wait=True)
    found = runner._healing(str(tmp_path / "run"))
    assert found["step"] == 3 and str(tmp_path) not in json.dumps(found)
    assert found["config"]["distillation"]["temperature"] == 1.0


def test_a_healed_row_is_of_what_the_run_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs with the same settings on other text are two rows, though no setting tells them apart."""
    config = TrainConfig(model=model_config("mfa_kr", vocab_size=264), distillation=DistillationConfig("teacher"))
    for name, value in (("one", 1.0), ("other", 2.0)):
        with Checkpoints(tmp_path / name / CHECKPOINTS) as checkpoints:
            checkpoints.save(3, {"params": {"x": jnp.full(2, value)}}, {"config": to_dict(config)}, wait=True)
    one, other = ({"measure": {}, "healing": runner._healing(str(tmp_path / name))} for name in ("one", "other"))
    assert one["healing"]["config"] == other["healing"]["config"] and one != other
    row, plan_ = Row("mfa_kr-2-healed", "mfa_kr", 2.0, "folder"), RunConfig("x.gguf", "model", results=str(tmp_path))
    records.append(tmp_path, line("mfa_kr-2-healed", [1.0], settings=one))
    assert runner._is_done(plan_, row, one) and not runner._is_done(plan_, row, other)
    unnoted = {**one, "healing": {k: v for k, v in one["healing"].items() if k != "parameters"}}
    records.append(tmp_path, line("mfa_kr-2-healed", [1.0], settings=unnoted))  # as earlier ones were written
    assert runner._is_done(plan_, row, one) and not runner._is_done(plan_, row, {**one, "measure": {"rows": 3}})


def test_a_row_stays_taken_while_its_conversion_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.convert import ConvertConfig

    def start(command: list[str], **options: Any) -> Any:
        return subprocess.Popen(["sleep", "100"], pass_fds=options["pass_fds"])

    started: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", lambda *given, **options: started.append(start(*given, **options)))
        with records.lock(tmp_path / "lock", wait=False) as ours, pytest.raises(AttributeError):
            assert ours is not None
            runner._converted(ConvertConfig("x", str(tmp_path / "out")), ours)  # its stdout is not there yet
    with started[0] as child:
        with records.lock(tmp_path / "lock", wait=False) as ours:
            assert ours is None
        child.kill()
        child.wait()
    with records.lock(tmp_path / "lock", wait=False) as ours:
        assert ours is not None


def test_a_command_line_gives_the_same_conversion() -> None:
    from experiments import cli
    from experiments.convert import ConvertConfig

    config = ConvertConfig("a b", "out", to="mfa", method="key_pca", cache_ratio=1.5, calibration=("x", "y"), rows=7)
    assert cli.parse(ConvertConfig, runner._flags(config)) == config


@pytest.mark.parametrize(("source", "name"), [
    ("m/Llama-3.1-8B", "Llama-3.1-8B"), ("m/SmolLM2.Q8_0.gguf", "SmolLM2.Q8_0")])
def test_versions_are_part_of_a_models_name(source: str, name: str) -> None:
    assert runner._name(RunConfig(source=source)) == name


def test_rows_are_spread_over_the_whole_text() -> None:
    text = "".join(chr(ord("a") + i // 100 % 26) for i in range(2600))
    found = measure.spread_rows(ByteTokenizer(), text, 4, 10, "some")
    assert ["".join(map(chr, row)) for row in found] == [
        text[start:start + 10] for start in (310, 930, 1550, 2170)]
    with pytest.raises(ValueError, match="text_tokens=9: some has 100 characters, a row is cut out of 120"):
        measure.spread_rows(ByteTokenizer(), text[:100], 4, 10, "some")


def test_the_reports_statistics_by_hand() -> None:
    original, worse = line("original", [30.0, 20.0, 25.0]), line("mfa-2", [32.0, 23.0, 26.0], "0010")
    text, other = worse.texts["books-test"], original.texts["books-test"]
    ratio, error = report.perplexity_ratio(text, other)
    assert ratio == pytest.approx(math.exp((0.2 + 0.3 + 0.1) / 3))
    assert error == pytest.approx(ratio * np.std([0.2, 0.3, 0.1], ddof=1) / math.sqrt(3))
    bits, error = report.bits_per_byte(other)
    assert bits == pytest.approx(75 / math.log(2) / 150)
    left = np.array([30, 20, 25]) / math.log(2) - bits * np.array([40, 50, 60])
    assert error == pytest.approx(np.std(left, ddof=1) / math.sqrt(3) / 50)
    apart, error = report.accuracy_difference(worse, original)
    assert apart == -0.25 and error == pytest.approx(np.std([0, -1, 0, 0], ddof=1) / 2)


def test_a_report_is_made_of_the_lines_alone(tmp_path: Path) -> None:
    old = line("mfa_kr-2", [99.0, 99.0, 99.0])
    elsewhere = line("mfa-3", [1.0, 1.0, 1.0], settings={"measure": {"rows": 9}})
    for each in (old, line("original", [30.0, 20.0, 25.0]), line("mfa_kr-2", [33.0, 23.0, 28.0]), elsewhere,
                 line("mfa_kr-2-healed", [31.0, 21.0, 26.0])):
        records.append(tmp_path, each)
    page = report.write(str(tmp_path)).read_text()
    assert "| MFA-KR | 2 | 192 | 151 M | 0.8079 ± " in page and "| 16.44 | 1.350 ± 0.000 |" in page
    assert "MFA-KR, healed on 1 M tokens | 2 | 192 |" in page and "| 1.105 ± 0.000 |" in page
    assert "1 rows of another checkpoint than the original, or measured on other text" in page and "99" not in page
    assert "| MFA-KR | 2 | 192 | 60 | 1.00 | abc |" in page and "has not been measured yet" not in page
    assert {path.name for path in tmp_path.glob("*.png")} == {f"model-{n}.png" for n in ("quality", "accuracy", "cost")}
    again = report.write(str(tmp_path)).read_text()
    assert again == page


def test_a_report_tells_checkpoints_and_calibrations_apart(tmp_path: Path) -> None:
    def of(row: str, cost: Any = None, **convert: Any) -> Measured:
        given = line(row, [33.0, 23.0, 28.0])
        convert = {**given.settings["convert"], "source": "0123", **convert}
        return dataclasses.replace(given, settings={**given.settings, "convert": convert}, cost=cost)

    original = line("original", [30.0, 20.0, 25.0])
    original = dataclasses.replace(original, settings={**original.settings, "source": "0123"})
    paid = {"seconds": 60.0, "peak_bytes": 2.0**30}
    page = report._section("model", [original, of("mfa-2"), of("mfa-3", paid, source="4567")], tmp_path)
    assert "Left out: 1 rows of another checkpoint" in page and "| MFA | 3 |" not in page
    assert "Calibration: 16 rows of 512 tokens of valid 0123." in page and "| calibration |" not in page
    assert "Interrupted, so that their cost is not known: mfa-2." in page
    page = report._section("model", [original, of("mfa-2"), of("mfa-3", paid, rows=9)], tmp_path)
    assert "| calibration |" in page and "| 9 rows of 512 tokens of valid 0123 |" in page and "Left out" not in page


def test_a_report_without_rows_or_without_the_original_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no row"):
        report.write(str(tmp_path))
    records.append(tmp_path, line("mfa-2", [1.0, 2.0, 3.0]))
    assert "The original has not been measured yet" in report.write(str(tmp_path)).read_text()


@pytest.mark.slow
def test_rows_are_made_once(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                            caplog: pytest.LogCaptureFixture) -> None:
    """From the checkpoint to the page: an exact conversion loses nothing, a row that was cut off is made again."""
    monkeypatch.setenv("MFA_JAX_DATA", str(data_dir))
    monkeypatch.setattr(runner, "TINY", SIZES)
    config = RunConfig(tiny=True, ratios=(1.0, 2.0), kinds=("mfa_kr", "mean_pool"), results=str(tmp_path / "results"),
                       workdir=str(tmp_path / "work"), keep=True)
    runner.run(config)
    path = tmp_path / "results" / records.METRICS
    lines = path.read_text().splitlines(keepends=True)
    found = [json.loads(each) for each in lines]
    assert [each["row"] for each in found] == ["original", "mfa_kr-1", "mfa_kr-2", "mean_pool-2"]
    assert [each["cached_elements"][1] for each in found] == [64, 64, 32, 32]
    original, exact, reduced, pooled = (sum(each["texts"]["books-test"]["nats"]) for each in found)
    assert exact == pytest.approx(original, rel=1e-4) and original < reduced < pooled
    assert all(each["cost"]["seconds"] > 0 and each["cost"]["peak_bytes"] > 2**26 for each in found[1:])
    # What a training run would leave: the folder of a run.
    shutil.copytree(next((tmp_path / "work").glob("mfa_kr-2-*/config.json")).parent, tmp_path / "run")
    path.write_text("".join(lines[:3]) + lines[3][:50])
    with caplog.at_level(logging.WARNING):
        runner.run(dataclasses.replace(config, keep=False))
    assert not list((tmp_path / "work").glob("mean_pool-2*/config.json"))
    assert "1 half-written or damaged lines are skipped" in caplog.text
    again = [each.row for each in records.read_as(Measured, tmp_path / "results")]
    assert again == ["original", "mfa_kr-1", "mfa_kr-2", "mean_pool-2"]
    runner.run(dataclasses.replace(config, only=("mfa_kr-2-healed",), healed=(f"mfa_kr-2={tmp_path / 'run'}",)))
    healed = records.read_as(Measured, tmp_path / "results")[-1]
    assert healed.texts["books-test"]["nats"] == found[2]["texts"]["books-test"]["nats"] and healed.cost is None
    assert healed.settings["healing"]["step"] == 0 and healed.cached_elements == [64, 32]
    page = report.write(str(tmp_path / "results")).read_text()
    assert "| mean-pooled heads (GQA) | 2 | 32 |" in page and "| MFA-KR, healed on 0 M tokens | 2 | 32 |" in page
    with pytest.raises(ValueError, match="healed=.*: holds no run"):
        runner.run(dataclasses.replace(config, healed=(f"mfa_kr-2={tmp_path}",)))


def test_an_unknown_row_is_refused(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFA_JAX_DATA", str(data_dir))
    with pytest.raises(ValueError, match="only='mfa-9': must be among original, "):
        runner.run(RunConfig(tiny=True, only=("mfa-9",), results=str(tmp_path), workdir=str(tmp_path)))
