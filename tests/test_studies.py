"""Studies: what is planned and when it is done, metrics that survive a crash, reports, and what is refused."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import stats

from experiments import cli
from experiments.studies import __main__ as script
from experiments.studies import (
    corpus,
    factorization,
    key_reuse_start,
    long_context,
    positions,
    records,
    report,
    runner,
    scaling,
)
from experiments.studies.catalog import STUDIES
from experiments.studies.factorization import start
from experiments.studies.long_context import measurements, tasks
from experiments.studies.records import Record
from experiments.studies.study import SCALES, Run, Scale, identity, make_run, results_of, tuned
from mfa_jax import capacity
from mfa_jax.attention.mfa_kr import MFAKR
from mfa_jax.config import PositionConfig
from mfa_jax.presets import model_preset

ROOT = Path(__file__).resolve().parent.parent
TINY = SCALES["tiny"]
# The first study stands for all in the inner loop.
each_study = pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name == "cache_quality" else pytest.mark.slow) for name in STUDIES])


def record_of(run: Run, loss: float, scale: Scale = TINY, **more) -> Record:
    """As the runner would have made it; the losses are invented."""
    metrics = {"valid_bits_per_byte": loss, "test_bits_per_byte": loss + 0.01, "parameters": 1000,
               "cache_bytes_per_token": capacity.analyse_model(run.config.model, context=1).cache_bytes_per_token,
               "W_effective_rank": 3.0, "U_effective_rank": 4.0,
               "position_edges": [0, 16, 32], "position_bits": [3.0, 2.0], "needle_bits": np.ones((3, 5)).tolist(),
               "told_bits": [5.0, 5.0], "fresh_bits": [4.5, 4.5], "again_bits": [4.0, 4.5], "held_bits": [loss, loss],
               "held_bits_per_cached_byte": [loss, loss],
               **{positions.name_of(factor): loss + factor / 10 for factor in positions.LENGTHS}}
    return Record(**{"scale": scale.name, "run": run.name, "labels": run.labels, "config": identity(run.config),
                     "outcome": "finished", "note": "", "metrics": metrics,
                     "curve": {"step": [1, 2], "loss": [3.0, loss], "grad_norm": [1.0, 2.0]},
                     "machine": {"device": "a device", "host": "x", "jax": "1", "commit": "abc", "date": "2026-01-01",
                                 "seconds": 36.0}} | more)


def invented_loss(run: Run) -> float:
    """A loss that differs between runs and falls towards the middle of the grid."""
    rate, seed = run.labels["learning_rate"], run.labels["seed"]
    return 3 + abs(math.log2(rate / 8e-3)) / 10 + seed / 1000 + len(run.labels["name"]) / 100


def all_done(name: str, scale: Scale = TINY) -> list[Record]:
    """Records of a whole study; a new list of the same ones at every call."""
    return list(_all_done(name, scale))


@functools.cache
def _all_done(name: str, scale: Scale) -> tuple[Record, ...]:
    """Planned anew until nothing is missing."""
    found: list[Record] = []
    while True:
        results = results_of(found)
        missing = [run for run in STUDIES[name].plan(scale, results) if results(run) is None]
        if not missing:
            return tuple(found)
        found += [record_of(run, invented_loss(run), scale) for run in missing]


# ---- plans -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_plan_compares_equals(name, scale):
    runs = STUDIES[name].plan(scale, lambda run: None)
    assert len({run.name for run in runs}) == len(runs)
    by_size: dict[object, list[int]] = {}
    for run in runs:
        by_size.setdefault(run.labels.get("size"), []).append(
            capacity.model_parameters(run.config.model).total)
        assert run.config.optimizer.learning_rate == run.labels["learning_rate"]
        assert run.config.seed == run.config.data.seed == run.labels["seed"]
    for sizes in by_size.values():
        assert max(sizes) / min(sizes) < 1.03
    assert len({(run.config.steps, run.config.data.batch_size, run.labels.get("size")) for run in runs}) == len(by_size)


@pytest.mark.slow
def test_the_starts_of_key_reuse_are_what_their_names_say():
    def start(name: str) -> tuple[np.ndarray, float]:
        """The map from key to value, and the size of the gradients that alpha and N_kr get."""
        module = MFAKR(key_reuse_start.models(TINY)[name].attention, PositionConfig(kind="none"))
        x = jax.random.normal(jax.random.key(1), (1, 4, 16))
        params = nn.unbox(module.init(jax.random.key(0), x, jnp.arange(4)[None]))["params"]
        grads = jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x, jnp.arange(4)[None])[0] ** 2))(params)
        size = sum(float(jnp.sum(jnp.abs(grads[leaf]))) for leaf in ("alpha", "N_kr"))
        return np.asarray(jnp.eye(len(params["alpha"])) + params["alpha"][:, None] * params["N_kr"]), size

    for name in ("zero", "V = K", "zero, N_kr x 3"):
        np.testing.assert_array_equal(start(name)[0], np.eye(16))
    assert start("V = K")[1] == 0 < start("zero")[1]
    assert abs(np.trace(start("free")[0])) < 4 and np.trace(start("one")[0]) > 8


def test_seeds_follow_at_the_best_rate_when_the_whole_grid_is_done():
    models = {"a": model_preset("tiny-mfa"), "b": model_preset("tiny-mha")}
    scale = dataclasses.replace(TINY, learning_rates=(4e-3, 8e-3, 1.6e-2), seeds=(0, 1, 2))
    grid = tuned(scale, models, lambda run: None)
    assert len(grid) == 6 and {run.labels["seed"] for run in grid} == {0}
    done = [record_of(run, loss) for run, loss in zip(grid[:3], (2.0, 1.0, 3.0), strict=True)]
    assert len(tuned(scale, models, results_of(done[:2]))) == 6
    more = tuned(scale, models, results_of(done))[6:]
    assert [(r.labels["name"], r.labels["learning_rate"], r.labels["seed"]) for r in more] == [
        ("a", 8e-3, 1), ("a", 8e-3, 2)]
    worst = dataclasses.replace(done[1], outcome="diverged", metrics={})
    more = tuned(scale, models, results_of([done[0], worst, done[2]]))[6:]
    assert {run.labels["learning_rate"] for run in more} == {4e-3}


def test_a_run_is_done_only_with_the_same_config():
    run = make_run(TINY, "a", model_preset("tiny-mfa"), 1e-3, 0)
    record = record_of(run, 1.0)
    assert results_of([record])(run) is record
    longer = dataclasses.replace(run, config=dataclasses.replace(run.config, steps=run.config.steps + 1))
    assert results_of([record])(longer) is None
    elsewhere = dataclasses.replace(run.config.data, source="x", prepared="y", held_out_source="z")
    moved = dataclasses.replace(run, config=dataclasses.replace(run.config, workdir="w", data=elsewhere))
    assert results_of([record])(moved) is record
    watched = dataclasses.replace(run.config, profile=(1, 1), compilation_cache="c", on_save_failure="continue")
    assert results_of([record])(dataclasses.replace(run, config=watched)) is record


def test_a_record_without_a_field_that_came_later_has_its_default():
    run = make_run(TINY, "a", model_preset("tiny-mfa"), 1e-3, 0)
    record = record_of(run, 1.0)
    older = {name: value for name, value in record.config.items() if name != "z_loss"}
    record = dataclasses.replace(record, config=older)
    assert results_of([record])(run) is record
    changed = dataclasses.replace(run, config=dataclasses.replace(run.config, z_loss=1e-4))
    assert results_of([record])(changed) is None
    strange = dataclasses.replace(record, config={**older, "dropped_field": 1})
    assert results_of([strange])(run) is None


def test_a_run_of_another_text_is_not_done():
    run = make_run(TINY, "a", model_preset("tiny-mfa"), 1e-3, 0)
    one, other = {"digest": "1"}, {"digest": "2"}
    record = record_of(run, 1.0, text=one)
    assert results_of([record], one)(run) is results_of([record])(run) is record
    assert results_of([record], other)(run) is None
    older = record_of(run, 1.0)  # does not say of which text it is
    assert results_of([older], other)(run) is older


def test_tasks_of_long_windows_ask_what_they_say(tmp_path):
    books = [np.frombuffer((f"book {i} " * 40_000).encode(), np.uint8).astype(np.uint16) for i in range(2)]
    task = tasks.needle(books, rows=4, length=200, depth=0.5, seed=1)
    assert task.tokens.shape == (4, 201) and task.asked.sum(axis=1).tolist() == [5] * 4
    for tokens, asked in zip(task.tokens, task.asked, strict=True):
        text = bytes(tokens.tolist()).decode()
        (name, number), (again, answer) = re.findall(r"The secret number of (\w+) is (\d{5})", text)
        assert (name, number) == (again, answer) and text.endswith(answer) and "book" in text
        assert bytes(tokens[1:][asked].tolist()).decode() == answer
        assert 40 < text.index("The secret") < 100
    with pytest.raises(ValueError, match="length=50"):
        tasks.needle(books, 1, 50, 0.5, 1)
    first, fresh, again = tasks.pairs(rows=3, count=4, seed=1)
    for row in range(3):
        told, others = (re.findall(r"(\w\w)=(\w\w);", bytes(task.tokens[row].tolist()).decode())
                        for task in (again, fresh))
        assert len(dict(told)) == 4 and sorted(told[:4]) == sorted(told[4:])
        assert others[:4] == told[:4] and len(dict(others)) == 8
        keys, other_keys = ["".join(key for key, _ in pairs) for pairs in (told[:4], others[4:])]
        assert sorted(keys) == sorted(other_keys)
        assert sorted(value for _, value in told[:4]) == sorted(value for _, value in others[4:])
        for task, part in ((first, told[:4]), (fresh, others[4:]), (again, told[4:])):
            assert bytes(task.tokens[row, 1:][task.asked[row]].tolist()).decode() == "".join(v for _, v in part)


@pytest.mark.parametrize("count", long_context.PAIRS)
@pytest.mark.parametrize(("order", "sees_keys"), [(0, False), (1, False), (3, True)])
def test_only_who_sees_keys_holds_anything_of_the_pairs(order, sees_keys, count):
    def bits(task: tasks.Task) -> float:
        """Of a model that predicts each byte by how often it came before in its row, after as many bytes as these."""
        found = []
        for tokens, asked in zip(task.tokens, task.asked, strict=True):
            seen = [collections.defaultdict(lambda: np.zeros(256)) for _ in range(order + 1)]
            for i, token in enumerate(tokens[1:], 1):
                contexts = [tuple(tokens[max(i - k, 0):i]) for k in range(order + 1)]
                if asked[i - 1]:
                    p = np.full(256, 1 / 256)
                    for counts, context in zip(seen, contexts, strict=True):  # the longer one backs off to the shorter
                        p = (counts[context] + p) / (counts[context].sum() + 1)
                    found.append(-np.log2(p[token]))
                for counts, context in zip(seen, contexts, strict=True):
                    counts[context][token] += 1
        return float(np.mean(found))

    told, fresh, again = map(bits, tasks.pairs(64, count, long_context.SEED))
    assert measurements.held_bits(count, told, again) > 5  # what adapts to the format gains much
    held = measurements.held_bits(count, fresh, again)
    assert held > count if sees_keys else abs(held) < 0.5


# ---- metrics ---------------------------------------------------------------------------------------------------


def test_half_written_lines_are_skipped_and_counted(tmp_path, caplog):
    run = make_run(TINY, "a", model_preset("tiny-mfa"), 1e-3, 0)
    first, second = record_of(run, 1.0), record_of(run, 2.0)
    records.append(tmp_path, first)
    path = tmp_path / records.METRICS
    whole = path.read_text()
    path.write_text(whole + whole[:100])  # killed while it wrote
    with caplog.at_level(logging.WARNING):
        assert records.read(tmp_path) == [first]
    assert "1 half-written or damaged lines are skipped" in caplog.text
    records.append(tmp_path, second)
    assert records.read(tmp_path) == [first, second]
    assert path.read_text().startswith(whole + whole[:100] + "\n")


def test_two_cannot_hold_a_lock_and_it_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", f"""
import fcntl, sys, time
file = open({str(path)!r}, "ab"); fcntl.flock(file, fcntl.LOCK_EX); print("held", flush=True); time.sleep(100)
"""], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "held\n"
        with records.lock(path, wait=False) as ours:
            assert not ours
        holder.kill()
        holder.wait()
    with records.lock(path, wait=False) as ours:
        assert ours


# ---- reports ---------------------------------------------------------------------------------------------------


def test_difference_is_welchs():
    left, right = [1.0, 1.2, 1.1], [1.5, 1.4, 1.9, 1.6]
    mean, half = report.difference(left, right)
    interval = stats.ttest_ind(left, right, equal_var=False).confidence_interval(0.95)
    assert mean - half == pytest.approx(interval.low) and mean + half == pytest.approx(interval.high)


def seeds_of(*losses: float, first: int = 0) -> list[Record]:
    """One model's records of consecutive seeds with these losses on the test books."""
    return [record_of(make_run(TINY, "a", model_preset("tiny-mfa"), 4e-3, first + i), loss - 0.01)
            for i, loss in enumerate(losses)]


