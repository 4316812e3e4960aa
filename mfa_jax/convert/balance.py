"""One model, its widths scaled so that it trains: keys and values against the matrices that read them.

What a conversion finds leaves open how large keys and values are: a key times `s` and its query by `s` score the same.
Directions that come from covariances have entries of `S_k` hundreds of times those of `Q`, and an optimizer that moves
all entries by as much (Adam, Muon) ruins such a model at learning rates that suit any other. Here both have the same
root mean square for each pair that rope turns, and for each element of a value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mfa_jax.config import MFAConfig, MFAKRConfig, ModelConfig
from mfa_jax.convert.stacks import Stacks

_SMALLEST = 1e-12
"""Below it a mean square is that of a width which nothing writes or nothing reads: it stays as it is."""


def balanced(config: ModelConfig, params: Any, *, folder: Path | None = None) -> Any:
    """The parameters of an MFA or MFA-KR model that computes the same, to rounding; of others, as they are.

    Memory: the attention once more, unless there is a folder, and one layer's in float64.

    Args:
      params: layers stacked.
      folder: where the new arrays lie, mapped from files without a name; None for memory.
    """
    a = config.attention
    if not isinstance(a, (MFAConfig, MFAKRConfig)):
        return params
    given = params["layers"]["attention"]
    names = [name for name in ("S_k", "S_v", "Q", "O", "N_kr") if name in given]
    new = Stacks(folder)
    for i in range(config.num_layers):
        wide = {name: np.array(given[name][i], np.float64) for name in names}
        _balance(wide, pairs=config.position.kind == "rope")
        new.append({name: wide[name].astype(given[name].dtype) for name in names})
    return {**params, "layers": {**params["layers"], "attention": {**given, **new.arrays()}}}


def _balance(layer: dict[str, np.ndarray], *, pairs: bool) -> None:
    """Scales one layer in place; the elements of a pair that rope turns alike, where `pairs`."""
    by_query, by_output = np.mean(layer["Q"] ** 2, axis=(0, 1)), np.mean(layer["O"] ** 2, axis=(0, 2))
    if "N_kr" in layer:
        keys = values = _scale(layer["S_k"], by_query + by_output, pairs)
        layer["N_kr"] *= values[:, None] / keys
    else:
        keys, values = _scale(layer["S_k"], by_query, pairs), _scale(layer["S_v"], by_output, False)
        layer["S_v"] *= values
    layer["S_k"] *= keys
    layer["Q"] /= keys
    layer["O"] /= values[:, None]


def _scale(S: np.ndarray, read: np.ndarray, pairs: bool) -> np.ndarray:
    """What each width of `S [D, C]` must be scaled by for its mean square to be that which reads it; `[C]`."""
    written = np.mean(S**2, axis=0)
    if pairs:  # half-split: elements j and j + C / 2
        written, read = (np.tile(np.add(*np.split(x, 2)), 2) for x in (written, read))
    used = (written > _SMALLEST) & (read > _SMALLEST)
    return np.where(used, np.where(used, read, 1) / np.where(used, written, 1), 1) ** 0.25
