"""The benchmarks at tiny sizes: what they compare is the same model, and their records say what was done. No times."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import bench_attention, bench_decode, bench_train, benchmark
from experiments.bench_attention import BenchAttentionConfig
from experiments.bench_decode import BenchDecodeConfig
from experiments.bench_train import BenchTrainConfig
from mfa_jax import capacity
from mfa_jax.attention import gqa, mfa, mfa_kr, mla
from mfa_jax.config import GQAConfig, MFAConfig, ModelConfig, PositionConfig
from mfa_jax.model.transformer import Transformer
from mfa_jax.presets import model_preset

TINY = ModelConfig(vocab_size=61, num_layers=2, model_dim=64, ffn_dim=96, position=PositionConfig(base=10000.0),
                   attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8))
DECODE = BenchDecodeConfig(model=TINY, batch_size=2, prompt_tokens=5, new_tokens=6, repeats=2, threads=1, peer=False)
TRAIN = BenchTrainConfig(model=TINY, batch_size=2, sequence_length=16, repeats=2, threads=1)


@pytest.fixture
def transformers() -> Any:
    """The peer's package."""
    pytest.importorskip("torch", reason="the peer needs torch: pip install 'mfa_jax[bench]'")
    return pytest.importorskip("transformers", reason="the peer needs transformers: pip install 'mfa_jax[bench]'")


def test_runs_take_turns_after_a_warm_up_of_each() -> None:
    calls: list[str] = []
    timings = benchmark.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    for timing in timings.values():
        assert len(timing.seconds) == 3
        assert timing.median_s == sorted(timing.seconds)[1]
        assert timing.compile_s == max(0.0, timing.first_call_s - timing.median_s)


@pytest.mark.slow
def test_variants_are_matched_in_parameters_and_decode() -> None:
    model = dataclasses.replace(TINY, attention=GQAConfig(num_heads=8, num_kv_heads=8, head_dim=8), ffn_dim=192)
    record = bench_decode.measure(dataclasses.replace(DECODE, model=model, variants="mfa,mfa-kr"))
    assert list(record["sides"]) == ["ours", "mfa", "mfa-kr"]
    assert record["ratios"] is None and record["check"] is None, "nothing to compare with"
    sides = record["sides"]
    for name in ("mfa", "mfa-kr"):
        assert abs(sides[name]["parameters"] / sides["ours"]["parameters"] - 1) < 0.02
    # Eight heads of 8 cache 2 * 64 elements a layer, C = 16 caches 2 * 16, and key reuse half of that.
    assert [sides[name]["cache_bytes_per_token"] for name in sides] == [2 * 4 * n for n in (128, 32, 16)]
    for side in sides.values():
        assert side["tokens_per_s"] == pytest.approx(2 * 6 / side["whole"]["median_s"])
    assert json.loads(json.dumps(record))["config"]["model"]["ffn_dim"] == 192
    assert bench_decode.to_table(record).row_count == 3


def test_a_variant_differs_from_its_reference_in_attention_and_feed_forward_alone() -> None:
    found = bench_decode.variant_model(benchmark.MODEL, "mfa")
    assert isinstance(found.attention, MFAConfig) and found.attention.latent_dim == 128
    assert dataclasses.replace(found, attention=benchmark.MODEL.attention, ffn_dim=1376) == benchmark.MODEL
    counts = [capacity.model_parameters(m).total for m in (found, benchmark.MODEL)]
    assert abs(counts[0] / counts[1] - 1) < 0.02


def test_decoding_gives_the_most_likely_tokens() -> None:
    """What is timed is greedy decoding: each token is the argmax of a whole forward pass over what came before."""
    params = bench_decode.initial(TINY, 0)
    tokens = bench_decode.our_run(DECODE, TINY, params, 6, 16)()
    assert tokens.shape == (2, 6)
    prompts = benchmark.random_tokens(TINY, 2, 5, 0)
    logits, _ = Transformer(TINY).apply({"params": params}, jnp.asarray(np.concatenate([prompts, tokens], axis=1)))
    np.testing.assert_array_equal(np.asarray(logits)[:, 4:-1].argmax(-1), tokens)


@pytest.mark.slow
def test_our_step_trains_and_leaves_the_given_parameters_alone() -> None:
    params = bench_decode.initial(TINY, 0)
    step = bench_train.our_step(TRAIN, params, benchmark.random_tokens(TINY, 2, 17, 0))
    losses = [step() for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params)), "the peer's weights are copied, not donated"