def test_a_comparison_is_of_the_seeds_that_both_have():
    left, right = [1.0, 1.2, 1.1], [1.5, 1.4, 1.6]
    mean, half = report.difference(left, right)
    both = stats.ttest_rel(left, right).confidence_interval(0.95)
    cells = report.compared(seeds_of(*left), seeds_of(*right), 3)
    assert cells == [f"{mean:+.4f} ± {half:.4f}", f"± {(both.high - both.low) / 2:.4f}", "lower"]
    assert report.compared(seeds_of(*right), seeds_of(*left), 3)[2] == "higher"
    assert report.compared(seeds_of(*left), seeds_of(*right, 7.0), 3) == cells
    assert report.compared(seeds_of(*left), seeds_of(*right), 4) == [*cells[:2], "too few seeds"]
    assert report.compared(seeds_of(1.0), seeds_of(1.1, 1.4), 2) == ["-0.1000", "", "too few seeds"]
    assert report.compared(seeds_of(1.0, 1.2), seeds_of(1.1, 1.3), 2)[2] == "not told apart"  # pairs: always 0.1 apart
    for others in ([], seeds_of(1.1, first=3)):
        assert report.compared(others, seeds_of(1.0), 2) == ["", "", "none"]
    diverged = [dataclasses.replace(record, outcome="diverged") for record in seeds_of(1.0)]
    assert report.compared(diverged + seeds_of(1.2, first=1), seeds_of(1.1, 1.3), 2)[2] == "too few seeds"


