"""GQA as MFA and as MFA-KR, exactly: the same logits, from one key and one value head that hold all K of the original.

Where rope turns them, the pairs `(j, H/2 + j)` of the K key heads are laid beside each other: pair `j` of head `g` is
pair `j K + g` of one half-split head of width `C = K H`, whose frequencies are the original's, each K times. A query
head keeps its own elements in the slots of its key head and zeros elsewhere, times `sqrt(C / H)`, since scores are
scaled by `C ** -0.5`. Values are laid side by side, and `O_n` reads the slots of its own. The scale of the norm before
attention goes into the projections, so that the query latent's RMSNorm, where there is one, finds tokens of unit root
mean square and changes them by no more than epsilon does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mfa_jax.config import GQAConfig, MFAConfig, MFAKRConfig, ModelConfig, require
from mfa_jax.convert.stacks import Stacks
from mfa_jax.model.transformer import layer_frequencies

Layer = dict[str, np.ndarray]
"""Attention parameters of one layer, float64."""
INV_FREQ = "inv_freq"


def gqa_to_mfa(
    config: ModelConfig, params: Any, *, query_norm: bool = False, query_rank: int | None = None,
    folder: Path | None = None,
) -> tuple[ModelConfig, Any]:
    """The MFA model with `C = K H` that computes what a GQA model computes; its cache is as large as before.

    Args:
      params: layers stacked.
      query_norm: whether the query latent has its RMSNorm. Without it logits are equal to rounding; with it to
        about `eps / (2 m)`, `m` the mean square of the residual stream.
      query_rank: Q; None for D, which is exact. Below, the query projection keeps its Q largest directions.
      folder: where the new arrays lie, mapped from files without a name; None for memory.

    Returns:
      the new config and parameters, as numpy arrays where they are new.

    Raises:
      ValueError: not a GQA model, or a rank that is not in 1 .. D.
      NotImplementedError: biases or norms of heads, which MFA has not.
    """
    a = require_plain(config)
    C = a.num_kv_heads * a.head_dim
    attention = MFAConfig(num_heads=a.num_heads, latent_dim=C, query_rank=rank_of(config, query_rank),
                          query_norm=query_norm, norm_eps=config.norm_eps)
    frequencies = frequencies_of(config)

    def convert(layer: Layer, i: int) -> Layer:
        turns = {} if frequencies is None else {INV_FREQ: np.repeat(frequencies[i], a.num_kv_heads)}
        return {**turns, **factored(pack_queries(layer["W_Q"], a, C), attention),
                "S_k": pack_keys(layer["W_K"]), "S_v": pack_values(layer["W_V"]),
                "O": pack_outputs(layer["W_O"], a)}

    return rebuilt(config, params, attention, convert, folder)


def gqa_to_mfa_kr(
    config: ModelConfig, params: Any, *, query_norm: bool = False, query_rank: int | None = None,
    folder: Path | None = None,
) -> tuple[ModelConfig, Any]:
    """The MFA-KR model with `C = 2 K H` that computes what a GQA model computes; its cache is as large as before.

    Each half of the key holds the packed keys' half, then the packed values' half with frequency zero, which the
    queries do not look at. `alpha` is one and `N_kr` zero, so that the value is the key, of which `O_n` reads the
    values' slots. Arguments and errors as in `gqa_to_mfa`.
    """
    a = require_plain(config)
    width = a.num_kv_heads * a.head_dim
    C = 2 * width
    require(width % 2 == 0, "num_kv_heads * head_dim", width, "must be even")
    attention = MFAKRConfig(num_heads=a.num_heads, latent_dim=C, query_rank=rank_of(config, query_rank),
                            query_norm=query_norm, norm_eps=config.norm_eps, alpha_init=1.0)
    frequencies = frequencies_of(config)

    def convert(layer: Layer, i: int) -> Layer:
        turns = {} if frequencies is None else {
            INV_FREQ: np.append(np.repeat(frequencies[i], a.num_kv_heads), np.zeros(width // 2))}
        queries = pack_queries(layer["W_Q"], a, C)
        outputs = pack_outputs(layer["W_O"], a)
        return {**turns, **factored(beside(queries, np.zeros_like(queries)), attention),
                "S_k": beside(pack_keys(layer["W_K"]), pack_values(layer["W_V"])),
                "O": beside(np.zeros_like(outputs), outputs, axis=1), "alpha": np.ones(C), "N_kr": np.zeros((C, C))}

    return rebuilt(config, params, attention, convert, folder)


def expand_key_reuse(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The MFA model that computes what an MFA-KR model computes, `S_v = S_k + alpha * (S_k N_kr^T)`: twice the cache.

    Raises:
      ValueError: not an MFA-KR model.
      NotImplementedError: `reuse="post_rope"`, whose value depends on the position.
    """
    a = config.attention
    require(isinstance(a, MFAKRConfig), "attention", a.variant, "must be mfa_kr")
    assert isinstance(a, MFAKRConfig)
    if a.reuse != "pre_rope":
        raise NotImplementedError(f"reuse={a.reuse!r}: the value turns with its position; only that of pre_rope is a "
                                  f"linear map of the token")
    attention = MFAConfig(num_heads=a.num_heads, latent_dim=a.latent_dim, query_rank=a.query_rank,
                          query_norm=a.query_norm, norm_eps=a.norm_eps)
    given = dict(params["layers"]["attention"])
    S_k, alpha, N_kr = given["S_k"], given.pop("alpha"), given.pop("N_kr")
    given["S_v"] = S_k + alpha[:, None] * jnp.einsum("LDC,LcC->LDc", S_k, N_kr)
    layers = {**params["layers"], "attention": given}
    return dataclasses.replace(config, attention=attention), {**params, "layers": layers}


