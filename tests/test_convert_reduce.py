"""GQA with a smaller cache: the algebra on constructed layers, and a trained model."""

from __future__ import annotations

import bz2
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import convert as convert_script
from experiments.convert import ConvertConfig, main, require_convertible, width_of
from mfa_jax.config import ModelConfig, PositionConfig
from mfa_jax.convert import load_pretrained, pretrained_tokenizer, save_pretrained
from mfa_jax.convert.calibration import calibration_rows
from mfa_jax.convert.directions import Keys, Moments, rank_keys, with_values
from mfa_jax.convert.reduce import reduce_gqa
from mfa_jax.data import ByteTokenizer
from mfa_jax.model.transformer import Transformer
from mfa_jax.train.run import load_trained
from tests.contract import compiled, model_config, tokens

TEXT = tokens(9, (24, 32))


def logits(config: ModelConfig, params: Any, ids: Any) -> np.ndarray:
    return np.asarray(jax.jit(Transformer(config).apply)({"params": params}, jnp.asarray(ids))[0], np.float64)


def test_keys_that_differ_by_a_complex_factor_are_one() -> None:
    """Two key heads, the second the first times a complex number of its own for each pair: half of the directions hold
    all, and rotated queries and keys score as before. No real map of pairs could do that."""
    rng = np.random.default_rng(0)
    D, N, H = 12, 4, 8
    first = rng.normal(size=(D, 4)) + 1j * rng.normal(size=(D, 4))
    second = first * np.exp(1j * rng.uniform(0, 6, 4))
    W_K = np.stack([np.concatenate([k.real, k.imag], axis=1) for k in (first, second)], axis=1)
    layer = {"W_Q": rng.normal(size=(D, N, H)), "W_K": W_K}
    inv_freq = 100.0 ** (-np.arange(4) / 4)
    keys = rank_keys(layer, inv_freq, Moments(np.eye(D), np.zeros(D), np.eye(D)), 16)
    half = [keys.S_k[:, :4], keys.S_k[:, 8:12]]
    assert np.abs(keys.S_k[:, 4:8]).max() < 1e-6 * np.abs(half[0]).max()
    assert sorted(keys.inv_freq[:4]) == sorted(inv_freq)

    x, y = rng.normal(size=(2, D))
    turns = np.exp(1j * 5 * inv_freq)  # of a query 5 tokens behind its key
    for n in range(N):
        q, k = (w[:4] + 1j * w[4:] for w in (x @ layer["W_Q"][:, n], y @ W_K[:, n // 2]))
        wanted = np.sum((q * turns * k.conj()).real) * H**-0.5
        W = x @ keys.W[:, n]
        found = np.sum(((W[:4] + 1j * W[8:12]) * np.exp(1j * 5 * keys.inv_freq[:4])
                        * ((y @ half[0]) - 1j * (y @ half[1]))).real)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(("target", "widths"), [("mfa", (14, 10, 6)), ("mfa_kr", (30, 22, 12))])
def test_the_error_grows_as_the_cache_shrinks(target: Any, widths: tuple[int, ...]) -> None:
    c = compiled(model_config("gqa"))
    expected, errors = logits(c.config, c.params, TEXT), []
    for width in widths:
        config, params, reports = reduce_gqa(c.config, c.params, np.asarray(TEXT), target=target, width=width)
        assert (config.attention.kind, config.attention.latent_dim) == (target, width)
        assert [r.layer for r in reports] == [0, 1] and all(r.refitted_error <= r.error for r in reports)
        errors.append(np.mean((logits(config, params, TEXT) - expected) ** 2) / np.mean(expected**2))
    assert errors[0] < errors[1] < errors[2] and errors[0] < 0.05


def test_a_model_that_needs_less_loses_nothing() -> None:
    """Values of rank 8 and keys of one head twice: a cache of half the size holds all."""
    c = compiled(model_config("gqa"))
    given = dict(c.params["layers"]["attention"])
    for name in ("W_K", "W_V"):
        given[name] = jnp.repeat(given[name][:, :, :1], 2, axis=2)
    params = {**c.params, "layers": {**c.params["layers"], "attention": given}}
    expected = logits(c.config, params, tokens())
    for target, width in (("mfa", 8), ("mfa_kr", 16)):
        config, converted, _ = reduce_gqa(c.config, params, np.asarray(TEXT), target=target, width=width, ridge=0.0)
        np.testing.assert_allclose(logits(config, converted, tokens()), expected, rtol=0, atol=1e-3)


def test_fewer_keys_than_values_can_fill_up_are_no_candidate() -> None:
    """All key heads equal, so that few keys say all: values have but 16 directions, and a layer has 30 elements."""
    c = compiled(model_config("gqa"))
    given = dict(c.params["layers"]["attention"])
    given["W_K"] = jnp.repeat(given["W_K"][:, :, :1], 2, axis=2)
    params = {**c.params, "layers": {**c.params["layers"], "attention": given}}
    config, converted, reports = reduce_gqa(c.config, params, np.asarray(TEXT), target="mfa_kr", width=30)
    assert converted["layers"]["attention"]["S_k"].shape == (2, config.model_dim, 30)
    assert all(report.key_elements >= 30 - 16 for report in reports)
    layer = {"W_V": np.zeros((4, 2, 8)), "W_O": np.zeros((4, 8, 4))}
    with pytest.raises(ValueError, match="count=17: must be in 0 .. 16"):
        with_values(layer, Keys(*np.zeros((3, 0))), 17, np.eye(4))


def test_an_interrupted_conversion_goes_on(tmp_path: Path) -> None:
    c, text, seen = compiled(model_config("gqa")), np.asarray(TEXT), []

    def convert(
        folder: Path | None, on_layer: Any = seen.append, ridge: float = 0.01, params: Any = c.params
    ) -> Any:
        return reduce_gqa(c.config, params, text, target="mfa_kr", width=22, folder=folder, on_layer=on_layer,
                          ridge=ridge)

    def interrupt(report: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "half", interrupt)
    with pytest.raises(ValueError, match="holds another conversion"):
        convert(tmp_path / "half", ridge=0.02)
    with pytest.raises(ValueError, match="holds another conversion"):  # of another fine-tune
        convert(tmp_path / "half", params={**c.params, "layers": jax.tree.map(lambda x: x * 1.01, c.params["layers"])})
    config, params, reports = convert(tmp_path / "half")
    assert [report.layer for report in seen] == [1] and [report.layer for report in reports] == [0, 1]
    whole = convert(None)
    assert (config, reports) == (whole[0], whole[2])
    chex.assert_trees_all_equal(params, whole[1])


def test_the_script_on_a_trained_model(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own stories: a third of the cache less costs little, and more than none."""
    stories = data_dir / "models" / "stories260K"
    text = (stories / "stories260K.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]
    (tmp_path / "text.txt").write_text(text * 12)
    options = {"source": str(stories), "tokenizer": "tok512.bin", "report": True}
    calibrated = {"calibration": (str(tmp_path / "text.txt"),), "rows": 16, "context": 64}
    ids = np.load(stories / "golden_stories260K_fp64.npz")["ids"][None]
    expected = logits(*load_pretrained(stories), ids)
    errors = {}
    for ratio in (1.0, 1.5):
        out = tmp_path / f"run{ratio}"
        main(ConvertConfig(out=str(out), cache_ratio=ratio, **options, **(calibrated if ratio > 1 else {})))
        *layers, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert not out.with_name(f"{out.name}.unfinished").exists()
        assert not last["resumed"] and last["cache_ratio"] >= ratio and len(layers) == (0 if ratio == 1 else 5)
        trained = load_trained(out)
        assert trained.tokenizer.encode("Once").tolist() == pretrained_tokenizer(stories, "tok512.bin").encode(
            "Once").tolist()
        found = logits(trained.model.config, trained.params, ids)
        errors[ratio] = float(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert errors[1.0] < 1e-9 < errors[1.5] < 0.1
    with pytest.raises(ValueError, match="must not exist yet"):
        main(ConvertConfig(out=str(out), **options))


def test_rows_of_text_take_the_files_in_turn(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.txt.bz2").write_bytes(bz2.compress(b"b" * 100))
    files = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt.bz2"))
    made = functools.partial(calibration_rows, files, ByteTokenizer(), context=8)
    rows = made(rows=3)
    assert rows.shape == (3, 8) and [chr(row[0]) for row in rows] == ["a", "b", "a"]
    with pytest.raises(ValueError, match=r"has 100 tokens, 104 are asked of it \(13 rows of 8\)"):
        made(rows=26)
    begun = made(rows=3, add_bos_token=True)
    assert begun.shape == (3, 8) and begun[:, 0].tolist() == [257] * 3
    np.testing.assert_array_equal(begun[:, 1:], rows[:, :7])
    with pytest.raises(ValueError, match="context=9: must be left out: method='commuting' at cache_ratio=1"):
        ConvertConfig("x", "y", context=9)


@pytest.mark.parametrize("add_bos_token", [False, True])
def test_rows_are_spread_over_the_whole_of_a_text(tmp_path: Path, add_bos_token: bool) -> None:
    """Over all of its documents, each row where its share begins."""
    text = "".join(chr(97 + i % 26) for i in range(100))
    (tmp_path / "a.txt").write_text(text[:60] + "\0" + text[60:])
    rows = calibration_rows((str(tmp_path / "a.txt"),), ByteTokenizer(), rows=4, context=8, spread=True,
                            add_bos_token=add_bos_token)
    begin, length = [257] * add_bos_token, 8 - add_bos_token
    assert rows.tolist() == [begin + list(text[start : start + length].encode()) for start in (0, 25, 50, 75)]
    with pytest.raises(ValueError, match=r"has 25 tokens where a row begins, 26 are asked of it \(4 rows of 26\)"):
        calibration_rows((str(tmp_path / "a.txt"),), ByteTokenizer(), rows=4, context=26, spread=True)


def test_a_begin_token_that_the_tokenizer_lacks_is_told_before_weights_are_read(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gqa = compiled(model_config("gqa", vocab_size=264))
    save_pretrained(tmp_path / "from", gqa.config, gqa.params, context_length=64, tokenizer=ByteTokenizer())
    monkeypatch.setattr(ByteTokenizer, "bos_id", None)
    monkeypatch.setattr(convert_script, "map_pretrained", lambda *_, **__: pytest.fail("reads the weights first"))
    with pytest.raises(ValueError, match="add_bos_token=True: the tokenizer has no begin token"):
        main(ConvertConfig(str(tmp_path / "from"), str(tmp_path / "out"), add_bos_token=True))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted_is_told_before_it_is_read(data_dir: Path, tmp_path: Path) -> None:
    """At a ratio of 2 the model of 4 heads is left C = 8: 64 tokens, 8 rows of 8; at 1.5 C = 10, 40 rows of 2."""
    gqa = model_config("gqa")
    config = ConvertConfig("x", "y", to="mfa", cache_ratio=2.0, calibration=("c",), context=8)
    assert require_convertible(dataclasses.replace(config, context=2, cache_ratio=1.5), gqa) == 40
    assert require_convertible(config, gqa) == 32 and require_convertible(dataclasses.replace(config, rows=8), gqa) == 8
    with pytest.raises(ValueError, match=r"rows=7: must be at least 8 of context=8: 4 heads and C=8 are fitted"):
        require_convertible(dataclasses.replace(config, rows=7), gqa)
    pooled = ConvertConfig("x", "y", to="gqa", method="mean_pool", cache_ratio=2.0)
    normed = dataclasses.replace(gqa, attention=dataclasses.replace(gqa.attention, qk_norm=True))
    assert require_convertible(pooled, normed) == 0
    with pytest.raises(NotImplementedError, match="qk_norm=True: MFA has no such thing"):
        require_convertible(config, normed)
    with pytest.raises(ValueError, match="from='x': must hold a GQA model, not mla"):
        require_convertible(config, model_config("mla"))
    stories = data_dir / "models" / "stories260K"
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tok512.bin"):  # no weights
        (tmp_path / "model" / name).write_bytes((stories / name).read_bytes())
    with pytest.raises(ValueError, match="rows=1: must be at least"):
        main(ConvertConfig(str(tmp_path / "model"), str(tmp_path / "out"), tokenizer="tok512.bin", cache_ratio=2.0,
                           calibration=("c",), rows=1, context=8))


def test_what_is_refused() -> None:
    c, text = compiled(model_config("gqa")), np.asarray(TEXT)
    with pytest.raises(ValueError, match="calibration=9: must have at least 2 N C = 112 tokens"):
        reduce_gqa(c.config, c.params, text[:1, :9], target="mfa", width=14)
    with pytest.raises(ValueError, match="width=16: must be even and in 2 .. 15"):
        reduce_gqa(c.config, c.params, text, target="mfa", width=16)
    alibi = dataclasses.replace(c.config, position=PositionConfig(kind="alibi"))
    with pytest.raises(NotImplementedError, match="position='alibi'"):
        reduce_gqa(alibi, c.params, text, target="mfa", width=8)
    with pytest.raises(ValueError, match="cache_ratio=17.0: leaves 1.88235 elements"):
        width_of(c.config, "mfa_kr", 17.0)
    assert (width_of(c.config, "mfa", 2.0), width_of(c.config, "mfa_kr", 1.5)) == (8, 20)
    for options, message in (({"cache_ratio": 0.5}, "cache_ratio=0.5"), ({"cache_ratio": 2.0}, "calibration=None"),
                             ({"rows": 0}, "rows=0"), ({"context": 1}, "context=1"), ({"ridge": -1.0}, "ridge=-1.0"),
                             ({"ridge": 0.5}, "ridge=0.5: must be left out: method='commuting' at cache_ratio=1 "),
                             ({"calibration": ("x",)}, "calibration=.*must be left out")):
        with pytest.raises(ValueError, match=message):
            ConvertConfig("a", "b", **options)