def test_starts_are_compared_with_the_default_alone(tmp_path):
    found = [record for record in all_done("key_reuse_start") if record.labels["name"] in ("small", "MFA")]
    text = key_reuse_start.section(found, tmp_path)
    assert re.search(r"^\| small \|[^|]*\|[^|]*\|  \|  \| none \|", text, re.M)


def test_variants_are_compared_under_each_encoding_that_both_have(tmp_path):
    found = [record for record in all_done("positions") if record.labels["name"] != "mla none"]
    chosen = {name: report.at_best_rate(runs) for name, runs in report.groups(found).items()}
    text = positions.section(found, tmp_path)
    for encoding in positions.ENCODINGS:
        cells = " | ".join(report.compared(chosen[f"mfa-kr {encoding}"], chosen[f"mfa {encoding}"], 2))
        assert f"| mfa-kr - mfa, {encoding} | {cells} |" in text
    assert "| mfa - mla, alibi |" in text and "| mfa - mla, none |" not in text
    assert positions.models(TINY)["mla rope-10000"].position == PositionConfig("rope", base=10000.0)


def test_shapes_are_compared_with_the_papers(tmp_path):
    found = all_done("factorization")
    shapes = {name: report.at_best_rate(runs) for name, runs in report.groups(found).items()}
    first, *others = shapes
    text = factorization.section(found, tmp_path)
    for name in others:
        cells = " | ".join(report.compared(shapes[name], shapes[first], 2))
        assert re.search(rf"^\| {name} \|.*\| {re.escape(cells)} \|$", text, re.M)
    assert re.search(rf"^\| {first} \|.*\|  \|  \|  \|$", text, re.M) and f"against {first}" in text


def shape_of(name: str, TER: int, SLSD: int, FRH: int, cache: int, *losses: float) -> factorization.Shape:
    return factorization.Shape(name, dict(zip(factorization.MEASURES, (TER, SLSD, FRH, cache), strict=True)),
                               seeds_of(*losses))