def rebuilt(
    config: ModelConfig, params: Any, attention: MFAConfig | MFAKRConfig, convert: Callable[[Layer, int], Layer],
    folder: Path | None = None,
) -> tuple[ModelConfig, Any]:
    """The model with other attention: `convert` is called layer by layer, in float64, with the norm's scale folded in.

    Args:
      convert: makes the new parameters of a layer, and with rope its frequencies `inv_freq [C / 2]`, from the old
        parameters and the number of the layer.
      folder: where the new arrays lie, mapped from files without a name; None for memory.
    """
    found = Stacks(folder)
    frequencies: list[tuple[float, ...]] = []
    for i in range(config.num_layers):
        scale = np.asarray(params["layers"]["attention_norm"]["scale"][i], np.float64)
        layer = {name: np.asarray(leaf[i], np.float64) for name, leaf in params["layers"]["attention"].items()}
        for name in ("W_Q", "W_K", "W_V"):
            layer[name] = layer[name] * scale[:, None, None]
        new = convert(layer, i)
        if INV_FREQ in new:
            frequencies.append(tuple(new.pop(INV_FREQ).astype(np.float32).tolist()))
        found.append({name: leaf.astype(jnp.dtype(config.param_dtype)) for name, leaf in new.items()})
    stacked: dict[str, Any] = found.arrays()
    if attention.query_norm:
        stacked["q_norm"] = {"scale": np.ones((config.num_layers, attention.query_rank), config.param_dtype)}
    layers = {**params["layers"], "attention": stacked,
              "attention_norm": {"scale": np.ones((config.num_layers, config.model_dim), config.param_dtype)}}
    return dataclasses.replace(config, attention=attention, inv_freq=tuple(frequencies) or None), {
        **params, "layers": layers}


# ---- slots -----------------------------------------------------------------------------------------------------


def pack_keys(W: np.ndarray) -> np.ndarray:
    """`[D, K, H]` to `[D, K H]`: pair `j` of head `g` becomes pair `j K + g`."""
    D, K, H = W.shape
    return W.reshape(D, K, 2, H // 2).transpose(0, 2, 3, 1).reshape(D, K * H)


def pack_values(W: np.ndarray) -> np.ndarray:
    """`[D, K, H]` to `[D, K H]`, head after head."""
    return W.reshape(len(W), -1)


def pack_queries(W: np.ndarray, a: GQAConfig, width: int) -> np.ndarray:
    """`[D, N, H]` to `[D, N, K H]`: each head in the slots of its key head, scaled for a head of `width`."""
    D, N, H = W.shape
    K = a.num_kv_heads
    packed = np.zeros((D, N, 2, H // 2, K))
    for n in range(N):
        packed[:, n, :, :, n // (N // K)] = W[:, n].reshape(D, 2, H // 2) * (width / H) ** 0.5
    return packed.reshape(D, N, K * H)


def pack_outputs(W: np.ndarray, a: GQAConfig) -> np.ndarray:
    """`[N, H, D]` to `[N, K H, D]`: each head reads the slots of its value head."""
    N, H, D = W.shape
    packed = np.zeros((N, a.num_kv_heads, H, D))
    for n in range(N):
        packed[n, n // (N // a.num_kv_heads)] = W[n]
    return packed.reshape(N, -1, D)


def beside(left: np.ndarray, right: np.ndarray, axis: int = -1) -> np.ndarray:
    """Two half-split vectors as one: the first halves of both, then the second halves of both."""
    (a, b), (c, d) = np.split(left, 2, axis=axis), np.split(right, 2, axis=axis)
    return np.concatenate([a, c, b, d], axis=axis)


def factor_queries(W: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """`W [D, N, C]` as `S_q [D, rank]`, orthonormal columns, times `Q [rank, N, C]`: its largest directions."""
    flat = W.reshape(len(W), -1)
    values, vectors = np.linalg.eigh(flat @ flat.T)
    S_q = vectors[:, np.argsort(-values)[:rank]]
    return S_q, (S_q.T @ flat).reshape(rank, *W.shape[1:])


def factored(W: np.ndarray, attention: MFAConfig | MFAKRConfig) -> Layer:
    S_q, Q = factor_queries(W, attention.query_rank)
    return {"S_q": S_q, "Q": Q}


def frequencies_of(config: ModelConfig) -> np.ndarray | None:
    """Rope frequencies of each layer `[L, H / 2]`; None without rope."""
    found = layer_frequencies(config)
    return None if found is None else np.asarray(found)


def rank_of(config: ModelConfig, rank: int | None) -> int:
    rank = config.model_dim if rank is None else rank
    require(1 <= rank <= config.model_dim, "query_rank", rank, f"must be in 1 .. {config.model_dim}")
    return rank


def require_plain(config: ModelConfig) -> GQAConfig:
    a = config.attention
    require(isinstance(a, GQAConfig), "attention", a.variant, "must be mha, gqa or mqa")
    assert isinstance(a, GQAConfig)
    require(config.moe is None, "moe", "given", "must be none: only dense models can be converted")
    for name in ("qkv_bias", "qk_norm"):
        if getattr(a, name):
            raise NotImplementedError(f"{name}=True: MFA has no such thing, and no projection could take it up; only a "
                                      f"model without it can be converted")
    return a
