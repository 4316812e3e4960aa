"""One model, its widths scaled so that it trains: keys and values against the matrices that read them.

What a conversion finds leaves open how large keys and values are: a key times `s` and its query by `s` score the same.
Directions that come from covariances have entries of `S_k` hundreds of times those of `Q`, and an optimizer that moves
all entries by as much (Adam, Muon) ruins such a model at learning rates that suit any other. Here both have the same
root mean square for each pair that rope turns, and for each element of a value.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mfa_jax.config import MFAConfig, MFAKRConfig, ModelConfig

_SMALLEST = 1e-12
"""Below it a mean square is that of a width which nothing writes or nothing reads: it stays as it is."""


def balanced(config: ModelConfig, params: Any) -> Any:
    """The parameters of an MFA or MFA-KR model that computes the same, to rounding; of others, as they are.

    Args:
      params: layers stacked.
    """
    a = config.attention
    if not isinstance(a, (MFAConfig, MFAKRConfig)):
        return params
    given = params["layers"]["attention"]
    names = [name for name in ("S_k", "S_v", "Q", "O", "N_kr") if name in given]
    wide = {name: np.asarray(given[name], np.float64) for name in names}
    by_query, by_output = (np.mean(wide["Q"] ** 2, axis=(1, 2)), np.mean(wide["O"] ** 2, axis=(1, 3)))
    if a.kind == "mfa_kr":
        keys = values = _by_pair(_scale(_by_column(wide["S_k"]), by_query + by_output, pairs=True))
        wide["N_kr"] *= values[:, :, None] / keys[:, None]
    else:
        keys = _by_pair(_scale(_by_column(wide["S_k"]), by_query, pairs=True))
        values = _scale(_by_column(wide["S_v"]), by_output, pairs=False)
        wide["S_v"] *= values[:, None]
    wide["S_k"] *= keys[:, None]
    wide["Q"] /= keys[:, None, None]
    wide["O"] /= values[:, None, :, None]
    attention = {**given, **{name: leaf.astype(given[name].dtype) for name, leaf in wide.items()}}
    return {**params, "layers": {**params["layers"], "attention": attention}}


def _by_column(S: np.ndarray) -> np.ndarray:
    """`[L, D, C]` to the mean squares `[L, C]`."""
    return np.mean(S**2, axis=1)


def _scale(written: np.ndarray, read: np.ndarray, *, pairs: bool) -> np.ndarray:
    """What a width must be scaled by for both mean squares to be equal; `[L, C]`, or `[L, C / 2]` for pairs."""
    if pairs:
        written, read = (np.add(*np.split(x, 2, axis=1)) for x in (written, read))
    used = (written > _SMALLEST) & (read > _SMALLEST)
    return np.where(used, np.where(used, read, 1) / np.where(used, written, 1), 1) ** 0.25


def _by_pair(scale: np.ndarray) -> np.ndarray:
    """Half-split: elements j and j + C / 2 are a pair."""
    return np.concatenate([scale, scale], axis=1)
