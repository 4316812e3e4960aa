"""The closed-form refit of a reduced layer: `O` and `Z` in turn, each by ridge regression, from normal equations alone.

With `p_n` what head n averages the keys, if they are reused, and all values `x W_V` to, the layer's output is
`sum_n p_n E O_n`, `E` the identity for the keys and `Z` for the values: linear in `O` and in `Z`. Of the text only
`E[p^T p]`, `[N m, N m]`, and `E[p^T y]` are needed, so that the cost of a round does not depend on its length.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg

Map = Callable[[np.ndarray], np.ndarray]
_CG_STEPS = 6


class NormalEquations:
    """Sums over tokens of `p^T p` and `p^T y`, float32: a rounding of 1e-7 is far below any ridge.

    Args:
      heads: N.
      width: m, elements a head averages.
      outputs: D.
    """

    def __init__(self, heads: int, width: int, outputs: int) -> None:
        self.gram = np.zeros((heads * width, heads * width), np.float32)
        self.cross = np.zeros((heads * width, outputs), np.float32)
        self.shape = (heads, width, outputs)

    def add(self, averages: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> None:
        """Adds tokens: `[tokens, N, m]`, `[tokens, D]`, and the root of each one's weight `[tokens]`."""
        p, y = averages.reshape(len(averages), -1) * weights[:, None], wanted * weights[:, None]
        self.gram += p.T @ p
        self.cross += p.T @ y

    def outputs(self, E: np.ndarray, O: np.ndarray, ridge: float) -> np.ndarray:
        """`O [N, C, D]` of the ridge regression towards the one given, for what is averaged `p E`, E `[m, C]`."""
        N, m, D = self.shape
        E = E.astype(np.float32)
        right = (self.gram.reshape(-1, m) @ E).reshape(N, m, -1)
        gram = np.matmul(E.T, right).reshape(O.shape[0] * O.shape[1], -1).astype(np.float64)
        cross = np.matmul(E.T, self.cross.reshape(N, m, D)).reshape(-1, D)
        missing = cross - gram @ O.reshape(-1, D)
        gram[np.diag_indices(len(gram))] += ridge * np.trace(gram) / len(gram)
        return O + scipy.linalg.solve(gram, missing, assume_a="pos", overwrite_a=True).reshape(O.shape)

    def values(self, Z: np.ndarray, O: np.ndarray, ridge: float) -> np.ndarray:
        """`Z [m - r, v]` of the ridge regression towards the one given, for `O [N, r + v, D]`, r as E's identity.

        By conjugate gradients, preconditioned with the Kronecker product of what both sides are on average.
        """
        N, m, D = self.shape
        r = O.shape[1] - Z.shape[1]
        gram, own = self.gram.reshape(N, m, N, m), O[:, r:].astype(np.float32)
        of_keys = gram[:, r:, :, :r].reshape(N * (m - r), N * r) @ O[:, :r].reshape(N * r, D).astype(np.float32)
        wanted = self.cross.reshape(N, m, D)[:, r:] - of_keys.reshape(N, m - r, D)
        among_values = gram[:, r:, :, r:].reshape(N * (m - r), -1)

        def normal(Z: np.ndarray) -> np.ndarray:
            reach = np.matmul(Z.astype(np.float32), own).reshape(-1, D)
            return gathered((among_values @ reach).reshape(N, m - r, D))

        def gathered(x: np.ndarray) -> np.ndarray:
            return np.matmul(x, own.swapaxes(1, 2)).sum(0, dtype=np.float64)

        left = np.einsum("nanb->ab", gram[:, r:, :, r:], dtype=np.float64) / N
        right = np.matmul(own, own.swapaxes(1, 2)).sum(0, dtype=np.float64)
        scale = np.trace(left) / len(left) * np.trace(right) / len(right)
        near = [np.linalg.inv(x + 1e-2 * np.trace(x) / len(x) * np.eye(len(x))) for x in (left, right)]
        return Z + _conjugate_gradients(lambda x: normal(x) + ridge * scale * x, gathered(wanted) - normal(Z),
                                        lambda x: near[0] @ x @ near[1])


def _conjugate_gradients(apply: Map, wanted: np.ndarray, precondition: Map) -> np.ndarray:
    """`apply^-1 wanted`, after a few steps from zero."""
    found, left = np.zeros_like(wanted), wanted.copy()
    direction = near = precondition(left)
    size = np.sum(left * near)
    for _ in range(_CG_STEPS):
        if size <= 0:
            break
        image = apply(direction)
        step = size / np.sum(direction * image)
        found += step * direction
        left -= step * image
        near = precondition(left)
        size, last = np.sum(left * near), size
        direction = near + size / last * direction
    return found


def fitted(
    equations: NormalEquations, Z: np.ndarray, O: np.ndarray, *, ridge: float, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """`Z` and `O` after `rounds` of both in turn, `O` before the first and last.

    Args:
      ridge: towards what there is, as a share of the mean square of the features.
    """
    def whole(Z: np.ndarray) -> np.ndarray:
        r, v = O.shape[1] - Z.shape[1], Z.shape[1]
        return np.block([[np.eye(r), np.zeros((r, v))], [np.zeros((len(Z), r)), Z]])

    O = equations.outputs(whole(Z), O, ridge)
    for _ in range(rounds if Z.size else 0):
        Z = equations.values(Z, O, ridge)
        O = equations.outputs(whole(Z), O, ridge)
    return Z, O
