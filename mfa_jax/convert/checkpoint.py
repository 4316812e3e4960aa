"""Public checkpoints in and out: `load_pretrained`, `map_pretrained` and `save_pretrained`.

All work leaf by leaf: a tensor is read only as far as this process's devices hold it, and placed, or is copied to a
file that is mapped; it is fetched from the devices a layer at a time, and written in shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from mfa_jax import axes
from mfa_jax.config import DType, GQAConfig, MFAConfig, MFAKRConfig, ModelConfig, from_dict, load_json, require, to_json
from mfa_jax.convert import dense, gguf_file, step3
from mfa_jax.convert.files import appearing, require_free
from mfa_jax.convert.stacks import Stacks
from mfa_jax.convert.tensors import Source, equal, open_tensors, read_part, shorten, write_tensors
from mfa_jax.convert.tokenizer import save_tokenizer
from mfa_jax.data import Tokenizer
from mfa_jax.model.transformer import Transformer, init_params

CONFIG = "config.json"
_STORED_TYPES = ("F64", "F32", "F16", "BF16")
_WRITTEN_TYPES = ("float32", "bfloat16", "float16")
_MODEL_TYPES: dict[str, ModuleType] = {**{name: dense for name in dense.FAMILIES}, step3.MODEL_TYPE: step3}


def load_pretrained(
    path: str | Path, *, dtype: str = "float32", param_dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[ModelConfig, Any]:
    """The config and the parameters (layers stacked) of a checkpoint.

    Tensors are read one leaf at a time, and of each only what this process's devices hold, so that a model larger
    than the host's memory loads onto a mesh.

    Args:
      path: a `.gguf` file; or a folder with `config.json` and the weights: `model.safetensors.index.json` and its
        shards, `model.safetensors`, or else every `*.safetensors` there.
      dtype: what the model computes in, `float32` or `bfloat16`.
      param_dtype: what parameters are cast to, whatever the files hold.
      mesh: where the parameters are placed, by the rules of `axes`; None for the first device.

    Raises:
      ValueError: a file is missing or broken; tensors are missing, left over or of another shape; a value of the
        config makes no sense; a size does not divide over the mesh.
      NotImplementedError: a model that ours does not compute (see `config_from_hf`), or quantized weights.
    """
    with _opened(Path(path), dtype, param_dtype) as (config, boxed, tensors, table):
        mesh = mesh or axes.make_mesh((1,) * len(axes.MESH_AXES), jax.devices()[:1])
        return config, jax.tree_util.tree_map_with_path(
            functools.partial(_load, tensors, table), nn.unbox(boxed), axes.shardings(boxed, mesh))


def map_pretrained(
    path: str | Path, folder: Path, *, dtype: str = "float32", param_dtype: str = "float32"
) -> tuple[ModelConfig, Any]:
    """`load_pretrained` for a host that may be smaller than the model: the parameters are numpy arrays, read only,
    which are mapped from files without a name in `folder`. One tensor at a time is in memory.

    Raises:
      as `load_pretrained`; OSError: the folder has no room for the model.
    """
    with _opened(Path(path), dtype, param_dtype) as (config, boxed, tensors, table):
        return config, jax.tree_util.tree_map_with_path(functools.partial(_map, tensors, table, folder),
                                                        nn.unbox(boxed))


@contextlib.contextmanager
def _opened(path: Path, dtype: str, param_dtype: str) -> Iterator[
        tuple[ModelConfig, Any, Mapping[str, Any], Mapping[str, Source]]]:
    """The config, the abstract parameters with their axes, the checkpoint's tensors, and where leaves lie in them."""
    with contextlib.ExitStack() as stack:
        values, tensors, config = _read(path)
        config = dataclasses.replace(config, dtype=from_dict(DType, dtype, "dtype"),
                                     param_dtype=from_dict(DType, param_dtype, "param_dtype"))
        tensors = tensors or open_tensors(path, stack)
        boxed = _boxed(config)
        table = _MODEL_TYPES[values["model_type"]].sources(config, nn.unbox(boxed)["layers"])
        _check(tensors, table, nn.unbox(boxed))
        yield config, boxed, tensors, table


