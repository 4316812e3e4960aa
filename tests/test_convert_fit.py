"""The refit from normal equations against dense least squares over all tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mfa_jax.convert.fit import NormalEquations, fitted

TOKENS, N, R, KH, V, D = 400, 3, 4, 6, 3, 5
"""R elements are the keys', KH the values', of which V directions are kept."""


def make(reused: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {
        "averages": rng.normal(size=(TOKENS, N, reused + KH)), "wanted": rng.normal(size=(TOKENS, D)),
        "weights": rng.uniform(0.5, 2, TOKENS), "Z": rng.normal(size=(KH, V)),
        "O": rng.normal(size=(N, reused + V, D))}
    found["equations"] = NormalEquations(N, reused + KH, D)
    for rows in (slice(0, 150), slice(150, None)):
        found["equations"].add(*(found[name][rows] for name in ("averages", "wanted", "weights")))
    return found


def whole(Z: np.ndarray, reused: int) -> np.ndarray:
    return np.block([[np.eye(reused), np.zeros((reused, V))], [np.zeros((KH, reused)), Z]])


def error(given: dict[str, Any], Z: np.ndarray, O: np.ndarray) -> float:
    found = np.einsum("tna,ac,ncd->td", given["averages"], whole(Z, O.shape[1] - V), O)
    return float(np.sum(np.square((found - given["wanted"]) * given["weights"][:, None])))


@pytest.mark.parametrize("reused", [0, R])
def test_outputs_are_those_of_ridge_regression(reused: int) -> None:
    g, ridge = make(reused), 0.1
    E = whole(g["Z"], reused)
    x = np.einsum("tna,ac->tnc", g["averages"], E).reshape(TOKENS, -1) * g["weights"][:, None]
    y = g["wanted"] * g["weights"][:, None] - x @ g["O"].reshape(-1, D)
    penalty = np.sqrt(ridge * np.sum(x**2) / x.shape[1])
    step = np.linalg.lstsq(np.vstack([x, penalty * np.eye(x.shape[1])]), np.vstack([y, np.zeros((x.shape[1], D))]))[0]
    np.testing.assert_allclose(g["equations"].outputs(E, g["O"], ridge).reshape(-1, D), g["O"].reshape(-1, D) + step,
                               atol=1e-5)


@pytest.mark.parametrize("reused", [0, R])
def test_values_converge_to_least_squares(reused: int) -> None:
    g = make(reused)
    own = g["O"][:, reused:]
    design = np.einsum("tna,ncd->tdac", g["averages"][:, :, reused:], own).reshape(TOKENS * D, -1)
    keys = np.einsum("tna,nad->td", g["averages"][:, :, :reused], g["O"][:, :reused])
    weights = np.repeat(g["weights"], D)
    exact = np.linalg.lstsq(design * weights[:, None], (g["wanted"] - keys).reshape(-1) * weights)[0].reshape(KH, V)
    Z = g["Z"]
    for _ in range(8):
        Z = g["equations"].values(Z, g["O"], 0.0)
    np.testing.assert_allclose(Z, exact, atol=1e-4)


@pytest.mark.parametrize("reused", [0, R])
def test_each_round_lowers_the_error(reused: int) -> None:
    g = make(reused)
    errors = [error(g, *fitted(g["equations"], g["Z"], g["O"], ridge=1e-3, rounds=rounds)) for rounds in (0, 1, 2, 4)]
    assert error(g, g["Z"], g["O"]) > errors[0] > errors[1] > errors[2] > errors[3]


def test_no_values_besides_the_keys() -> None:
    g = make(R)
    Z, O = fitted(g["equations"], np.zeros((KH, 0)), g["O"][:, :R], ridge=1e-3, rounds=2)
    assert Z.shape == (KH, 0) and O.shape == (N, R, D)
