"""Rope against complex numbers in float64, its scalings against published numbers, ALiBi's slopes by hand."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mfa_jax.config import RopeScaling
from mfa_jax.positions import alibi_slopes, rope_frequencies, rope_magnitude, rope_table, rotate

# Frequencies and magnitude for head width 16, computed by `ROPE_INIT_FUNCTIONS` of transformers 5.23.0 (float32).
TRANSFORMERS = {
    "linear": (1e4, RopeScaling("linear", factor=4.0), 1.0,
               [0.25, 0.079056941, 0.025, 0.00790569466, 0.0025, 0.000790569466, 0.00025, 7.90569466e-05]),
    "llama3": (5e5, RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0), 1.0,
               [1.0, 0.193922758, 0.0376060307, 0.00729266508, 0.000524846022, 3.42810235e-05, 6.64786967e-06,
                1.28917316e-06]),
    "yarn": (1e4, RopeScaling("yarn", 16.0, 4096), 1.2772588722239782,
             [1.0, 0.316227764, 0.1, 0.0242111888, 0.0053125, 0.000938801211, 6.25e-05, 1.97642366e-05]),
    "yarn with its own betas": (
        1e6, RopeScaling("yarn", 4.0, 32768, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25), 1.25,
        [1.0, 0.177827939, 0.0316227786, 0.00562341325, 0.000625, 4.44569851e-05, 7.90569356e-06, 1.40585337e-06]),
}


def test_frequencies_by_hand() -> None:
    found = rope_frequencies(8, 10000.0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [1.0, 0.1, 0.01, 0.001], rtol=1e-7)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_scaled_frequencies_are_those_of_transformers(name: str) -> None:
    base, scaling, magnitude, frequencies = TRANSFORMERS[name]
    np.testing.assert_allclose(rope_frequencies(16, base, scaling), frequencies, rtol=1e-6)
    assert math.isclose(rope_magnitude(scaling), magnitude, rel_tol=1e-12)


def test_llama3_by_hand() -> None:
    """A context of 628 = 200 pi: 100 turns over it are left alone, 1 is stretched, 10 (4 < 10 < 40) is between."""
    scaling = RopeScaling("llama3", factor=5.0, original_max_positions=628, low_freq_factor=4.0, high_freq_factor=40.0)
    found = rope_frequencies(6, 1000.0, scaling)  # 1, 0.1, 0.01 radians per position
    keep = (628 * 0.1 / (2 * math.pi) - 4) / (40 - 4)
    np.testing.assert_allclose(found, [1.0, keep * 0.1 + (1 - keep) * 0.1 / 5, 0.01 / 5], rtol=1e-6)


def test_magnitude_is_one_but_for_yarn() -> None:
    assert rope_magnitude(None) == rope_magnitude(TRANSFORMERS["llama3"][1]) == 1.0


def test_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="width=7"):
        rope_frequencies(7, 10000.0)


def test_rotation_is_complex_multiplication() -> None:
    """Elements j and j + W/2 are the real and imaginary part of a number that turns by position * inv_freq[j]."""
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 5, 8)), np.array([[0, 1, 2, 3, 4], [7, 900, 1000, 2047, 3]])
    inv_freq = rope_frequencies(8, 10000.0)
    turned = (x[..., :4] + 1j * x[..., 4:]) * 1.5 * np.exp(1j * positions[..., None] * inv_freq.astype(np.float64))
    found = rotate(jnp.asarray(x, jnp.float32), *rope_table(jnp.asarray(positions), jnp.asarray(inv_freq), 1.5))
    assert found.dtype == jnp.float32
    # An angle near 2047 is known to half a unit in its last place, 6e-5 radians; so are the smaller ones, and better.
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), atol=4e-4)
    np.testing.assert_allclose(found[0], np.concatenate([turned.real, turned.imag], -1)[0], atol=3e-6)


def test_bfloat16_stays_bfloat16_and_turns_in_float32() -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 8)), jnp.bfloat16)
    table = rope_table(jnp.array([100, 101, 102]), jnp.asarray(rope_frequencies(8, 10000.0)))
    found = rotate(x, *table)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, rotate(x.astype(jnp.float32), *table).astype(jnp.bfloat16))


def test_a_score_depends_on_the_distance_alone() -> None:
    rng = np.random.default_rng(2)
    q, k = (jnp.asarray(rng.standard_normal(16), jnp.float32) for _ in range(2))
    inv_freq = jnp.asarray(rope_frequencies(16, 10000.0))

    def score(i: int, j: int) -> float:
        cos, sin = rope_table(jnp.array([i, j]), inv_freq)
        return float(rotate(q, cos[0], sin[0]) @ rotate(k, cos[1], sin[1]))

    assert math.isclose(score(7, 3), score(104, 100), abs_tol=1e-4)
    assert math.isclose(score(5, 5), float(q @ k), abs_tol=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_alibi_slopes_by_hand() -> None:
    """Press et al., section 3: 1/2, 1/4, .. 1/256 for 8 heads; then every other one of 16 heads, from 2 ** -0.5."""
    eight = [2.0**-n for n in range(1, 9)]
    np.testing.assert_array_equal(alibi_slopes(8), np.float32(eight))
    np.testing.assert_allclose(alibi_slopes(16)[:2], [0.70710678, 0.5], rtol=1e-7)
    np.testing.assert_allclose(alibi_slopes(12), [*eight, 0.70710678, 0.35355339, 0.17677670, 0.08838835], rtol=1e-6)
    np.testing.assert_array_equal(alibi_slopes(1), np.float32([2.0**-8]))