def test_attention_is_timed_beside_the_peer() -> None:
    config = BenchAttentionConfig(scale="tiny", variants="mla,mfa", lengths="16,32", tokens=64, repeats=2)
    record = bench_attention.measure(config)
    points = record["points"]
    assert [(point["variant"], point["length"], point["rows"]) for point in points] == [
        ("mla", 16, 4), ("mla", 32, 2), ("mfa", 16, 4), ("mfa", 32, 2)]
    for point in points:
        assert point["auto"] == "dense" and {"dense", "blockwise"} <= set(point["ratio"])
        assert point["ratio"]["dense"] == pytest.approx(
            point["time"]["dense"]["median_s"] / point["time"]["jax.nn"]["median_s"])
    assert json.loads(json.dumps(record))["config"]["scale"] == "tiny"
    table = bench_attention.to_table(record)
    assert table.row_count == 4
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    assert "jax.nn (ms)" in console.export_text(), "units in square brackets would be taken for markup"


@pytest.mark.parametrize("name", ["gqa", "mla", "mfa", "mfa-kr"])
def test_attention_is_timed_at_the_shapes_that_training_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = model_preset(f"tiny-{name}"), []

    def recorded(q: jax.Array, k: jax.Array, v: jax.Array, **_: Any) -> jax.Array:
        given.append((q.shape, k.shape, v.shape))
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)

    for module in (gqa, mla, mfa, mfa_kr):
        monkeypatch.setattr(module, "attend", recorded)
    params = bench_decode.initial(model, 0)
    given.clear()
    tokens = jnp.zeros((3, 16), jnp.int32)
    jax.eval_shape(lambda x: Transformer(model).apply({"params": params}, x)[0], tokens)
    shape = bench_attention.shape_of(f"tiny-{name}")
    (q, k, v), = set(given)
    heads = (1,) if len(k) == 3 else ()
    assert q == (3, 16, shape.N, shape.H)
    assert (k[0], *heads, *k[1:]) == (3, shape.K, 16, shape.H)
    assert (v[0], *heads, *v[1:]) == (3, shape.K, 16, shape.h)


def test_attention_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "_peer", lambda q, k, v, scale: 1.01 * jnp.repeat(v, 10, 1).swapaxes(1, 2))
    with pytest.raises(ValueError, match=r"jax\.nn\.error=.*computes something else"):
        bench_attention.measure(BenchAttentionConfig(scale="tiny", variants="mfa", lengths="16", tokens=16, repeats=1))


def test_decoding_equals_the_peer(transformers: Any) -> None:
    record = bench_decode.measure(dataclasses.replace(DECODE, peer=True))
    assert record["check"]["logit_difference"] < 1e-5
    assert record["check"]["equal_tokens"] == 1.0
    assert record["ratios"]["tokens_per_s"] == pytest.approx(
        record["sides"]["peer"]["whole"]["median_s"] / record["sides"]["ours"]["whole"]["median_s"])


def test_training_follows_the_peer(transformers: Any) -> None:
    record = bench_train.measure(TRAIN)
    losses = record["check"]["losses"]
    assert len(losses["ours"]) == 3, "one warm-up and two timed steps"
    np.testing.assert_allclose(losses["ours"], losses["peer"], rtol=1e-5)
    assert losses["ours"][-1] < losses["ours"][0]
    assert bench_train.to_table(record).row_count == 2


def test_a_peer_with_other_weights_is_refused(transformers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load = benchmark.load_pretrained

    def wrong(folder: str) -> tuple[ModelConfig, Any]:
        config, params = load(folder)
        return config, {**params, "embed": params["embed"] * 1.01}

    monkeypatch.setattr(benchmark, "load_pretrained", wrong)
    with pytest.raises(ValueError, match="logit_difference"):
        benchmark.make_peer(TINY, 1, 0)


def test_a_missing_peer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(benchmark.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r'torch is not installed; pip install "mfa_jax\[bench\]"'):
        bench_train.measure(TRAIN)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: BenchDecodeConfig(new_tokens=1), "new_tokens=1"),
    (lambda: BenchDecodeConfig(repeats=0), "repeats=0"),
    (lambda: BenchTrainConfig(sequence_length=1), "sequence_length=1"),
    (lambda: BenchAttentionConfig(lengths="64,many"), "lengths='64,many'"),
    (lambda: BenchAttentionConfig(lengths="4096"), "lengths='4096'"),
    (lambda: bench_attention.measure(BenchAttentionConfig(variants="nonsense")), "preset='nano-nonsense'"),
    (lambda: benchmark.use_threads(0), "threads=0"),
    (lambda: benchmark.use_threads(10**6), "threads=1000000"),
    (lambda: benchmark.make_peer(dataclasses.replace(TINY, attention=MFAConfig()), 1, 0), "model.attention.kind"),
    (lambda: bench_decode.variant_model(TINY, "nonsense"), "preset='tiny-nonsense'"),
    (lambda: bench_decode.variant_model(
        dataclasses.replace(TINY, attention=GQAConfig(num_heads=1, num_kv_heads=1, head_dim=6)), "mfa"), "head_dim"),
])
def test_bad_input_is_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
