"""GQA as MFA-KR or MFA with a smaller cache: what is kept of keys and values, and how the rest is made up for.

*Keys.* Pair `j` of the K key heads is a vector of K complex numbers that rope turns by one angle, so that any complex
map of it commutes with rope: keys `A z` and queries `A^-H q` give the same scores. With `Sigma` the covariance of the
keys' pairs (what is common to all keys does not move a softmax) and `w_g` the mean square of the queries that read key
head g, the eigenvectors of `diag(w)^1/2 Sigma diag(w)^1/2` are the directions in the order of what they do to scores.
All pairs of all frequencies are pooled, and the largest kept: a layer has its own frequencies.

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
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mfa_jax.config import MFAConfig, MFAKRConfig, ModelConfig, require, to_dict
from mfa_jax.convert import activations
from mfa_jax.convert.exact import INV_FREQ, Layer, beside, factor_queries, frequencies_of, rebuilt, require_plain
from mfa_jax.convert.progress import Progress

_PROBED_ROWS = 2
_SPLITS = 8


@dataclasses.dataclass(frozen=True)
class Keys:
    """What is kept of a layer's keys, half-split; `P` pairs."""

    S_k: np.ndarray
    """[D, 2 P]"""
    W: np.ndarray
    """[D, N, 2 P], the queries, for a scale of one."""
    inv_freq: np.ndarray
    """[P]"""


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """How a layer was converted."""

    layer: int
    key_elements: int
    """Elements of the cached row that rope turns."""
    error: float
    """Mean square of what the stream after attention misses, over that of the attention's output; before the refit"""
    refitted_error: float
    """and after it, on the calibration text."""


def reduce_gqa(
    config: ModelConfig, params: Any, tokens: np.ndarray, *, target: Literal["mfa", "mfa_kr"], width: int,
    ridge: float = 1e-2, folder: Path | None = None, on_layer: Callable[[LayerReport], None] = lambda report: None,
) -> tuple[ModelConfig, Any, list[LayerReport]]:
    """A GQA model as MFA or MFA-KR with C = `width`: `2 C` or `C` cached elements a token and layer.

    Memory: the streams of the calibration text, and one layer's matrices.

    Args:
      tokens: calibration text `[rows, T]`.
      ridge: of the refit, as a share of the mean square of the features.
      folder: keeps what is done, layer by layer; the same call goes on with it after an interruption. None for none.
      on_layer: is told of each layer.

    Raises:
      ValueError: not a GQA model; a folder of another conversion; a width that is odd or no reduction; a calibration
        text with fewer tokens than twice the rows of `O`.
      NotImplementedError: biases, norms of heads, or an encoding other than rope.
    """
    a = require_plain(config)
    if config.position.kind != "rope":
        raise NotImplementedError(f"position={config.position.kind!r}: only models with rope are reduced; any can be "
                                  f"converted with as large a cache")
    full = a.num_kv_heads * a.head_dim * (2 if target == "mfa_kr" else 1)
    require(2 <= width < full and width % 2 == 0, "width", width, f"must be even and in 2 .. {full - 1}")
    require(tokens.size >= 2 * a.num_heads * width, "calibration", tokens.size,
            f"must have at least 2 N C = {2 * a.num_heads * width} tokens")
    widths: dict[str, Any] = {"num_heads": a.num_heads, "latent_dim": width, "query_rank": config.model_dim,
                              "query_norm": False, "norm_eps": config.norm_eps}
    attention = MFAConfig(**widths) if target == "mfa" else MFAKRConfig(**widths, alpha_init=1.0)
    progress = None
    if folder is not None:
        digest = hashlib.sha256(tokens.tobytes())
        for leaf in jax.tree.leaves(params):
            digest.update(np.asarray(leaf).tobytes())
        progress = Progress(folder, {"config": to_dict(config), "attention": to_dict(attention), "ridge": ridge,
                                     "tokens": list(tokens.shape), "digest": digest.hexdigest()})
    reducer = _Reducer(config, params, tokens, attention, ridge, progress, on_layer)
    new, converted = rebuilt(config, params, attention, reducer.convert)
    return new, converted, reducer.reports


