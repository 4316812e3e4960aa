"""The circuits of a trained layer: `W_n` (query-key) and `U_n` (value-output) of each head, and their measured ranks.

Generalized multi-head attention (arXiv 2412.19255, section 2) writes every variant as

    y_i = sum_n sum_{j <= i} softmax_j(x_i W_n x_j^T / sqrt(H)) x_j U_n,    W_n, U_n [D, D],

each variant being a low-rank choice of `W_n` and `U_n`. Here both are handed out for any layer of this library, as
they are without a position encoding (rope puts a rotation in the middle of `W_n`, ALiBi adds a bias beside it).

A norm inside the attention (on the query latent of MFA, on the latents of MLA, on the query and key heads of GQA with
`qk_norm`) is not linear. Its scale is part of the circuit, its division by the root mean square of the latent is not:
the formula is exact for tokens whose latents have root mean square one, and elsewhere the norm divides that token's
scores (MLA: keys and values) by it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from flax import linen as nn

from mfa_jax.config import require
from mfa_jax.layers import at_path, stacked_blocks


@dataclasses.dataclass(frozen=True)
class Circuits:
    """All heads of one layer in factored form, float64 numpy: a `[D, D]` matrix is made only for the head asked for."""

    query: np.ndarray
    """[N, D, H]: `W_n = query_n key_n^T`."""
    key: np.ndarray
    """[N, D, H]"""
    value: np.ndarray
    """[N, D, h]: `U_n = value_n output_n`."""
    output: np.ndarray
    """[N, h, D]"""
    scale: float
    """`1 / sqrt(H)`, what scores are multiplied by."""

    @property
    def num_heads(self) -> int:
        return self.query.shape[0]

    def W(self, head: int) -> np.ndarray:
        """The query-key circuit `[D, D]` of a head."""
        return self.query[self._head(head)] @ self.key[head].T

    def U(self, head: int) -> np.ndarray:
        """The value-output circuit `[D, D]` of a head."""
        return self.value[self._head(head)] @ self.output[head]

    def singular_values(self) -> tuple[np.ndarray, np.ndarray]:
        """Singular values of every `W_n` and `U_n`, descending, `[N, min(D, H)]` and `[N, min(D, h)]`."""
        return _product_spectrum(self.query, self.key.swapaxes(1, 2)), _product_spectrum(self.value, self.output)

    def ranks(self, tolerance: float = 1e-6) -> dict[str, np.ndarray]:
        """Measured ranks of each head, `[N]` each.

        Returns:
          `W_rank`, `U_rank`: singular values above `tolerance` times the largest; `W_effective_rank`,
          `U_effective_rank`: the exponential of the entropy of the singular values' shares (Roy and Vetterli, "The
          effective rank", 2007), between 1 and the rank.
        """
        found = {}
        for name, spectrum in zip("WU", self.singular_values(), strict=True):
            found[f"{name}_rank"] = np.sum(spectrum > tolerance * spectrum[:, :1], axis=1)
            found[f"{name}_effective_rank"] = effective_rank(spectrum)
        return found

    def _head(self, head: int) -> int:
        require(0 <= head < self.num_heads, "head", head, f"must be in 0 .. {self.num_heads - 1}")
        return head


def effective_rank(spectrum: np.ndarray) -> np.ndarray:
    """`exp(-sum_i p_i ln p_i)`, `p_i = s_i / sum_j s_j`, over the last axis; 0 for an all-zero spectrum."""
    total = spectrum.sum(axis=-1, keepdims=True)
    shares = np.divide(spectrum, total, out=np.zeros_like(spectrum), where=total > 0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.where(total[..., 0] > 0, np.exp(-(shares * logs).sum(axis=-1)), 0.0)


def circuits(params: Any, layer: int) -> Circuits:
    """The circuits of layer `layer` of a model's parameters, which are stacked over layers, as training keeps them.

    The variant is read off the parameters' names. For MFA-KR the value is that of `reuse="pre_rope"`.

    Raises:
      ValueError: no such layer, or not the parameters of an attention variant.
      NotImplementedError: biases on queries, keys and values.
    """
    params = nn.unbox(params)
    blocks = stacked_blocks(params["layers"])
    num_layers = sum(len(indices) for _, indices in blocks)
    require(0 <= layer < num_layers, "layer", layer, f"must be in 0 .. {num_layers - 1}")
    path, indices = next(block for block in blocks if layer in block[1])
    stacked = at_path(params["layers"], path)["attention"]
    p = {name: leaf["scale"] if isinstance(leaf, dict) else leaf for name, leaf in stacked.items()}
    p = {name: np.asarray(leaf[indices.index(layer)], np.float64) for name, leaf in p.items()}
    if "W_DKV" in p:
        return _mla(p)
    if "W_K" in p:
        return _gqa(p)
    require("S_q" in p, "params", sorted(p), "must be the attention parameters of MHA, GQA, MQA, MLA, MFA or MFA-KR")
    return _mfa(p)


def _gqa(p: dict[str, np.ndarray]) -> Circuits:
    if "b_Q" in p:
        raise NotImplementedError("qkv_bias: a layer with biases is no bilinear form of its tokens; only layers "
                                  "without them have circuits")
    N, K, H = p["W_Q"].shape[1], p["W_K"].shape[1], p["W_Q"].shape[2]
    query, key = p["W_Q"] * p.get("q_norm", 1.0), p["W_K"] * p.get("k_norm", 1.0)
    key, value = (np.repeat(shared.swapaxes(0, 1), N // K, axis=0) for shared in (key, p["W_V"]))
    return Circuits(query.swapaxes(0, 1), key, value, p["W_O"], H**-0.5)


def _mla(p: dict[str, np.ndarray]) -> Circuits:
    latent = p["W_DKV"] * p["kv_norm"]
    query = p["W_Q"] if "W_Q" in p else np.einsum("DQ,QNH->DNH", p["W_DQ"] * p["q_norm"], p["W_UQ"])
    k_nope = np.einsum("DC,CNM->NDM", latent, p["W_UK"])
    key = np.concatenate([k_nope, np.broadcast_to(p["W_KR"], (len(k_nope), *p["W_KR"].shape))], axis=-1)
    value = np.einsum("DC,CNh->NDh", latent, p["W_UV"])
    return Circuits(query.swapaxes(0, 1), key, value, p["W_O"], key.shape[-1] ** -0.5)


def _mfa(p: dict[str, np.ndarray]) -> Circuits:
    query = np.einsum("DQ,QNC->NDC", p["S_q"] * p.get("q_norm", 1.0), p["Q"])
    N, C = query.shape[0], query.shape[2]
    value = p["S_v"] if "S_v" in p else p["S_k"] + p["alpha"] * (p["S_k"] @ p["N_kr"].T)
    key, value = (np.broadcast_to(shared, (N, *shared.shape)) for shared in (p["S_k"], value))
    return Circuits(query, key, value, p["O"], C**-0.5)


def _product_spectrum(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Singular values of `left_n @ right_n` (`[N, D, r]`, `[N, r, D]`) without the `[D, D]` products."""
    if left.shape[1] <= left.shape[2]:
        return np.linalg.svd(left @ right, compute_uv=False)
    # numpy's types know only the mode that returns Q and R.
    left_core: Any = np.linalg.qr(left, mode="r")
    right_core: Any = np.linalg.qr(right.swapaxes(1, 2), mode="r")
    return np.linalg.svd(left_core @ right_core.swapaxes(1, 2), compute_uv=False)