def test_shapes_are_compared_where_other_measures_are_equal():
    wide, few, many = (shape_of("wide", 128, 64, 32, 256, 2.0, 2.1), shape_of("few", 128, 32, 32, 128, 2.2, 2.3),
                       shape_of("many", 256, 32, 32, 128, 2.4, 2.41))
    narrow = shape_of("narrow", 192, 32, 16, 128, 3.0, 3.1)  # of the same SLSD, but of another FRH
    rows = factorization.at_equal([many, wide, few, narrow], 2).splitlines()[2:]
    wanted = [("SLSD = 32, FRH = 32: many - few", "TER 256, 128", many, few),
              ("TER = 128: wide - few", "SLSD 64, 32; cached bytes a token 256, 128", wide, few)]
    assert rows == [f"| {' | '.join([name, differ, *report.compared(one.runs, other.runs, 2)])} |"
                    for name, differ, one, other in wanted]
    follows = factorization._follows([many, wide, few, narrow]).splitlines()[2:]
    assert follows == ["| 4 shapes | +0.74 | too few values | too few values |",
                       "| 2 shapes with SLSD = 32, FRH = 32 | too few values | all equal | all equal |"]


def test_the_frontier_is_the_best_of_each_cache_against_the_best_with_less():
    small, best, worse = (shape_of("small", 1, 1, 1, 64, 2.0, 2.01), shape_of("best", 1, 1, 1, 128, 1.8, 1.81),
                          shape_of("worse", 1, 1, 1, 128, 2.2, 2.21))
    large = shape_of("large", 1, 1, 1, 256, 1.79, 1.83)
    rows = [row.split(" | ") for row in factorization.frontier([large, worse, small, best], 2).splitlines()[2:]]
    assert [row[:3] for row in rows] == [["| 64", "1", "small"], ["| 128", "2", "best"], ["| 256", "1", "large"]]
    assert [(row[4], row[-1].rstrip(" |")) for row in rows] == [
        ("none", ""), ("small", "lower"), ("best", "not told apart")]


@pytest.mark.slow
def test_shapes_stand_beside_what_caches_as_much(tmp_path):
    folder, found = tmp_path / "factorization", all_done("factorization")
    folder.mkdir()
    assert "No run of another variant" in factorization.section(found, folder)
    others = all_done("cache_quality")
    text = {"digest": "1"}
    strange = [dataclasses.replace(record, text={"digest": "2"}) for record in others]
    for record in strange:
        records.append(tmp_path / "cache_quality", record)
    ours = [dataclasses.replace(record, text=text) for record in found]
    assert "No run of another variant" in factorization.section(ours, folder)
    for record in others:
        records.append(tmp_path / "cache_quality", dataclasses.replace(record, text=text))
    made = factorization.section(ours, folder)
    shapes, variants = (
        {name: report.at_best_rate(runs) for name, runs in report.groups(each).items()} for each in (found, others))
    name = next(name for name, runs in shapes.items() if runs[0].config["model"]["attention"]["latent_dim"] == 8)
    assert f"| {name} - mqa | 64 | {' | '.join(report.compared(shapes[name], variants['mqa'], 2))} |" in made
    assert " - mfa |" not in made and " - mha |" not in made and " - gqa | 128 |" in made


def test_ranks_before_training_are_of_the_runs_that_are_shown(tmp_path):
    found = all_done("factorization")
    chosen = [report.at_best_rate(runs) for runs in report.groups(found).values()]
    ranks = {run.run: {"W_effective_rank": 10.0 + i, "U_effective_rank": 12.0}
             for runs in chosen[:2] for i, run in enumerate(runs)}
    ranks.pop(chosen[1][1].run)
    (tmp_path / factorization.START).write_text(json.dumps({"ranks": {"tiny": ranks}}))
    text = factorization.section(found, tmp_path)
    first, second = (runs[0].labels["name"] for runs in chosen[:2])
    assert re.search(rf"^\| {first} \|.*\| 10.5, 3.0 \| 12.0, 4.0 \|", text, re.M)
    assert re.search(rf"^\| {second} \|.*\| not measured, 3.0 \| not measured, 4.0 \|", text, re.M)


@pytest.mark.slow
def test_the_ranks_before_training_are_those_of_the_recorded_runs():
    folder = ROOT / "experiments" / "studies" / "factorization"
    committed = json.loads((folder / factorization.START).read_text())["ranks"]["nano"]
    shapes = report.groups(records.read(folder)).values()
    shown = [report.at_best_rate(runs) for runs in shapes]
    assert committed.keys() == {run.run for runs in shown for run in runs}
    found = start.starting_ranks(shown[0][:1])
    assert found == {name: pytest.approx(committed[name], rel=1e-3) for name in found}


def test_a_spike_is_a_jump_above_what_was_before_it():
    run = make_run(TINY, "zero", model_preset("tiny-mfa-kr"), 4e-3, 0)
    noisy = [3 - i / 50 + (-1) ** i / 10 for i in range(40)]
    for losses, spikes in ((noisy, 0), ([*noisy[:20], 3.6, 3.6, *noisy[20:]], 1),
                           ([*noisy[:20], 3.6, *noisy[20:], 4.0], 2), ([*noisy[:20], *(5.0,) * 20], 1)):
        steps = list(range(1, len(losses) + 1))
        record = record_of(run, 1.0, curve={"step": [*steps, 99], "loss": [*losses, None],
                                            "grad_norm": [*(1.0 + s for s in steps), None]})
        assert key_reuse_start.watch(record) == ["2.00", f"{1 + len(losses):.2f}", str(spikes)]


