"""Attention maps are those of the queries and keys that the modules hand to `attend`."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import ATTENTION, ENCODINGS, T, compiled, model_config, tokens

from mfa_jax.attention.core import attend
from mfa_jax.attention_maps import attention_maps
from mfa_jax.config import PositionConfig, RopeScaling
from mfa_jax.model.transformer import Transformer, unstack_layers
from mfa_jax.presets import with_experts


def of_modules_and_ours(c: Any, rows: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """For every layer: maps of what its module gives to `attend`, and those of `attention_maps`."""
    found = []

    def recording(q: Any, k: Any, v: Any, *, scale: float, alibi_slopes: Any, **options: Any) -> Any:
        keys = jnp.repeat(k if k.ndim == 4 else k[:, None], q.shape[2] // (k.shape[1] if k.ndim == 4 else 1), axis=1)
        scores = scale * jnp.einsum("btnh,bnsh->bnts", q, keys)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[:, None, None] * (jnp.arange(T)[:, None] - jnp.arange(T))
        weights = jnp.exp(scores) * jnp.tri(T)
        found.append(weights / weights.sum(-1, keepdims=True))
        return attend(q, k, v, scale=scale, alibi_slopes=alibi_slopes, **options)

    kind, layers = c.config.attention.kind, range(c.config.num_layers)
    unrolled = Transformer(c.config, scan_layers=False)

    def both(params: Any) -> tuple[list[Any], list[Any]]:
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[f"mfa_jax.attention.{kind}"], "attend", recording)
            unrolled.apply({"params": unstack_layers(params, c.config.num_layers)}, rows)
        return found, [attention_maps(c.model, params, rows, layer) for layer in layers]

    return jax.jit(both)(c.params)


@pytest.mark.parametrize(("variant", "encoding"), [
    *((variant, "rope") for variant in ATTENTION), *(("mla", encoding) for encoding in ENCODINGS[1:])])
def test_maps_are_those_of_the_modules(variant: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c = compiled(model_config(variant, encoding))
    expected, got = of_modules_and_ours(c, tokens(), monkeypatch)
    chex.assert_trees_all_close(got, expected, atol=1e-5)
    assert len(expected) == c.config.num_layers
    assert np.abs(expected[0] - expected[1]).max() > 0.01


@pytest.mark.parametrize("variant", ["mla", "mfa_kr"])
def test_stretched_frequencies_of_each_layer_no_inner_norms_and_experts(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = dataclasses.replace(ATTENTION[variant], **{"mla": {"query_rank": None},
                                                           "mfa_kr": {"query_norm": False}}[variant])
    scaling = RopeScaling(kind="yarn", factor=4, original_max_positions=16)
    own = tuple(tuple((layer + 1) / 2**j for j in range(attention.rotated_dim // 2)) for layer in range(2))
    c = compiled(with_experts(model_config(variant, attention=attention, inv_freq=own,
                                           position=PositionConfig(base=100.0, scaling=scaling))))
    expected, got = of_modules_and_ours(c, tokens(), monkeypatch)
    chex.assert_trees_all_close(got, expected, atol=1e-5)


def test_bfloat16_gives_float32_rows_that_sum_to_one_and_layers_are_named() -> None:
    c = compiled(model_config("mfa", dtype="bfloat16"))
    got = jax.jit(lambda p, t: attention_maps(c.model, p, t, 1))(c.params, tokens())
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got.sum(-1)), 1, atol=1e-6)
    with pytest.raises(ValueError, match=r"layer=2: must be in 0 \.\. 1"):
        attention_maps(c.model, c.params, tokens(), 2)
