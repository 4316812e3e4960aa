"""What a conversion holds in memory: a layer, however many there are; the rest lies in files that are mapped."""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments.convert import ConvertConfig, main
from mfa_jax.config import ModelConfig
from mfa_jax.convert import (
    balanced,
    gqa_to_mfa,
    gqa_to_mfa_kr,
    load_pretrained,
    map_pretrained,
    save_pretrained,
)
from mfa_jax.convert.plain import key_pca, mean_pool
from mfa_jax.convert.reduce import reduce_gqa
from mfa_jax.convert.stacks import Stacks
from mfa_jax.data import ByteTokenizer
from mfa_jax.model.transformer import Transformer
from mfa_jax.train.run import load_trained
from tests.contract import compiled, model_config, tokens

TEXT = np.asarray(tokens(9, (24, 32)))


def is_mapped(leaf: Any) -> bool:
    while isinstance(leaf, np.ndarray) and not isinstance(leaf, np.memmap):
        leaf = leaf.base
    return isinstance(leaf, np.memmap)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_stacks_on_disk_are_those_in_memory(dtype: str, tmp_path: Path) -> None:
    layers = [{"a": np.arange(12).reshape(3, 4).T.astype(dtype) + i, "b": np.asarray(i, dtype)} for i in range(5)]
    found = []
    for folder in (None, tmp_path):
        stacks = Stacks(folder)
        for layer in layers:
            stacks.append(layer)
        found.append(stacks.arrays())
    chex.assert_trees_all_equal(*found)
    for name, array in found[1].items():
        assert is_mapped(array) and array.dtype == dtype and array.shape == (5, *np.shape(layers[0][name]))
        assert not array.flags.writeable
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And not a crash, as where a file with holes is mapped and written to."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w+b", buffering=0) as full:
        monkeypatch.setattr("mfa_jax.convert.stacks.tempfile.TemporaryFile", lambda **_: full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            Stacks(tmp_path).append({"a": np.zeros(4)})


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_mapped_checkpoint_is_the_loaded_one(param_dtype: str, tmp_path: Path) -> None:
    c = compiled(model_config("gqa", tie_embeddings=False))
    save_pretrained(tmp_path / "from", c.config, c.params, context_length=64)
    (tmp_path / "scratch").mkdir()
    config, params = map_pretrained(tmp_path / "from", tmp_path / "scratch", param_dtype=param_dtype)
    expected, loaded = load_pretrained(tmp_path / "from", param_dtype=param_dtype)
    assert config == expected and all(map(is_mapped, jax.tree.leaves(params)))
    chex.assert_trees_all_equal(params, jax.tree.map(np.asarray, loaded))
    assert not any((tmp_path / "scratch").iterdir())


Made = tuple[ModelConfig, Any]
CONVERSIONS: dict[str, Callable[[ModelConfig, Any, Path | None], Made]] = {
    "exact_mfa": lambda config, params, folder: gqa_to_mfa(config, params, folder=folder),
    "exact_mfa_kr": lambda config, params, folder: gqa_to_mfa_kr(config, params, folder=folder),
    "mfa_kr": lambda config, params, folder: reduce_gqa(
        config, params, TEXT, target="mfa_kr", width=22, folder=folder)[:2],
    "key_pca": lambda config, params, folder: key_pca(config, params, TEXT, width=10, folder=folder)[:2],
    "mean_pool": lambda config, params, folder: mean_pool(config, params, num_kv_heads=1, folder=folder),
}


@pytest.mark.parametrize("how", CONVERSIONS)
def test_a_mapped_model_is_converted_like_one_in_memory(how: str, tmp_path: Path) -> None:
    c = compiled(model_config("gqa"))
    save_pretrained(tmp_path / "from", c.config, c.params, context_length=64)
    given = map_pretrained(tmp_path / "from", tmp_path)
    found, converted = CONVERSIONS[how](*given, tmp_path)
    converted = balanced(found, converted, folder=tmp_path)
    expected, wanted = CONVERSIONS[how](c.config, c.params, None)
    assert found == expected
    chex.assert_trees_all_equal(converted, jax.tree.map(np.asarray, balanced(expected, wanted)))
    # The scales of norms are as large as one row of a matrix.
    leaves = jax.tree_util.tree_leaves_with_path(converted["layers"])
    assert all(is_mapped(leaf) for path, leaf in leaves if "scale" not in jax.tree_util.keystr(path))


@pytest.mark.parametrize("options", [{"to": "mfa_kr"}, {"to": "gqa", "method": "mean_pool", "cache_ratio": 2.0}],
                         ids=lambda options: options["to"])
def test_memory_does_not_grow_with_the_layers(options: dict[str, Any], tmp_path: Path) -> None:
    """Of what numpy and Python hold, the whole script: reading, converting, writing."""
    peaks, few, many = {}, 2, 24
    for count in (few, many):
        config = model_config("gqa", vocab_size=264, num_layers=count, model_dim=128, ffn_dim=768)
        params = nn.unbox(Transformer(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
        source, out = (tmp_path / f"{name}{count}" for name in ("from", "to"))
        save_pretrained(source, config, params, context_length=64, tokenizer=ByteTokenizer())
        of_layer = sum(leaf[0].nbytes for leaf in jax.tree.leaves(params["layers"]))
        tracemalloc.start()
        try:
            main(ConvertConfig(str(source), str(out), **options))
            peaks[count] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert load_trained(out).config.model.num_layers == count
    # A copy of the model would be all of it. Python and JAX keep some 4 MB of what they first meet.
    assert peaks[many] - peaks[few] < (many - few) * of_layer / 4, (peaks, of_layer)