@pytest.mark.parametrize(("at", "spikes"), [(2, 0), (5, 0), (6, 1), (7, 1)])
def test_a_spike_counts_from_the_first_point_after_the_warm_up(at, spikes):
    run = make_run(TINY, "zero", model_preset("tiny-mfa-kr"), 4e-3, 0)
    losses = [3.0 + (i == at) for i in range(1, 21)]
    record = record_of(run, 1.0, curve={"step": list(range(1, 21)), "loss": losses, "grad_norm": [1.0] * 20})
    record.config["optimizer"]["warmup_steps"] = 5
    assert key_reuse_start.watch(record)[2] == str(spikes)


def points_of(name: str, law) -> list[scaling.Point]:
    """A variant at each size, two seeds each, its losses a law of the parameters beside the embedding."""
    grid = [run for run in STUDIES["scaling"].plan(TINY, lambda run: None)
            if scaling.family(record_of(run, 1.0)) == name and run.labels["learning_rate"] == 8e-3]
    found = [[record_of(dataclasses.replace(run, labels={**run.labels, "seed": seed}), 1.0) for seed in TINY.seeds]
             for run in grid]
    for i, runs in enumerate(found):
        for run in runs:
            run.metrics["test_bits_per_byte"] = law(i, scaling.parameters(run))
    return [scaling.Point(runs, "") for runs in found]


def test_a_power_law_is_fitted_to_one_point_a_size():
    points = points_of("mha", lambda i, P: 5 * P ** -0.05 * (1, 1.01, 0.99, 1)[i])
    P = [scaling.parameters(each.best[0]) for each in points]
    fit = stats.linregress(np.log(P), np.log([report.values(each.best)[0] for each in points]))
    wanted = f"{-fit.slope:.4f} ± {stats.t.ppf(0.975, 2) * fit.stderr:.4f}"
    assert scaling.exponent(points)[0] == wanted
    more = [scaling.Point(each.best * 3, "") for each in points]
    assert scaling.exponent(more)[0] == wanted  # seeds that agree are no more evidence
    for lack in ("unfinished", "too few seeds"):
        assert scaling.exponent([*points[:3], scaling.Point(points[3].best, lack)]) == [lack, ""]
    assert scaling.exponent([*points[:3], scaling.NOTHING]) == ["unfinished", ""]


def test_a_gap_over_sizes_has_an_interval_of_its_own():
    wobble = (0.01, -0.02, 0.015, 0.0)  # of both alike: not in their difference
    points = [points_of(name, lambda i, P, more=more: 5 - 0.3 * math.log10(P) + wobble[i] + more(i, P))
              for name, more in (("mha", lambda i, P: 0), ("mfa", lambda i, P: 0.1 * math.log10(P) - (i == 1) / 1000),
                                 ("mqa", lambda i, P: (-1) ** i / 1000))]
    mha, mfa, mqa = points
    slope, verdict, exponents = scaling.trend(mfa, mha)
    assert verdict == "rises" and float(slope.split(" ± ")[0]) == pytest.approx(0.1, abs=0.01)
    assert 0 < float(slope.split(" ± ")[1]) < 0.02
    P = [(scaling.parameters(a.best[0]) * scaling.parameters(b.best[0])) ** 0.5 for a, b in zip(mfa, mha, strict=True)]
    ratio = np.log([report.values(a.best)[0] / report.values(b.best)[0] for a, b in zip(mfa, mha, strict=True)])
    assert exponents.split(" ± ")[0] == f"{-stats.linregress(np.log(P), ratio).slope:+.4f}"
    assert scaling.trend(mha, mfa)[1] == "falls" and scaling.trend(mqa, mha)[1] == "not told apart from none"
    short = [*mha[:3], scaling.Point(mha[3].best[:1], "too few seeds")]
    assert scaling.trend(mfa, short) == ["", "too few seeds", ""]
    assert scaling.trend([scaling.NOTHING, *mfa[1:]], short) == ["", "unfinished", ""]


@pytest.mark.slow
def test_a_size_is_done_with_its_whole_grid_and_all_seeds():
    found = [record for record in all_done("scaling") if record.labels["name"] == "mha D32"]
    assert (scaling.point(found).lacks, len(scaling.point(found).best)) == ("", 2)
    assert scaling.point(found[1:]).lacks == "unfinished"  # all seeds are there, at a rate that may not be the best
    assert scaling.point(found[:-1]).lacks == "too few seeds"
    diverged = dataclasses.replace(found[-1], outcome="diverged", metrics={})
    assert scaling.point([*found[:-1], diverged]).lacks == "too few seeds"


@pytest.mark.slow
def test_variants_are_compared_at_each_size(tmp_path):
    found = all_done("scaling")
    late = found[-1].labels["name"]  # its last seed is missing
    first = next(record for record in found if record.labels["name"] == "mqa D64")  # and one rate of this
    text = scaling.section([record for record in found[:-1] if record is not first], tmp_path)
    chosen = {name: report.at_best_rate(runs) for name, runs in report.groups(found).items()}
    cells = " | ".join(report.compared(chosen["mfa D32"], chosen["mha D32"], 2))
    assert f"| mfa - mha, D = 32 | {cells} |" in text and "| mfa-kr - mfa, D = 128 |" in text
    assert re.search(r"^\| mfa - mqa, D = 64 \|.*\| unfinished \|$", text, re.M)
    assert re.search(r"^\| mfa - mqa \|  \| unfinished \|  \|$", text, re.M)
    assert re.search(r"^\| mqa \| unfinished \|  \|$", text, re.M)
    assert late == "mfa, C = 4H D128" and re.search(r"^\| mfa, C = 4H \| too few seeds \|  \|$", text, re.M)
    assert re.search(r"^\| mfa - mha \| [+-]\d.\d{4} ± \d.\d{4} \|", text, re.M)
    assert re.search(r"^\| best width of MFA \| mfa.*\| too few seeds \|$", text, re.M)


