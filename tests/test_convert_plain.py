"""The plain ways to a smaller cache: what they keep, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from etils import epath

from experiments.convert import ConvertConfig, main, pooled_heads
from mfa_jax.config import GQAConfig, ModelConfig
from mfa_jax.convert.directions import Moments, rank_keys
from mfa_jax.convert.plain import key_pca, mean_pool, rank_by_second_moment
from mfa_jax.data import ByteTokenizer
from mfa_jax.model.transformer import Transformer
from mfa_jax.train import processes
from mfa_jax.train.run import load_trained
from tests.contract import compiled, model_config, tokens

TEXT = np.asarray(tokens(9, (24, 32)))


def logits(config: ModelConfig, params: Any, ids: Any) -> np.ndarray:
    return np.asarray(jax.jit(Transformer(config).apply)({"params": params}, jnp.asarray(ids))[0], np.float64)


@pytest.mark.parametrize("variant", ["gqa", "gqa_bias_norm"])
def test_pooling_equal_heads_loses_nothing(variant: str) -> None:
    c = compiled(model_config(variant))
    attention = dict(c.params["layers"]["attention"])
    for name in {"W_K", "W_V", "b_K", "b_V"} & set(attention):
        attention[name] = jnp.repeat(attention[name][..., :1, :], 2, axis=-2)
    params = {**c.params, "layers": {**c.params["layers"], "attention": attention}}
    config, pooled = mean_pool(c.config, params, num_kv_heads=1)
    assert config.attention.num_kv_heads == 1
    np.testing.assert_allclose(logits(config, pooled, tokens()), logits(c.config, params, tokens()), rtol=0, atol=1e-5)


def test_pooled_is_the_mean_of_neighbours() -> None:
    wide = dataclasses.replace(model_config("gqa"), attention=GQAConfig(num_heads=8, num_kv_heads=4, head_dim=4))
    c = compiled(wide)
    _, pooled = mean_pool(c.config, c.params, num_kv_heads=2)
    given, found = (p["layers"]["attention"]["W_K"] for p in (c.params, pooled))
    np.testing.assert_allclose(found[:, :, 1], (given[:, :, 2] + given[:, :, 3]) / 2, rtol=1e-6)


def test_real_directions_score_as_before_but_need_more() -> None:
    """Two key heads: what differs by a real factor is one direction; what differs by a complex one is two."""
    rng = np.random.default_rng(0)
    D, N, H = 12, 4, 8
    first = rng.normal(size=(D, 4)) + 1j * rng.normal(size=(D, 4))
    inv_freq = 100.0 ** (-np.arange(4) / 4)
    left = {}
    for kind, factor in (("real", rng.normal(size=4)), ("complex", np.exp(1j * rng.uniform(1, 2, 4)))):
        W_K = np.stack([np.concatenate([k.real, k.imag], axis=1) for k in (first, first * factor)], axis=1)
        layer = {"W_Q": rng.normal(size=(D, N, H)), "W_K": W_K}
        keys = rank_by_second_moment(layer, inv_freq, np.eye(D))
        x, y = rng.normal(size=(2, D))
        turns = np.exp(1j * 5 * inv_freq)
        for n in range(N):
            q, k = (w[:4] + 1j * w[4:] for w in (x @ layer["W_Q"][:, n], y @ W_K[:, n // 2]))
            W, S = x @ keys.W[:, n], y @ keys.S_k
            found = np.sum((W[:8] + 1j * W[8:]) * np.exp(5j * keys.inv_freq) * (S[:8] - 1j * S[8:])).real
            np.testing.assert_allclose(found, np.sum((q * turns * k.conj()).real) * H**-0.5, rtol=1e-6)
        left[kind] = np.sum(keys.S_k[:, 4:8] ** 2 + keys.S_k[:, 12:] ** 2) / np.sum(keys.S_k**2)
        commuting = rank_keys(layer, inv_freq, Moments(np.eye(D), np.zeros(D), np.eye(D)), 16)
        assert np.abs(commuting.S_k[:, 4:8]).max() < 1e-6
    assert left["real"] < 1e-12 and left["complex"] > 0.05


def test_key_pca_converges_and_goes_on(tmp_path: Path) -> None:
    c = compiled(model_config("gqa"))
    expected, errors = logits(c.config, c.params, TEXT), []
    for width in (14, 10, 6):
        config, params, reports = key_pca(c.config, c.params, TEXT, width=width)
        assert (config.attention.kind, config.attention.latent_dim) == ("mfa", width)
        assert [(r.layer, r.key_elements) for r in reports] == [(0, width), (1, width)]
        errors.append(np.mean((logits(config, params, TEXT) - expected) ** 2) / np.mean(expected**2))
    assert errors[0] < errors[1] < errors[2] < 1 and errors[0] < 0.1

    def interrupt(report: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        key_pca(c.config, c.params, TEXT, width=6, folder=tmp_path / "half", on_layer=interrupt)
    seen: list[Any] = []
    _, again, found = key_pca(c.config, c.params, TEXT, width=6, folder=tmp_path / "half", on_layer=seen.append)
    assert [r.layer for r in seen] == [1] and found == reports
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_script(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stories = data_dir / "models" / "stories260K"
    (tmp_path / "text.txt").write_text("Once upon a time, there was a little girl who liked to play. " * 80)
    options: dict[str, Any] = {"source": str(stories), "tokenizer": "tok512.bin"}
    main(ConvertConfig(out=str(tmp_path / "pooled"), to="gqa", method="mean_pool", cache_ratio=2.0, **options))
    assert json.loads(capsys.readouterr().out)["cached_elements"] == [64, 32]
    assert load_trained(tmp_path / "pooled").model.config.attention.num_kv_heads == 2
    main(ConvertConfig(out=str(tmp_path / "pca"), to="mfa", method="key_pca", cache_ratio=2.0, rows=8, context=64,
                       calibration=(str(tmp_path / "text.txt"),), report=True, **options))
    *layers, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert last["cached_elements"] == [64, 32] and len(layers) == 5
    assert load_trained(tmp_path / "pca").model.config.attention.kind == "mfa"


def test_anothers_unfinished_layers_are_left_alone(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What keeps no layers resumes none and removes none; what keeps its own does both."""
    (tmp_path / "text.txt").write_text("Once upon a time, there was a little girl who liked to play. " * 80)
    out, kept = tmp_path / "out", tmp_path / "out.unfinished"
    options: dict[str, Any] = {"source": str(data_dir / "models" / "stories260K"), "tokenizer": "tok512.bin",
                               "out": str(out)}
    calibrated: dict[str, Any] = {**options, "to": "mfa", "method": "key_pca", "cache_ratio": 2.0, "rows": 8,
                                  "context": 64, "calibration": (str(tmp_path / "text.txt"),)}

    def interrupt(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("builtins.print", interrupt)
        main(ConvertConfig(**calibrated))
    with processes.sole_writer(epath.Path(kept)), pytest.raises(ValueError, match="unfinished': process .* writes"):
        main(ConvertConfig(**calibrated))
    whole = (kept / "state-0.npz").read_bytes()
    for damaged in (b"", whole[:-40], whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]):
        (kept / "state-0.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"folder='.*unfinished': state-0.npz is damaged .*; remove the fo"):
            main(ConvertConfig(**calibrated))
    (kept / "state-0.npz").write_bytes(whole)
    held = sorted(path.name for path in kept.iterdir())
    assert held == ["conversion.json", "layer-0.npz", "lock", "state-0.npz"]
    for plain in ({"to": "mfa"}, {"to": "gqa", "method": "mean_pool", "cache_ratio": 2.0}):
        main(ConvertConfig(**options, **plain))
        assert json.loads(capsys.readouterr().out)["resumed"] is False
        assert sorted(path.name for path in kept.iterdir()) == held
        shutil.rmtree(out)
    main(ConvertConfig(**calibrated))
    assert json.loads(capsys.readouterr().out)["resumed"] is True and not kept.exists()


def test_what_is_refused() -> None:
    c = compiled(model_config("gqa"))
    with pytest.raises(ValueError, match="num_kv_heads=3: must divide the 2 key heads"):
        mean_pool(c.config, c.params, num_kv_heads=3)
    with pytest.raises(ValueError, match="attention='mfa'"):
        mean_pool(compiled(model_config("mfa")).config, {}, num_kv_heads=1)
    with pytest.raises(ValueError, match="calibration=9: must have at least"):
        key_pca(c.config, c.params, TEXT[:1, :9], width=14)
    six = dataclasses.replace(c.config, attention=GQAConfig(num_heads=6, num_kv_heads=6, head_dim=8))
    with pytest.raises(ValueError, match=r"cache_ratio=1.5: mean_pool of 6 key heads must have one of 2, 3, 6"):
        pooled_heads(six, 1.5)
    one = dataclasses.replace(c.config, attention=GQAConfig(num_heads=6, num_kv_heads=1, head_dim=8))
    with pytest.raises(ValueError, match="none: there is one head"):
        pooled_heads(one, 2.0)
    with pytest.raises(ValueError, match="to='mfa_kr': must be mfa for method='key_pca'"):
        ConvertConfig("a", "b", method="key_pca", cache_ratio=2.0, calibration=("x",))
    with pytest.raises(ValueError, match="to='gqa': must be mfa or mfa_kr"):
        ConvertConfig("a", "b", to="gqa", cache_ratio=2.0, calibration=("x",))
    with pytest.raises(ValueError, match="cache_ratio=1.0: must be above 1 for method='mean_pool'"):
        ConvertConfig("a", "b", to="gqa", method="mean_pool")
    with pytest.raises(ValueError, match="calibration=.*must be left out: method='mean_pool' at cache_ratio=2 reads"):
        ConvertConfig("a", "b", to="gqa", method="mean_pool", cache_ratio=2.0, calibration=("nowhere.txt",))
    with pytest.raises(ValueError, match="ridge=5.0: must be left out: method='key_pca'"):
        ConvertConfig("a", "b", to="mfa", method="key_pca", cache_ratio=2.0, calibration=("x",), ridge=5.0)


def test_a_folder_without_a_tokenizer_names_the_flag(data_dir: Path, tmp_path: Path) -> None:
    stories = data_dir / "models" / "stories260K"
    with pytest.raises(ValueError, match=r"holds no tokenizer.json; name the tokenizer .*--tokenizer.*tok512.bin"):
        main(ConvertConfig(str(stories), str(tmp_path / "out")))
    with pytest.raises(ValueError, match=r"checkpoint='.*/nothing': no such folder or .gguf file"):
        main(ConvertConfig(str(tmp_path / "nothing"), str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


def test_another_models_tokenizer_is_refused(data_dir: Path, tmp_path: Path) -> None:
    """One that is too large, and one that fits but numbers its tokens otherwise."""
    stories = tmp_path / "stories"
    shutil.copytree(data_dir / "models" / "stories260K", stories)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little girl who liked to play. " * 80)
    options: dict[str, Any] = {"source": str(stories), "out": str(tmp_path / "out"), "to": "mfa", "cache_ratio": 2.0,
                               "rows": 8, "context": 64, "calibration": (str(text),)}
    ByteTokenizer().save(stories / "bytes")
    with pytest.raises(ValueError, match=r"tokenizer=.\d+\.\d\d nats a token.: .* a guess among vocab_size=512"):
        main(ConvertConfig(tokenizer="bytes", **options))
    words = {f"word{i}": i for i in range(600)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({**words, "</s>": 600}, "word0"))
    tokenizer.save(str(stories / "large.json"))
    with pytest.raises(ValueError, match="tokenizer.vocab_size=601: must be at most the model's vocab_size=512"):
        main(ConvertConfig(tokenizer="large.json", **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stories", "text.txt"]