def pretrained_config(path: str | Path) -> ModelConfig:
    """The config alone, without the weights. Raises: as `load_pretrained`."""
    return _read(Path(path))[2]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any], ModelConfig]:
    """The values of a `config.json`, the tensors of a `.gguf` file, none of a folder, and the config, of float32."""
    if path.suffix == ".gguf":
        values, tensors, inv_freq = gguf_file.open_file(path)
        return values, tensors, dataclasses.replace(config_from_hf(values), inv_freq=inv_freq)
    values = load_json(dict, path / CONFIG)
    return values, {}, config_from_hf(values)


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a `config.json`.

    Raises:
      ValueError: a value is missing, of another type or makes no sense.
      NotImplementedError: another `model_type`, or what the model of that type does not compute here.
    """
    model_type = values.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise NotImplementedError(f"model_type={model_type!r}: only {', '.join(_MODEL_TYPES)} checkpoints can be read")
    return _MODEL_TYPES[model_type].read_config(values)


def save_pretrained(
    folder: str | Path, config: ModelConfig, params: Any, *, context_length: int, tokenizer: Tokenizer | None = None,
    add_bos_token: bool = False, model_type: str | None = None, dtype: str | None = None,
    shard_bytes: int = 4_000_000_000,
) -> None:
    """Writes a model as Hugging Face keeps it: `config.json`, `*.safetensors`, and the tokenizer's files.

    The folder appears when it is complete.

    Args:
      folder: does not exist yet, or is empty.
      params: layers stacked, as training keeps them.
      context_length: what the engine may serve, in tokens; our own config does not say.
      add_bos_token: the model was trained behind the tokenizer's begin token: engines are to put it before a text.
      model_type: None for `llama`, or `mistral` where the heads don't divide the model's width, with biases `qwen2`,
        with norms of heads `qwen3`, and for MFA `step3_text`.
      dtype: what tensors are stored as, `float32`, `bfloat16` or `float16`; None for `config.param_dtype`.
      shard_bytes: a file is at most about so large.

    Raises:
      ValueError: the folder is taken, the parameters are not those of the config, a tokenizer larger than the
        vocabulary, or a value that makes no sense.
      NotImplementedError: a model that no architecture of public checkpoints computes, naming what could be done.
    """
    folder, dtype = Path(folder), dtype or config.param_dtype
    require_free(folder)
    require(dtype in _WRITTEN_TYPES, "dtype", dtype, f"must be one of {', '.join(_WRITTEN_TYPES)}")
    require(context_length >= 1, "context_length", context_length, "must be at least 1")
    if tokenizer is not None:
        require(tokenizer.vocab_size <= config.vocab_size, "tokenizer.vocab_size", tokenizer.vocab_size,
                f"must be at most the model's vocab_size={config.vocab_size}")
    require(not add_bos_token or tokenizer is not None, "add_bos_token", add_bos_token, "needs a tokenizer")
    model_type = model_type or _default_model_type(config)
    require(model_type in _MODEL_TYPES, "model_type", model_type, f"must be one of {', '.join(_MODEL_TYPES)}")
    family = _MODEL_TYPES[model_type]
    _refuse_unwritable(config, family)
    # Left out, the special tokens would be those of the architecture's first model.
    values = {**family.write_config(config, model_type, context_length), "torch_dtype": dtype,
              "eos_token_id": None, "bos_token_id": None}
    if family is step3 and config.tie_embeddings:
        config, params = dataclasses.replace(config, tie_embeddings=False), {**params, "unembed": params["embed"]}
    abstract = nn.unbox(_boxed(config))
    tensors = _tensors(family.sources(config, abstract["layers"]), abstract, params)

    with appearing(folder) as partial:
        write_tensors(partial, tensors, jnp.dtype(dtype), shard_bytes)
        if tokenizer is not None:
            values |= save_tokenizer(partial, tokenizer, context_length, add_bos_token=add_bos_token)
        (partial / CONFIG).write_text(to_json(values) + "\n")


def _default_model_type(config: ModelConfig) -> str:
    attention = config.attention
    if isinstance(attention, MFAConfig):
        return step3.MODEL_TYPE
    if isinstance(attention, GQAConfig):
        if attention.qk_norm or attention.qkv_bias:
            return "qwen3" if attention.qk_norm else "qwen2"
        return "mistral" if config.model_dim % attention.num_heads else "llama"
    writable = (isinstance(attention, MFAKRConfig) and attention.reuse == "pre_rope" and attention.query_norm
                and config.inv_freq is None)
    remedy = ("`convert.expand_key_reuse` makes the MFA model that computes the same, with twice the cache, which can "
              "be written" if writable else "decode it with this library")
    raise NotImplementedError(f"attention={attention.variant}: no public architecture that engines serve computes it; "
                              f"{remedy}")


def _refuse_unwritable(config: ModelConfig, family: ModuleType) -> None:
    kind = MFAConfig if family is step3 else GQAConfig
    require(isinstance(config.attention, kind), "attention", config.attention.variant,
            f"must be {'mfa' if family is step3 else 'mha, gqa or mqa'} for this model_type")
    if config.position.kind != "rope":
        raise NotImplementedError(f"position={config.position.kind!r}: public architectures rotate; a model that is "
                                  f"trained with rope can be written")
    if config.inv_freq is not None:
        raise NotImplementedError("inv_freq: a config.json has one base and scaling for all layers and pairs; decode "
                                  "this model with this library, or write what it was converted from, if it was")


def _boxed(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))


def _key(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# ---- in --------------------------------------------------------------------------------------------------------


def _check(tensors: Mapping[str, Any], table: Mapping[str, Source], abstract: Any) -> None:
    """Raises unless the tensors are those of the model, all of them and no others; says all that is wrong with them."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        source = table[_key(path)]
        expected.update((name, source.stored_shape(leaf.shape)) for name in source.names)
    # Early checkpoints hold the rope frequencies, which follow from the config.
    found = {name for name in tensors if not name.endswith(".rotary_emb.inv_freq")}
    head, embed = "lm_head.weight", table["embed"].name
    if head in found - set(expected) and embed in found:
        require(equal(tensors[head], tensors[embed]), "tie_word_embeddings", True,
                f"must be false, {head} differs from {embed}")
        found.remove(head)
    stored = {name: tuple(tensors[name].get_shape()) for name in found}
    wrong = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in found],
        "left over": [f"{name} {stored[name]}" for name in found - set(expected)],
        "of another shape": [
            f"{name} {stored[name]} instead of {shape}" + " (it is transposed)" * (stored[name] == shape[::-1])
            for name, shape in expected.items() if name in found and stored[name] != shape],
    }
    require(not any(wrong.values()), "checkpoint",
            "; ".join(f"{what}: {shorten(names)}" for what, names in wrong.items() if names),
            "must hold the tensors of the config's model, all of them and no others")
    for name in expected:
        if tensors[name].get_dtype() not in _STORED_TYPES:
            raise NotImplementedError(f"{name} is stored as {tensors[name].get_dtype()}; only "
                                      f"{', '.join(_STORED_TYPES)} can be read")