class _Reducer:
    """The two streams, of the original and of the converted model, as the layers are converted in order."""

    def __init__(self, config: ModelConfig, params: Any, tokens: np.ndarray, attention: MFAConfig | MFAKRConfig,
                 ridge: float, progress: Progress | None, on_layer: Callable[[LayerReport], None]) -> None:
        self.config, self.layers, self.attention, self.ridge = config, params["layers"], attention, ridge
        found = frequencies_of(config)
        assert found is not None
        self.frequencies = found
        self.original = np.asarray(params["embed"], np.float32)[tokens]
        self.converted = self.original.copy()
        self.reports: list[LayerReport] = []
        self.progress, self.on_layer = progress, on_layer
        if progress is not None and progress.layers:
            state = progress.state()
            self.original, self.converted = state["original"], state["converted"]

    def convert(self, layer: Layer, i: int) -> Layer:
        """The new parameters of layer i; moves both streams past it, or takes both from an earlier call."""
        if self.progress is not None and i < self.progress.layers:
            new = self.progress.layer(i)
            self.reports.append(LayerReport(**json.loads(str(new.pop("report")))))
            return new
        new, report = self._convert(layer, i)
        self.reports.append(report)
        if self.progress is not None:
            self.progress.save({**new, "report": np.array(json.dumps(dataclasses.asdict(report)))},
                               {"original": self.original, "converted": self.converted})
        self.on_layer(report)
        return new

    def _convert(self, layer: Layer, i: int) -> tuple[Layer, LayerReport]:
        single = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in layer.items()}
        moments, output = activations.observe(self.config, single, jnp.asarray(self.frequencies[i]), self.original)
        pairs = rank_keys(layer, self.frequencies[i], moments, self.original.shape[1])
        new = self._choose(layer, moments, pairs, output)
        self.original += output
        new["O"], before, after = self._refit(new, float(np.mean(np.square(output, dtype=np.float64))))
        report = LayerReport(i, int(2 * np.count_nonzero(new[INV_FREQ])), before, after)
        params = {name: {key: jnp.asarray(leaf[i]) for key, leaf in self.layers[name].items()}
                  for name in ("ffn", "ffn_norm")}
        for stream in (self.original, self.converted):
            for rows in activations.batches(stream):
                stream[rows] = activations.feed_forward(self.config, params, stream[rows])
        new["S_q"], new["Q"] = factor_queries(new.pop("W"), self.attention.query_rank)
        if self.attention.kind == "mfa_kr":
            del new["S_v"]
            C = self.attention.latent_dim
            new |= {"alpha": np.ones(C), "N_kr": np.zeros((C, C))}
        return new, report

    def _choose(self, layer: Layer, moments: activations.Moments, pairs: Keys, output: np.ndarray) -> Layer:
        C = self.attention.latent_dim
        if self.attention.kind == "mfa":
            return with_values(layer, moments, first(pairs, C // 2), C)
        most = min(C, pairs.S_k.shape[1])
        counts = sorted({2 * round(most * (s + 1) / _SPLITS / 2) for s in range(_SPLITS)} - {0})
        candidates = [with_reused_keys(layer, moments, first(pairs, count // 2), C) for count in counts]
        rows = slice(0, _PROBED_ROWS)
        errors = [np.mean(np.square(self._features(new, self.original[rows]) @ new["O"].reshape(-1, new["O"].shape[-1])
                                    - output[rows].reshape(-1, output.shape[-1]))) for new in candidates]
        return candidates[int(np.argmin(errors))]

    def _features(self, new: Layer, stream: np.ndarray) -> np.ndarray:
        """What the heads yield, `[tokens, N C]`, of a stream before its norm."""
        given = [jnp.asarray(new[name], jnp.float32) for name in ("W", "S_k", "S_v", INV_FREQ)]
        found = [np.asarray(activations.heads(self.config, *given, activations.normed(
            stream[rows], self.config.norm_eps))) for rows in activations.batches(stream)]
        return np.concatenate(found).reshape(stream.shape[0] * stream.shape[1], -1)

    def _refit(self, new: Layer, scale: float) -> tuple[np.ndarray, float, float]:
        """`O` of the ridge regression towards the one there is; moves the converted stream past attention."""
        D = self.original.shape[-1]
        features, O = self._features(new, self.converted), new["O"].reshape(-1, D)
        missing = (self.original - self.converted).reshape(-1, D) - features @ O.astype(np.float32)
        gram = (features.T @ features).astype(np.float64)
        gram += self.ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        step = np.linalg.solve(gram, (features.T @ missing).astype(np.float64))
        left = missing - features @ step.astype(np.float32)
        self.converted = (self.original.reshape(-1, D) - left).reshape(self.original.shape)
        before, after = (float(np.mean(np.square(x, dtype=np.float64))) / scale for x in (missing, left))
        return (O + step).reshape(new["O"].shape), before, after


def rank_keys(layer: Layer, inv_freq: np.ndarray, moments: activations.Moments, context: int) -> Keys:
    """All pairs of all frequencies as directions, in the order of what they do to scores."""
    W_Q, W_K = layer["W_Q"], layer["W_K"]
    _, N, H = W_Q.shape
    K, half = W_K.shape[1], H // 2
    keys, queries = (W[..., :half] + 1j * W[..., half:] for W in (W_K, W_Q))
    # A constant key only moves a softmax as far as rope turns it: by its mean turn over the context it does not.
    turn = np.abs(np.exp(1j * np.arange(context)[:, None] * inv_freq).mean(0)) ** 2
    strength = np.einsum("dnj,de,enj->nj", queries.conj(), moments.tokens, queries, optimize=True).real
    weights = strength.reshape(K, N // K, half).sum(1)
    energies, columns, readers = [], [], []
    for j in range(half):
        A, constant = keys[:, :, j], moments.mean @ keys[:, :, j]
        sigma = A.T @ moments.tokens @ A.conj() - turn[j] * np.outer(constant, constant.conj())
        root = np.sqrt(np.maximum(weights[:, j], 1e-9 * weights.max()))
        values, vectors = np.linalg.eigh(root[:, None] * sigma * root)
        energies.append(values)
        columns.append(A @ (root[:, None] * vectors.conj()))
        back = np.repeat(vectors.conj() / root[:, None], N // K, axis=0)
        readers.append(queries[:, :, j, None] * back)
    order = np.argsort(-np.concatenate(energies), kind="stable")
    S, W = np.concatenate(columns, axis=1)[:, order], np.concatenate(readers, axis=2)[..., order]
    return Keys(np.concatenate([S.real, S.imag], axis=-1), np.concatenate([W.real, W.imag], axis=-1) * H**-0.5,
                np.repeat(inv_freq, K)[order])


def first(keys: Keys, pairs: int) -> Keys:
    """The first pairs of some keys."""
    def cut(x: np.ndarray) -> np.ndarray:
        return np.concatenate([part[..., :pairs] for part in np.split(x, 2, axis=-1)], axis=-1)

    return Keys(cut(keys.S_k), cut(keys.W), keys.inv_freq[:pairs])


def with_values(layer: Layer, moments: activations.Moments, keys: Keys, width: int) -> Layer:
    """An MFA layer: these keys, and the largest directions of the values."""
    S_v, decoder = _directions(layer, moments, layer["W_V"].reshape(len(moments.mean), -1), width)
    return {"W": keys.W * width**0.5, "S_k": keys.S_k, "S_v": S_v, "O": _outputs(layer, decoder),
            INV_FREQ: keys.inv_freq}


def with_reused_keys(layer: Layer, moments: activations.Moments, keys: Keys, width: int) -> Layer:
    """An MFA-KR layer: these keys, and the largest directions of what values are besides a linear map of them."""
    S, wanted = keys.S_k, layer["W_V"].reshape(len(moments.mean), -1)
    gram = S.T @ moments.read @ S
    gram += 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram))
    reuse = np.linalg.solve(gram, S.T @ moments.read @ wanted)
    more, decoder = _directions(layer, moments, wanted - S @ reuse, width - S.shape[1])
    S_k = beside(S, more)
    decoder = beside(reuse, decoder, axis=0)
    return {"W": beside(keys.W, np.zeros((*keys.W.shape[:2], more.shape[1]))) * width**0.5, "S_k": S_k, "S_v": S_k,
            "O": _outputs(layer, decoder), INV_FREQ: np.append(keys.inv_freq, np.zeros(more.shape[1] // 2))}


def _directions(
    layer: Layer, moments: activations.Moments, W: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest directions of `x W` as what attention reads of them reaches the output.

    Returns:
      the map from a token `[D, count]`, and back to the values `[count, K H]`.
    """
    W_O, (_, K, H) = layer["W_O"], layer["W_V"].shape
    metric = np.zeros((K * H, K * H))
    for g, group in enumerate(np.split(W_O, K)):
        metric[g * H : (g + 1) * H, g * H : (g + 1) * H] = np.einsum("nhd,nkd->hk", group, group, optimize=True)
    values, vectors = np.linalg.eigh(metric)
    values = np.maximum(values, 1e-9 * values.max())
    root, back = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    energies, directions = np.linalg.eigh(root @ (W.T @ moments.read @ W) @ root)
    directions = directions[:, np.argsort(-energies)[:count]]
    return W @ root @ directions, directions.T @ back


def _outputs(layer: Layer, decoder: np.ndarray) -> np.ndarray:
    """`O [N, C, D]`: the way back to the values `[C, K H]`, then each head's own output projection."""
    N, H, _ = layer["W_O"].shape
    own = decoder.reshape(len(decoder), -1, H).transpose(1, 0, 2)
    return np.matmul(np.repeat(own, N // own.shape[0], axis=0), layer["W_O"])
