"""GQA with a smaller cache by the plain ways of the literature, beside which `reduce` is measured. Nothing is refitted.

*Mean-pooled heads* (Ainslie et al., arXiv 2305.13245, section 2.1): the key and value projections of neighbouring heads
are averaged. The paper trains the result on; here it is left as it is.

*Key PCA with real rotations*, after TransMLA (Meng et al., arXiv 2502.07864). Taken from it: for each frequency an
orthogonal map over the key heads, the same for both elements of a pair (RoRoPE), by PCA of the keys on calibration
text, and PCA of the values, both by second moments about zero. Not taken: its single head with rope beside keys
without (all directions compete by their second moment here and keep their frequency), the merging of neighbouring
frequencies (FreqFold), balancing keys against values before one joint PCA of both, and its training afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mfa_jax.config import GQAConfig, MFAConfig, ModelConfig, require, to_dict
from mfa_jax.convert import activations
from mfa_jax.convert.directions import Keys, first, rank_pairs, with_values
from mfa_jax.convert.exact import Layer, factored, frequencies_of, rebuilt
from mfa_jax.convert.layerwise import LayerReport, Layerwise, Streams, require_reducible
from mfa_jax.convert.stacks import Stacks


def mean_pool(
    config: ModelConfig, params: Any, *, num_kv_heads: int, folder: Path | None = None
) -> tuple[ModelConfig, Any]:
    """A GQA model with fewer key heads, each the mean of as many neighbours: `2 K H` cached elements.

    Args:
      params: layers stacked.
      num_kv_heads: K of the new model.
      folder: where the new arrays lie, mapped from files without a name; None for memory.

    Raises:
      ValueError: not a GQA model, or a number that does not divide the old one.
    """
    a = config.attention
    require(isinstance(a, GQAConfig), "attention", a.variant, "must be mha, gqa or mqa")
    assert isinstance(a, GQAConfig)
    require(num_kv_heads >= 1 and a.num_kv_heads % num_kv_heads == 0, "num_kv_heads", num_kv_heads,
            f"must divide the {a.num_kv_heads} key heads of the original")
    given, pooled = params["layers"]["attention"], Stacks(folder)
    for i in range(config.num_layers):
        layer = {name: np.asarray(given[name][i]) for name in ("W_K", "W_V", "b_K", "b_V") if name in given}
        pooled.append({name: leaf.reshape(*leaf.shape[:-2], num_kv_heads, -1, a.head_dim).mean(-2, dtype=np.float64)
                       .astype(leaf.dtype) for name, leaf in layer.items()})
    attention = {**given, **pooled.arrays()}
    new = dataclasses.replace(config, attention=dataclasses.replace(a, num_kv_heads=num_kv_heads))
    return new, {**params, "layers": {**params["layers"], "attention": attention}}


def key_pca(
    config: ModelConfig, params: Any, tokens: np.ndarray, *, width: int, folder: Path | None = None,
    on_layer: Callable[[LayerReport], None] = lambda report: None,
) -> tuple[ModelConfig, Any, list[LayerReport]]:
    """A GQA model as MFA with C = `width`, `2 C` cached elements: the largest directions of keys and values.

    Arguments and errors as in `reduce.reduce_gqa`. Reported errors are those of each layer by itself, of the original's
    own stream; the second is the first.
    """
    a = require_reducible(config, tokens, "mfa", width)
    attention = MFAConfig(num_heads=a.num_heads, latent_dim=width, query_rank=config.model_dim, query_norm=False,
                          norm_eps=config.norm_eps)
    frequencies = frequencies_of(config)
    assert frequencies is not None

    def step(layer: Layer, i: int, streams: Streams) -> tuple[Layer, LayerReport]:
        stream = streams["original"]
        moments, output = activations.observe(config, layer, frequencies[i], stream)
        keys = rank_by_second_moment(layer, frequencies[i], moments.tokens)
        reduced = with_values(layer, first(keys, width // 2), width, moments.tokens)
        error = activations.misses(activations.output_of(config, reduced, stream), output)
        stream += output
        new = reduced.layer()
        new |= factored(new.pop("W"), attention)
        return new, LayerReport(i, width, error, error)

    walk = Layerwise(config, params, tokens, step, streams=("original",), folder=folder, on_layer=on_layer,
                     settings={"attention": to_dict(attention), "method": "key_pca"})
    new, converted = rebuilt(config, params, attention, walk.convert, folder)
    return new, converted, walk.reports


def rank_by_second_moment(layer: Layer, inv_freq: np.ndarray, second: np.ndarray) -> Keys:
    """The keys in the directions of real PCA over the key heads, frequency by frequency, by falling second moment."""
    def basis(j: int, A: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values, vectors = np.linalg.eigh((A.T @ second @ A.conj()).real)
        return values, vectors, vectors

    return rank_pairs(layer, inv_freq, basis)