def _load(
    tensors: Mapping[str, Any], table: Mapping[str, Source], path: Any, leaf: Any, where: NamedSharding
) -> jax.Array:
    """One leaf, placed: of each distinct part, one copy is read."""
    source = table[_key(path)]
    shape, stacked = source.own_shape(leaf.shape), source.layers is not None
    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        if str(index) not in parts:
            own = index[1:] if stacked else index
            found = [read_part(tensors[name], source.merged, shape, own).astype(leaf.dtype)
                     for name in source.names[index[0] if stacked else slice(None)]]
            parts[str(index)] = np.stack(found) if stacked else found[0]
        return parts[str(index)]

    return jax.make_array_from_callback(leaf.shape, where, part)


def _map(tensors: Mapping[str, Any], table: Mapping[str, Source], folder: Path, path: Any, leaf: Any) -> np.ndarray:
    """One leaf, in a file of the folder."""
    source, stacks = table[_key(path)], Stacks(folder)
    shape = source.own_shape(leaf.shape)
    for name in source.names:
        whole = read_part(tensors[name], source.merged, shape, tuple(slice(size) for size in shape))
        stacks.append({"leaf": whole.astype(leaf.dtype)})
    found = stacks.arrays()["leaf"]
    return found[0] if source.layers is None else found


# ---- out -------------------------------------------------------------------------------------------------------


def _tensors(
    table: Mapping[str, Source], abstract: Any, params: Any
) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """Shape of each tensor of the checkpoint, and what makes it, in the order of the layers."""
    leaves = {_key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    expected = {_key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    require(set(leaves) == set(expected), "params", shorten(set(leaves) ^ set(expected)),
            "must be the stacked parameters of the config, all of them and no others")
    found: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]] = {}
    for key, source in table.items():
        leaf, shape = leaves[key], expected[key].shape
        require(leaf.shape == shape, f"params {key}", leaf.shape, f"the config asks for shape {shape}")
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise NotImplementedError(f"params {key}: lies on devices of other processes; write from one process")
        for i, name in enumerate(source.names):
            def make(source: Source = source, leaf: Any = leaf, i: int = i) -> np.ndarray:
                return source.merge(np.asarray(leaf if source.layers is None else leaf[i]))

            found[name] = (source.stored_shape(shape), make)
    return dict(sorted(found.items(), key=lambda item: _layer_of(item[0])))


def _layer_of(name: str) -> tuple[int, str]:
    number = name.removeprefix("model.layers.").partition(".")[0]
    return (int(number), name) if number.isdigit() else (-1, name)
