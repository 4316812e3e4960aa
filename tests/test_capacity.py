"""The closed forms against hand-computed numbers and the printed digits of both papers."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest

from experiments import capacity as command
from experiments import published_numbers
from experiments.published_numbers import report
from mfa_jax import capacity
from mfa_jax.config import AttentionConfig, GQAConfig, MFAConfig, MFAKRConfig, MLAConfig, ModelConfig
from mfa_jax.presets import published

GQA = GQAConfig(num_heads=6, num_kv_heads=2, head_dim=4)
GQA_FULL = GQAConfig(num_heads=6, num_kv_heads=2, head_dim=4, qkv_bias=True, qk_norm=True)
MLA = MLAConfig(num_heads=3, nope_dim=4, rope_dim=2, value_dim=5, latent_dim=7)
MLA_QUERY = MLAConfig(num_heads=3, nope_dim=4, rope_dim=2, value_dim=5, latent_dim=7, query_rank=11)
MFA = MFAConfig(num_heads=3, latent_dim=8, query_rank=6)
MFA_PLAIN = MFAConfig(num_heads=3, latent_dim=8, query_rank=6, query_norm=False)
MFA_KR = MFAKRConfig(num_heads=3, latent_dim=8, query_rank=6)

# Model width 10. By hand, in the order of the modules' parameters.
PARAMETERS = [
    (GQA, 240 + 80 + 80 + 240),
    (GQA_FULL, 240 + 80 + 80 + 240 + 24 + 8 + 8 + 4 + 4),
    (MLA, 70 + 20 + 7 + 84 + 105 + 150 + 180),
    (MLA_QUERY, 70 + 20 + 7 + 84 + 105 + 150 + 110 + 11 + 198),
    (MFA, 60 + 6 + 144 + 80 + 80 + 240),
    (MFA_PLAIN, 60 + 144 + 80 + 80 + 240),
    (MFA_KR, 60 + 6 + 144 + 80 + 8 + 64 + 240),
]


@pytest.mark.parametrize(("attention", "expected"), PARAMETERS)
def test_attention_parameters(attention: AttentionConfig, expected: int) -> None:
    assert capacity.attention_parameters(attention, 10) == expected


@pytest.mark.parametrize(
    ("attention", "cached", "flops_per_position", "projections", "frh", "slsd", "ter"),
    [
        (GQA, 16, 4 * 6 * 4, 2 * 640, 4, 8, 24),
        (GQA_FULL, 16, 4 * 6 * 4, 2 * 640, 4, 8, 24),
        (MLA, 9, 4 * 3 * 9, 2 * (70 + 20 + 84 + 105 + 150 + 180), 4, 7, 12),
        (MFA, 16, 4 * 3 * 8, 2 * (60 + 144 + 80 + 80 + 240), 6, 8, 18),
        (MFA_KR, 8, 4 * 3 * 8, 2 * (60 + 144 + 80 + 240 + 3 * 64), 6, 8, 18),
    ],
)
def test_measures_of_a_layer(
    attention: AttentionConfig, cached: int, flops_per_position: int, projections: int, frh: int, slsd: int, ter: int
) -> None:
    assert capacity.cache_elements_per_token(attention) == cached
    assert capacity.attention_flops(attention, context=1) == flops_per_position
    assert capacity.attention_flops(attention, context=13) == 13 * flops_per_position
    assert capacity.projection_flops(attention, 10) == projections
    assert capacity.factorization_rank_per_head(attention) == frh
    assert capacity.shared_latent_subspace_dimension(attention) == slsd
    assert capacity.total_effective_rank(attention) == ter


def test_a_narrow_query_latent_bounds_the_rank_of_a_head() -> None:
    narrow = MLAConfig(num_heads=3, nope_dim=4, rope_dim=2, value_dim=5, latent_dim=7, query_rank=3)
    assert capacity.factorization_rank_per_head(narrow) == 3
    assert capacity.factorization_rank_per_head(MFAConfig(latent_dim=8, query_rank=16)) == 8


@pytest.mark.parametrize(
    ("dtype", "width"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("float8_e4m3fn", 1), ("int8", 1)]
)
def test_cache_bytes(dtype: str, width: int) -> None:
    assert capacity.cache_bytes_per_token(MFA, num_layers=5, cache_dtype=dtype) == 5 * 16 * width


@pytest.mark.parametrize("tied", [True, False])
def test_model_parameters(tied: bool) -> None:
    model = ModelConfig(vocab_size=11, num_layers=3, model_dim=10, ffn_dim=7, attention=MFA, tie_embeddings=tied)
    count = capacity.model_parameters(model)
    assert count.embedding == (110 if tied else 220)
    assert count.non_embedding == 3 * (610 + 20 + 210) + 10
    assert count.total == count.embedding + count.non_embedding


@pytest.mark.parametrize(
    ("attention", "matrices", "widths"),
    [(GQA, 640, 8), (GQA_FULL, 640, 8), (MLA, 609, 6 + 5), (MFA, 604, 16), (MFA_KR, 588, 16)],
)
def test_training_flops(attention: AttentionConfig, matrices: int, widths: int) -> None:
    model = ModelConfig(vocab_size=11, num_layers=3, model_dim=10, ffn_dim=7, attention=attention)
    # A row of 5 tokens by brute force: 2 FLOPs a product forward, twice that backward, keys up to the query.
    pairs = sum(query + 1 for query in range(5))
    attention_of_row = 3 * 2 * 3 * attention.num_heads * widths * pairs
    weights_of_row = 3 * 2 * 5 * (3 * (matrices + 3 * 10 * 7) + 11 * 10)
    assert 5 * capacity.training_flops_per_token(model, 5) == weights_of_row + attention_of_row


@pytest.mark.parametrize("row", list(published_numbers.rows()), ids=lambda row: f"{row.model} {row.quantity}")
def test_published_numbers_come_out_as_printed(row: published_numbers.Row) -> None:
    assert row.ours == row.printed


def test_what_the_papers_7b_family_saves_exactly() -> None:
    mha, mla, mfa, mfa_kr = (
        report(f"paper-7b-{v}", cache_dtype="bfloat16").cache_bytes_per_token for v in ("mha", "mla", "mfa", "mfa-kr")
    )
    assert mla == 24 * 1152 * 2
    assert (1 - mfa / mha, 1 - mfa_kr / mha) == (0.875, 0.9375)


def test_intensity_and_rank_do_not_depend_on_the_context() -> None:
    for name in published:
        short, long = report(name, 1), report(name, 32768)
        assert (short.arithmetic_intensity, short.ter) == (long.arithmetic_intensity, long.ter)


def test_the_page_of_published_numbers_fails_where_one_does_not_come_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published_numbers.main()
    assert "196.6" in capsys.readouterr().out
    other = dataclasses.replace(published["step3"], num_layers=60)
    monkeypatch.setitem(published_numbers.published, "step3", other)
    with pytest.raises(ValueError, match="step3 bytes read, 8192 tokens.*must come out as printed"):
        published_numbers.main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_dtype": "int7"}, "cache_dtype='int7': must be one of float32"),
        ({"context": 0}, "context=0: must be at least 1"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"model_dim": -1}, "model_dim=-1"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments = {"model_dim": 10, "num_layers": 1, "context": 1, "cache_dtype": "int8"} | change
    with pytest.raises(ValueError, match=message):
        capacity.analyse(MFA, **arguments)  # type: ignore[arg-type]


# ---- the command -----------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["capacity", *arguments])
    command.main()


def test_one_model_prints_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "--model", "step3", "--context", "8192", "--cache-dtype", "int8", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found.items() >= {
        "model": "step3", "context": 8192, "cache_dtype": "int8", "layers": 61, "heads": 64, "frh": 256, "slsd": 256,
        "ter": 16384, "arithmetic_intensity": 128.0, "parameters_per_layer": 169347072,
        "cache_bytes_per_token": 61 * 512, "bytes_read_per_decoded_token": 61 * 512 * 8192,
        "attention_flops": 61 * 4 * 64 * 256 * 8192, "projection_flops": 61 * 2 * (169347072 - 2048),
    }.items()


def test_several_models_are_keyed_and_a_config_is_overridden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "saved.json"
    config.write_text('{"model": ["step3"], "context": 100, "json": true}')
    call(monkeypatch, "--config", str(config))
    assert json.loads(capsys.readouterr().out)["context"] == 100
    call(monkeypatch, "--config", str(config), "--model", "kimi-k2", "--model", "tiny-mfa-kr", "--context", "7")
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["kimi-k2", "tiny-mfa-kr"]
    assert {r["context"] for r in found.values()} == {7}


def test_table_fits_80_columns_uncut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    call(monkeypatch, "--model", "all", "--cache-dtype", "int8", "--context", "131072")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows.keys() >= published.keys()
    assert rows["step3"] == "61 64 256 256 16384 169M 31.2k 4.09G 524G 20.7G 128".split()


@pytest.mark.parametrize(("value", "text"), [(2, "2"), (999.6, "1k"), (16384, "16.4k"), (2.5e12, "2.5T")])
def test_units(value: float, text: str) -> None:
    assert command._si(value) == text


def test_plot_is_written_and_its_errors_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "plot.png"
    call(monkeypatch, "--model", "step3", "--model", "small-mha", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="cannot be written"):
        call(monkeypatch, "--model", "step3", "--plot", str(tmp_path / "missing" / "plot.png"))
    with pytest.raises(ValueError, match=r"plot='x\.gif': must end in"):
        call(monkeypatch, "--model", "step3", "--plot", "x.gif")


def test_unknown_model_lists_what_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"model='step4': must be one of step3.*base-mfa-kr"):
        call(monkeypatch, "--model", "step4")


def test_bad_flags_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, message in ((("--modle", "step3"), "--modle: unknown argument, did you mean --model"),
                           (("--context", "many"), "--context: invalid literal")):
        with pytest.raises(ValueError, match=message) as error:
            call(monkeypatch, *flags)
        assert "\n" not in str(error.value)


def test_shapes_agree_with_counts() -> None:
    for attention, expected in PARAMETERS:
        assert sum(map(math.prod, capacity.parameter_shapes(attention, 10).values())) == expected
