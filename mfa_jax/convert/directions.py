"""The directions of a layer's keys and values, in the order of what they matter, and layers made of the first of them.

Pair `j` of the K key heads is a vector of K complex numbers that rope turns by one angle, so that any complex map of it
commutes with rope: keys `A z` and queries `A^-H q` give the same scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from mfa_jax.config import require
from mfa_jax.convert.exact import INV_FREQ, Layer, beside


@dataclasses.dataclass
class Moments:
    """Second moments of one layer's tokens `x`, after the norm with its scale left out; float64."""

    tokens: np.ndarray
    """[D, D], `E[x^T x]`."""
    mean: np.ndarray
    """[D], `E[x]`."""
    read: np.ndarray
    """[D, D], `E[(a_n X)^T (a_n X)]` over queries and heads, `a_n` a head's attention: what values are averaged to."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """What is kept of a layer's keys, half-split; `P` pairs."""

    S_k: np.ndarray
    """[D, 2 P]"""
    W: np.ndarray
    """[D, N, 2 P], the queries, for a scale of one."""
    inv_freq: np.ndarray
    """[P]"""


Basis = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""From a frequency's number and its keys `[D, K]`, complex: energies `[K]`; the map of the keys `[K, K]`; and that of
the queries, a column for each direction. With `E` and `R` the two maps, `E R^H = 1`."""


def rank_pairs(layer: Layer, inv_freq: np.ndarray, basis: Basis) -> Keys:
    """All pairs of all frequencies in a basis for each frequency, by falling energy."""
    W_Q, W_K = layer["W_Q"], layer["W_K"]
    keys, queries = as_pairs(W_K), as_pairs(W_Q)
    (_, N, H), K = W_Q.shape, W_K.shape[1]
    energies, columns, readers = [], [], []
    for j in range(H // 2):
        energy, encode, read = basis(j, keys[:, :, j])
        energies.append(energy)
        columns.append(keys[:, :, j] @ encode)
        readers.append(queries[:, :, j, None] * np.repeat(read, N // K, axis=0))
    order = np.argsort(-np.concatenate(energies), kind="stable")
    S, W = np.concatenate(columns, axis=1)[:, order], np.concatenate(readers, axis=2)[..., order]
    return Keys(np.concatenate([S.real, S.imag], axis=-1), np.concatenate([W.real, W.imag], axis=-1) * H**-0.5,
                np.repeat(inv_freq, K)[order])


def as_pairs(W: np.ndarray) -> np.ndarray:
    """Half-split heads `[..., H]` as complex numbers `[..., H / 2]`."""
    first_half, second_half = np.split(W, 2, axis=-1)
    return np.asarray(first_half + 1j * second_half)


def rank_keys(layer: Layer, inv_freq: np.ndarray, moments: Moments, context: int) -> Keys:
    """All pairs of all frequencies as directions, in the order of what they do to scores.

    With `Sigma` the covariance of a frequency's keys (what is common to all keys does not move a softmax) and `w_g` the
    mean square of the queries that read key head g, the eigenvectors of `diag(w)^1/2 Sigma diag(w)^1/2`.
    """
    queries, K = as_pairs(layer["W_Q"]), layer["W_K"].shape[1]
    N, half = queries.shape[1:]
    # A constant key only moves a softmax as far as rope turns it: by its mean turn over the context it does not.
    turn = np.abs(np.exp(1j * np.arange(context)[:, None] * inv_freq).mean(0)) ** 2
    strength = np.einsum("dnj,de,enj->nj", queries.conj(), moments.tokens, queries, optimize=True).real
    weights = strength.reshape(K, N // K, half).sum(1)

    def basis(j: int, A: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        constant = moments.mean @ A
        sigma = A.T @ moments.tokens @ A.conj() - turn[j] * np.outer(constant, constant.conj())
        root = np.sqrt(np.maximum(weights[:, j], 1e-9 * weights.max()))
        values, vectors = np.linalg.eigh(root[:, None] * sigma * root)
        return values, root[:, None] * vectors.conj(), vectors.conj() / root[:, None]

    return rank_pairs(layer, inv_freq, basis)


def first(keys: Keys, pairs: int) -> Keys:
    """The first pairs of some keys."""
    def cut(x: np.ndarray) -> np.ndarray:
        return np.concatenate([part[..., :pairs] for part in np.split(x, 2, axis=-1)], axis=-1)

    return Keys(cut(keys.S_k), cut(keys.W), keys.inv_freq[:pairs])


@dataclasses.dataclass(frozen=True)
class Reduced:
    """A layer with a smaller cache: what heads average are the keys, where they are reused, and some values."""

    keys: Keys
    reuse: bool
    """Whether this is MFA-KR, whose value begins with the keys, not MFA."""
    values: np.ndarray
    """[D, v]"""
    O: np.ndarray
    """[N, 2 P + v, D] where the keys are reused, [N, v, D] else."""

    @property
    def averaged(self) -> np.ndarray:
        """What heads average, in the order of `O`."""
        return np.concatenate([self.keys.S_k, self.values], axis=1) if self.reuse else self.values

    def layer(self) -> Layer:
        """As MFA, or MFA-KR with `S_v` the same as `S_k`."""
        W, O, S_k, S_v, inv_freq = self.keys.W, self.O, self.keys.S_k, self.values, self.keys.inv_freq
        if self.reuse:
            n, v = S_k.shape[1], S_v.shape[1]
            S_k = S_v = beside(S_k, S_v)
            W, inv_freq = beside(W, np.zeros((*W.shape[:2], v))), np.append(inv_freq, np.zeros(v // 2))
            O = beside(O[:, :n], O[:, n:], axis=1)
        return {"W": W * O.shape[1]**0.5, "S_k": S_k, "S_v": S_v, "O": O, INV_FREQ: inv_freq}


def with_values(
    layer: Layer, keys: Keys, width: int, second: np.ndarray, metric: np.ndarray | None = None
) -> Reduced:
    """As MFA: these keys, and the `width` largest directions of the values.

    Args:
      second: `[D, D]`, the second moment of what values are made of.
      metric: `[K H, K H]` of the values; None for the identity.
    """
    values, decoder = _largest(layer["W_V"].reshape(len(second), -1), second, width, metric)
    return Reduced(keys, False, values, _outputs(layer, decoder))


def with_reused_keys(layer: Layer, keys: Keys, width: int, second: np.ndarray, metric: np.ndarray) -> Reduced:
    """As MFA-KR: these keys, and the largest directions of what values are besides a linear map of them."""
    S, wanted = keys.S_k, layer["W_V"].reshape(len(second), -1)
    gram = S.T @ second @ S
    gram += 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram))
    linear = np.linalg.solve(gram, S.T @ second @ wanted)
    more, decoder = _largest(wanted - S @ linear, second, width - S.shape[1], metric)
    return Reduced(keys, True, more, _outputs(layer, np.concatenate([linear, decoder])))


def _largest(
    W: np.ndarray, second: np.ndarray, count: int, metric: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest directions of `x W` where `second` is the second moment of x.

    Returns:
      the map from a token `[D, count]`, and back to the values `[count, K H]`.

    Raises:
      ValueError: more directions than values have.
    """
    require(0 <= count <= W.shape[1], "count", count, f"must be in 0 .. {W.shape[1]}, the elements of all values")
    root = back = np.eye(W.shape[1])
    if metric is not None:
        values, vectors = np.linalg.eigh(metric)
        values = np.maximum(values, 1e-9 * values.max())
        root, back = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    energies, found = np.linalg.eigh(root @ (W.T @ second @ W) @ root)
    found = found[:, np.argsort(-energies)[:count]]
    return W @ root @ found, found.T @ back


def output_metric(layer: Layer) -> np.ndarray:
    """`M = sum_n O_n O_n^T` of the heads that read each value head, block by block: `[K H, K H]`."""
    W_O, (_, K, H) = layer["W_O"], layer["W_V"].shape
    metric = np.zeros((K * H, K * H))
    for g, group in enumerate(np.split(W_O, K)):
        metric[g * H : (g + 1) * H, g * H : (g + 1) * H] = np.einsum("nhd,nkd->hk", group, group, optimize=True)
    return metric


def _outputs(layer: Layer, decoder: np.ndarray) -> np.ndarray:
    """`O [N, C, D]`: the way back to the values `[C, K H]`, then each head's own output projection."""
    N, H, _ = layer["W_O"].shape
    own = decoder.reshape(len(decoder), -1, H).transpose(1, 0, 2)
    return np.matmul(np.repeat(own, N // own.shape[0], axis=0), layer["W_O"])