def test_the_best_width_says_whether_it_is_told_apart_from_the_next():
    one, two, four = (scaling.Point(seeds_of(*losses), "") for losses in ((9.0, 9.1), (3.0, 3.1), (2.9, 3.1)))
    points = {"mfa, C = H": one, "mfa": two, "mfa, C = 4H": four}
    assert scaling.best_width(points, 2) == "mfa, C = 4H (against mfa: not told apart)"
    points["mfa, C = 4H"] = one
    assert scaling.best_width(points, 2) == "mfa (against mfa, C = H: lower)"
    for lack in ("unfinished", "too few seeds"):
        assert scaling.best_width({**points, "mfa, C = H": scaling.Point(one.best, lack)}, 2) == lack
    assert scaling.best_width({"mfa": two}, 2) == "unfinished"


@each_study
def test_a_report_is_made_of_metrics_alone_and_stays_the_same(name, tmp_path):
    for record in all_done(name):
        records.append(tmp_path, record)
    page = report.write(STUDIES[name], tmp_path, ROOT / "experiments" / "studies" / name)
    text, pictures = page.read_text(), {path: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert "### tiny" in text and "No evidence of quality" in text and "abc" in text and "missing" not in text
    assert pictures and set(re.findall(r"!\[.*?\]\((.*?)\)", text.split(report.BEGIN)[1])) == {p.name for p in pictures}
    report.write(STUDIES[name], tmp_path, ROOT)
    assert page.read_text() == text and {p: p.read_bytes() for p in pictures} == pictures


@each_study
def test_a_report_tells_what_is_missing_diverged_or_of_other_settings(name, tmp_path):
    found = all_done(name)
    found[0] = dataclasses.replace(found[0], outcome="diverged", metrics={}, note="step 3: x is not finite")
    other = dataclasses.replace(found[-1], config={**found[-1].config, "steps": 7})
    for record in [*found[:-1], other]:
        records.append(tmp_path, record)
    text = report.write(STUDIES[name], tmp_path, ROOT / "experiments" / "studies" / name).read_text()
    assert re.search(r"\*\*\d+ of \d+ planned runs are missing", text)
    assert f"Diverged: {found[0].run}" in text and re.search(r"Left out: \d+ runs of other settings", text)


@each_study
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_report_of_the_first_runs_has_no_verdict(name, count, tmp_path):
    found: list[Record] = []
    while len(found) < count:
        results = results_of(found)
        run = next(run for run in STUDIES[name].plan(TINY, results) if results(run) is None)
        found.append(record_of(run, invented_loss(run)))
    for record in found:
        records.append(tmp_path, record)
    text = report.write(STUDIES[name], tmp_path, ROOT / "experiments" / "studies" / name).read_text()
    made = text.split(report.BEGIN)[1]
    results = results_of(found)
    for run in STUDIES[name].plan(TINY, results):
        part = f"{run.labels['learning_rate']:g}" if run.labels["seed"] == 0 else f"seed {run.labels['seed']}"
        listed = re.search(rf"[:;] {re.escape(run.labels['name'])} \([^)]*{part}", made)
        assert bool(listed) == (results(run) is None)
    assert not re.search("not told apart|lower|higher", made)
    assert all(set(row.split("|")[2:-1]) == {" unfinished "} for row in re.findall(r".*best width of MFA.*", made))


def test_the_rates_table_says_where_the_best_may_not_be_the_best():
    models = {name: model_preset(f"tiny-{name}") for name in ("mfa", "mha", "mla")}
    scale = dataclasses.replace(TINY, learning_rates=(1e-3, 2e-3, 4e-3))
    grid = tuned(scale, models, lambda run: None)
    found = [record_of(run, loss) for run, loss in zip(grid[:8], (3, 2, 4, 3, 2, 1, 2, 3), strict=True)]
    rows = report.rates_table(found).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == ["", "edge of the grid", "unfinished, edge of the grid"]
    assert "missing" in rows[2]


@pytest.mark.parametrize("name", STUDIES)
def test_what_is_committed_is_what_report_makes(name, tmp_path):
    studies = ROOT / "experiments" / "studies"
    committed = (studies / name / report.README).read_text()
    assert "**Expected" in committed
    for path in (*studies.glob(f"*/{records.METRICS}"), *studies.glob("*/*.json")):  # one study reads another's
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).symlink_to(path)
    if (tmp_path / name / records.METRICS).exists():
        assert report.write(STUDIES[name], tmp_path / name, studies / name).read_text() == committed


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    (("nothing", "run"), "study='nothing': must be one of cache_quality"),
    (("cache_quality", "walk"), "action='walk': must be one of run, report"),
    (("cache_quality",), "action='': must be one of run, report"),
    (("cache_quality", "run", "--scale", "huge"), "scale='huge': must be one of tiny, nano, small"),
    (("cache_quality", "run", "--workers", "0"), "workers=0"),
    (("cache_quality", "report", "--scale", "nano"), "--scale: unknown argument"),
    (("cache_quality", "report", "--results", "nowhere"),
     "`python -m experiments.studies cache_quality run --scale tiny` makes some"),
])
def test_bad_input_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["studies", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.run(script.main)
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and message in errors and len(errors.splitlines()) == 1


def test_a_missing_corpus_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv(corpus.VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match=f"looked for {tmp_path}/text/books-train-xs.txt.bz2.*MFA_JAX_DATA="):
        corpus.prepared("books-train-xs", tmp_path / "work")


def own_corpus(folder: Path, monkeypatch: pytest.MonkeyPatch, *, leak: tuple[str, str] | None = None,
               words: int = 200) -> None:
    """Three small texts in place of the books; `leak`: a book of the second is in the first, too."""
    books = {name: [f"{name} {i} " + "the quick brown fox " * words for i in range(4)]
             for name in ("books-train-xs", corpus.VALID, corpus.TEST)}
    if leak:
        books[leak[0]].append(books[leak[1]][0])
    (folder / "text").mkdir()
    for name, texts in books.items():
        (folder / "text" / f"{name}.txt").write_text("\0".join(texts))
    monkeypatch.setenv(corpus.VARIABLE, str(folder))


@pytest.mark.parametrize("leak", list(itertools.permutations(("books-train-xs", corpus.VALID, corpus.TEST), 2)))
def test_a_book_in_two_texts_is_refused(leak, tmp_path, monkeypatch):
    own_corpus(tmp_path, monkeypatch, leak=leak)
    # What is held out of a text is refused when its shards are made.
    message = "is held out by" if corpus.VALID in leak else "shares 1 books"
    for _ in range(2):  # the second time shards of training and test text are there already
        with pytest.raises(ValueError, match=message) as refused:
            corpus.prepared("books-train-xs", tmp_path / "work")
        assert all(f"{name}.txt" in str(refused.value) for name in leak)


def test_training_and_test_text_are_apart(tmp_path, monkeypatch):
    own_corpus(tmp_path, monkeypatch)
    found = corpus.prepared("books-train-xs", tmp_path / "work")
    assert found.data.source.endswith("books-train-xs.txt") and found.data.held_out_source.endswith("books-valid.txt")
    tokens = bytes(token for token in found.test.tokens("held_out").tolist() if token < 256)
    assert tokens.startswith(b"books-test 0") and b"train" not in tokens and b"valid" not in tokens
    assert corpus.prepared("books-train-xs", tmp_path / "elsewhere").text == found.text
    path = tmp_path / "text" / "books-valid.txt"
    assert found.text["valid_bytes"] == len(path.read_bytes()) - 3  # the separators
    path.write_text(path.read_text().replace("quick", "slick"))
    changed = corpus.prepared("books-train-xs", tmp_path / "again").text
    assert changed["valid_bytes"] == found.text["valid_bytes"] and changed["digest"] != found.text["digest"]


@pytest.mark.parametrize(("visible", "names"), [(None, ["0", "1"] * 2), ("5,GPU-a,6", ["5", "GPU-a"] * 2)])
def test_workers_use_the_gpus_that_are_visible(visible, names, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = runner.worker_environments(2, 2)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == names
    assert {each["JAX_PLATFORMS"] for each in found} == {"cuda"}
    # One device may be a CPU, and several are what the user says.
    assert all("JAX_PLATFORMS" not in each for each in runner.worker_environments(3, 1))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert runner.worker_environments(1, 2)[0]["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ValueError, match="devices=2: CUDA_VISIBLE_DEVICES='3' names 1"):
        runner.worker_environments(2, 2)


# ---- runs ------------------------------------------------------------------------------------------------------


SHORT = dataclasses.replace(TINY, steps=6, learning_rates=(8e-3,), seeds=(0, 1), batch_size=4, valid_batches=1,
                            test_batches=2)
LONGER = dataclasses.replace(SHORT, steps=400, seeds=(0,))


def two_models(scale: Scale, results) -> list[Run]:
    return tuned(scale, {name: model_preset(f"tiny-{name}") for name in ("mha", "mfa-kr")}, results)


SHORT_STUDY = dataclasses.replace(STUDIES["cache_quality"], plan=two_models)


@pytest.mark.slow
def test_a_study_runs_to_its_end_once_with_real_models_and_caches(tmp_path, monkeypatch, capsys):
    own_corpus(tmp_path, monkeypatch)
    folders = runner.Folders(tmp_path / "results", tmp_path / "work")
    model = {"mfa-kr": model_preset("tiny-mfa-kr")}
    study = dataclasses.replace(SHORT_STUDY, plan=lambda scale, results: tuned(scale, model, results))
    runner.work_through(study, SHORT, folders)
    found = records.read(folders.results)
    assert [record.run for record in found] == ["mfa-kr-lr0.008-seed0", "mfa-kr-lr0.008-seed1"]
    for record, run in zip(found, study.plan(SHORT, results_of(found)), strict=True):
        assert 0 < record.metrics["test_bits_per_byte"] < 9 and record.curve["step"] == [1, 2, 3, 4, 5, 6]
        closed = capacity.analyse_model(run.config.model, context=1, cache_dtype="bfloat16").cache_bytes_per_token
        assert record.metrics["cache_bytes_per_token"] == closed
        assert record.text and record.text["test_bytes"] > 0
    assert not [path for path in (tmp_path / "work" / "cache_quality" / "tiny").iterdir() if path.is_dir()]
    assert capsys.readouterr().err.splitlines()[-1].startswith("2/2 tiny mfa-kr-lr0.008-seed1: finished")
    runner.work_through(study, SHORT, folders)
    assert records.read(folders.results) == found


MEASURED = {
    "factorization": factorization.RANKS,
    "positions": tuple(map(positions.name_of, positions.LENGTHS)),
    "long_context": ("position_edges", "position_bits", "needle_bits", *measurements.RECALL),
}
"""What each study measures besides what all do."""


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_the_first_run_of_a_study_is_measured_and_reported(name, tmp_path, monkeypatch):
    own_corpus(tmp_path, monkeypatch, words=13_000)  # books that are long enough for `long_context`
    scale = dataclasses.replace(TINY, steps=8, valid_batches=1, test_batches=2)
    monkeypatch.setitem(SCALES, "tiny", scale)
    monkeypatch.setattr(long_context, "ROWS", 4)
    study = STUDIES[name]
    run = study.plan(scale, lambda run: None)[0]
    text = corpus.prepared(scale.train, tmp_path / "text")
    record = runner.execute(study, scale, text, run, tmp_path / "run")
    assert (record.outcome, record.scale, record.run) == ("finished", "tiny", run.name), record.note
    shared = {"valid_bits_per_byte", "test_bits_per_byte", "parameters", "cache_bytes_per_token"}
    assert record.metrics.keys() == shared | set(MEASURED.get(name, ()))
    assert all(np.all(np.isfinite(value)) for value in record.metrics.values())
    assert 0 < record.metrics["test_bits_per_byte"] < 9 and record.curve["step"][-1] == run.config.steps
    records.append(tmp_path / name, record)
    assert records.read(tmp_path / name) == [record]
    page = report.write(study, tmp_path / name, ROOT / "experiments" / "studies" / name).read_text()
    shown = {"positions": "bits_per_byte_at_1x", "long_context": "position_bits"}.get(name, "test_bits_per_byte")
    value = record.metrics[shown]
    cell = f"{value[0]:.3f}" if name == "long_context" else f"{value:.4f} (1)"
    label = scaling.family(record) if name == "scaling" else run.labels["name"]
    assert re.search(rf"^\| {label} \|.*{re.escape(cell)}", page.split(report.BEGIN)[1], re.M)
    assert f"1 runs of {run.config.steps} steps" in page and (tmp_path / name / "tiny.png").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    own_corpus(tmp_path, monkeypatch)
    program = f"""
import dataclasses
from pathlib import Path
import test_studies as t
t.runner.work_through(t.SHORT_STUDY, t.LONGER, t.runner.Folders(Path({str(tmp_path / "results")!r}),
                                                                Path({str(tmp_path / "work")!r})))
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment)
    while process.poll() is None and not list((tmp_path / "work").glob("*/tiny/*/checkpoints/100")):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert records.read(tmp_path / "results") == []
    (folder,) = (path for path in (tmp_path / "work").glob("*/tiny/*") if path.is_dir())
    before = [json.loads(line) for line in (folder / records.METRICS).read_text().splitlines()]
    folders = runner.Folders(tmp_path / "results", tmp_path / "work", keep=True)
    one = dataclasses.replace(SHORT_STUDY, plan=lambda scale, results: two_models(scale, results)[:1])
    runner.work_through(one, LONGER, folders)
    (record,) = records.read(folders.results)
    # Lines up to the checkpoint stay; started anew, the run would have written all of them again.
    assert record.curve["step"] == list(range(10, 401, 10))
    kept = record.curve["loss"][:10]
    assert kept == [pytest.approx(line["loss"], rel=1e-4) for line in before[:10]]
    dropped = folder / "metrics.dropped.jsonl"
    assert not dropped.exists() or json.loads(dropped.read_text().splitlines()[0])["step"] > 100


@pytest.mark.slow
def test_workers_share_the_runs_and_stop_when_told(tmp_path, monkeypatch):
    own_corpus(tmp_path, monkeypatch)
    results = tmp_path / "results" / "cache_quality"
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.studies", "cache_quality", "run", "--scale", "tiny", "--workers", "2",
         "--results", str(tmp_path / "results"), "--workdir", str(tmp_path / "work")],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(records.read(results)) < 2:
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    done = [record.run for record in records.read(results)]
    assert len(done) == len(set(done)) >= 2
    for path in (tmp_path / "work" / "cache_quality" / "tiny").glob("*.lock"):
        with records.lock(path, wait=False) as ours:
            assert ours, "a worker is left"


def test_a_run_that_diverges_is_a_result(tmp_path, monkeypatch):
    own_corpus(tmp_path, monkeypatch)

    def explode(config, **options):
        raise runner.NonFiniteError("step 3: gradient of embed is not finite; the run stops")

    monkeypatch.setattr(runner, "train", explode)
    folders = runner.Folders(tmp_path / "results", tmp_path / "work", keep=True)
    runner.work_through(SHORT_STUDY, SHORT, folders)
    (first, second) = records.read(folders.results)
    assert (first.outcome, first.note, first.metrics) == ("diverged", "step 3: gradient of embed is not finite", {})
    assert second.outcome == "diverged"


def test_a_run_whose_measurements_break_down_is_a_result(tmp_path, monkeypatch):
    """A record holds no NaN: such a run would be made again at every start, and never be done."""
    own_corpus(tmp_path, monkeypatch)
    found = {"test_bits_per_byte": math.nan, "needle_bits": [[1.0, math.inf]]}
    monkeypatch.setattr(runner, "measure", lambda *_: found)
    folders = runner.Folders(tmp_path / "results", tmp_path / "work", keep=True)
    runner.work_through(SHORT_STUDY, SHORT, folders)
    first, _ = records.read(folders.results)
    assert (first.outcome, first.metrics) == ("diverged", {})
    assert re.fullmatch(r"step \d+: test_bits_per_byte, needle_bits not finite", first.note)


def test_a_run_that_does_not_fit_leaves_the_others_to_be_done(tmp_path, monkeypatch):
    own_corpus(tmp_path, monkeypatch)

    def execute(study, scale, text, run, folder):
        if run.labels["name"] == "mha":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        return record_of(run, 1.0)

    monkeypatch.setattr(runner, "execute", execute)
    folders = runner.Folders(tmp_path / "results", tmp_path / "work", keep=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        runner.work_through(SHORT_STUDY, SHORT, folders)
    assert [record.run for record in records.read(folders.results)] == ["mfa-kr-lr0.008-seed0", "mfa-kr-lr0.008-seed1"]
