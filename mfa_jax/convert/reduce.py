"""GQA as MFA-KR or MFA with a smaller cache: what is kept of keys and values, and how the rest is made up for.

*Keys.* The directions of `directions.rank_keys`, by what they do to scores. All pairs of all frequencies are pooled,
and the largest kept: a layer has its own frequencies.

*Values.* What attention reads is averaged over tokens, so values are measured by the second moment of those averages,
and in the metric of the output projections that read them, `M = sum_n O_n O_n^T`. MFA keeps the largest directions.
MFA-KR takes from the kept keys what of the value is linear in them, and adds the largest directions of the rest as
elements with frequency zero that queries do not look at. How many of its C elements are keys is chosen by layer, by the
error of the layer's output on some of the calibration text.

*Refit.* Layer by layer, on the activations of the converted model, `O` is fitted by ridge regression so that the
stream after attention is the original's.

Sources: the commuting maps are ours; TransMLA (Meng et al., arXiv 2502.07864) reduces with real ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mfa_jax.config import MFAConfig, MFAKRConfig, ModelConfig, to_dict
from mfa_jax.convert import activations
from mfa_jax.convert.directions import (
    Keys,
    Moments,
    Reduced,
    first,
    output_metric,
    rank_keys,
    with_reused_keys,
    with_values,
)
from mfa_jax.convert.exact import Layer, factor_queries, frequencies_of, rebuilt
from mfa_jax.convert.layerwise import LayerReport, Layerwise, Streams, require_reducible

_PROBED_ROWS = 2
_SPLITS = 8


def reduce_gqa(
    config: ModelConfig, params: Any, tokens: np.ndarray, *, target: Literal["mfa", "mfa_kr"], width: int,
    ridge: float = 1e-2, folder: Path | None = None, on_layer: Callable[[LayerReport], None] = lambda report: None,
) -> tuple[ModelConfig, Any, list[LayerReport]]:
    """A GQA model as MFA or MFA-KR with C = `width`: `2 C` or `C` cached elements a token and layer.

    Memory: the streams of the calibration text; of one layer its matrices, what its heads yield on that text, `[rows T,
    N C]` in float32, and two `[N C, N C]` in float64.

    Args:
      tokens: calibration text `[rows, T]`.
      ridge: of the refit, as a share of the mean square of the features.
      folder: keeps what is done, layer by layer; the same call goes on with it after an interruption. The new arrays
        are mapped from files there. None for none, and memory.
      on_layer: is told of each layer.

    Raises:
      ValueError: not a GQA model; a folder of another conversion; a width that is odd or no reduction; a calibration
        text with fewer tokens than twice the rows of `O`.
      NotImplementedError: biases, norms of heads, or an encoding other than rope.
    """
    a = require_reducible(config, tokens, target, width)
    widths: dict[str, Any] = {"num_heads": a.num_heads, "latent_dim": width, "query_rank": config.model_dim,
                              "query_norm": False, "norm_eps": config.norm_eps}
    attention = MFAConfig(**widths) if target == "mfa" else MFAKRConfig(**widths, alpha_init=1.0)
    walk = Layerwise(config, params, tokens, _Reducer(config, attention, ridge), streams=("original", "converted"),
                     settings={"attention": to_dict(attention), "method": "commuting", "ridge": ridge}, folder=folder,
                     on_layer=on_layer)
    new, converted = rebuilt(config, params, attention, walk.convert, folder)
    return new, converted, walk.reports


class _Reducer:
    """How one layer is converted; the streams are of the original and of the converted model."""

    def __init__(self, config: ModelConfig, attention: MFAConfig | MFAKRConfig, ridge: float) -> None:
        self.config, self.attention, self.ridge = config, attention, ridge
        found = frequencies_of(config)
        assert found is not None
        self.frequencies = found

    def __call__(self, layer: Layer, i: int, streams: Streams) -> tuple[Layer, LayerReport]:
        original, converted = streams["original"], streams["converted"]
        moments, output = activations.observe(self.config, layer, self.frequencies[i], original)
        pairs = rank_keys(layer, self.frequencies[i], moments, original.shape[1])
        reduced = self._choose(layer, moments, pairs, original, output)
        original += output
        reduced, before, after = self._refit(reduced, original, converted)
        scale = float(np.mean(np.square(output, dtype=np.float64)))
        report = LayerReport(i, 2 * int(np.count_nonzero(reduced.keys.inv_freq)), before / scale, after / scale)
        new = reduced.layer()
        new["S_q"], new["Q"] = factor_queries(new.pop("W"), self.attention.query_rank)
        if self.attention.kind == "mfa_kr":
            del new["S_v"]
            C = self.attention.latent_dim
            new |= {"alpha": np.ones(C), "N_kr": np.zeros((C, C))}
        return new, report

    def _choose(
        self, layer: Layer, moments: Moments, pairs: Keys, stream: np.ndarray, output: np.ndarray
    ) -> Reduced:
        C, metric = self.attention.latent_dim, output_metric(layer)
        if self.attention.kind == "mfa":
            return with_values(layer, first(pairs, C // 2), C, moments.read, metric)
        most = min(C, pairs.S_k.shape[1])
        counts = sorted({2 * round(most * (s + 1) / _SPLITS / 2) for s in range(_SPLITS)} - {0})
        # Values have K H directions, so that fewer keys would not fill C.
        counts = [count for count in counts if C - count <= len(metric)]
        candidates = [with_reused_keys(layer, first(pairs, count // 2), C, moments.read, metric) for count in counts]
        rows = slice(0, _PROBED_ROWS)
        errors = [activations.misses(activations.output_of(self.config, new, stream[rows]), output[rows])
                  for new in candidates]
        return candidates[int(np.argmin(errors))]

    def _refit(
        self, reduced: Reduced, original: np.ndarray, converted: np.ndarray
    ) -> tuple[Reduced, float, float]:
        """With `O` of the ridge regression towards the one there is; moves the converted stream past attention.

        Returns:
          the layer, and the mean square of what the stream misses, before and after.
        """
        D = original.shape[-1]
        features = activations.features(self.config, reduced, converted)
        missing = (original - converted).reshape(-1, D) - features @ reduced.O.reshape(-1, D).astype(np.float32)
        gram = (features.T @ features).astype(np.float64)
        gram[np.diag_indices(len(gram))] += self.ridge * np.trace(gram) / len(gram)
        step = np.linalg.solve(gram, (features.T @ missing).astype(np.float64))
        left = missing - features @ step.astype(np.float32)
        converted[:] = original - left.reshape(original.shape)
        before, after = (float(np.mean(np.square(x, dtype=np.float64))) for x in (missing, left))
        return dataclasses.replace(reduced, O=reduced.O + step.reshape(reduced.O.shape)), before, after
