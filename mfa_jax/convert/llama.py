"""Hugging Face Llama checkpoints (`config.json` and `*.safetensors`), read into the GQA model.

Both sides rotate half-split and keep one matrix per projection, so that every tensor is used as it is, transposed and
with its heads split. Mistral checkpoints without a sliding window are the same model under another name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from mfa_jax import axes
from mfa_jax.config import DType, GQAConfig, ModelConfig, PositionConfig, RopeScaling, from_dict, load_json, require
from mfa_jax.convert.tensors import Merged, equal, open_tensors, read_part, shorten
from mfa_jax.model.transformer import Transformer

# What a config.json may leave out, with the values that Hugging Face's config classes give it.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
}
_SHARED_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
# `finetuned` says how the weights came about and changes nothing in the forward pass.
_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
    "truncate", "finetuned",
}

# Our leaf -> the tensor's name ({} is the layer), and for each axis of the tensor the axes of our leaf (counted
# without the layer axis) that it is made of: q_proj [N H, D] is W_Q [D, N, H], so ((1, 2), (0,)).
_SOURCES: dict[str, tuple[str, Merged]] = {
    "embed": ("model.embed_tokens.weight", ((0,), (1,))),
    "unembed": ("lm_head.weight", ((0,), (1,))),
    "final_norm/scale": ("model.norm.weight", ((0,),)),
    "layers/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", ((0,),)),
    "layers/attention/W_Q": ("model.layers.{}.self_attn.q_proj.weight", ((1, 2), (0,))),
    "layers/attention/W_K": ("model.layers.{}.self_attn.k_proj.weight", ((1, 2), (0,))),
    "layers/attention/W_V": ("model.layers.{}.self_attn.v_proj.weight", ((1, 2), (0,))),
    "layers/attention/W_O": ("model.layers.{}.self_attn.o_proj.weight", ((2,), (0, 1))),
    "layers/ffn_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", ((0,),)),
    "layers/ffn/W_gate": ("model.layers.{}.mlp.gate_proj.weight", ((1,), (0,))),
    "layers/ffn/W_up": ("model.layers.{}.mlp.up_proj.weight", ((1,), (0,))),
    "layers/ffn/W_down": ("model.layers.{}.mlp.down_proj.weight", ((1,), (0,))),
}
_STORED_TYPES = ("F64", "F32", "F16", "BF16")


def load_llama(
    folder: str | Path, *, dtype: str = "float32", param_dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[ModelConfig, Any]:
    """The config and the parameters (layers stacked) of a checkpoint folder.

    Tensors are read one leaf at a time, and of each only what this process's devices hold, so that a model larger
    than the host's memory loads onto a mesh.

    Args:
      folder: holds `config.json` and the weights: `model.safetensors.index.json` and its shards, `model.safetensors`,
        or else every `*.safetensors` there.
      dtype: what the model computes in, `float32` or `bfloat16`.
      param_dtype: what parameters are cast to, whatever the files hold.
      mesh: where the parameters are placed, by the rules of `axes`; None for the first device.

    Raises:
      ValueError: a file is missing or broken; tensors are missing, left over or of another shape; a value of the
        config makes no sense; a size does not divide over the mesh.
      NotImplementedError: a model that ours does not compute (see `config_from_llama`), or quantized weights.
    """
    folder = Path(folder)
    config = dataclasses.replace(config_from_llama(load_json(dict, folder / "config.json")),
                                 dtype=from_dict(DType, dtype, "dtype"),
                                 param_dtype=from_dict(DType, param_dtype, "param_dtype"))
    mesh = mesh or axes.make_mesh((1,) * len(axes.MESH_AXES), jax.devices()[:1])
    boxed = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    abstract = nn.unbox(boxed)
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        _check(tensors, abstract)
        return config, jax.tree_util.tree_map_with_path(
            functools.partial(_load, tensors), abstract, axes.shardings(boxed, mesh))


def config_from_llama(config: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a Llama (or windowless Mistral) `config.json`, old and new spelling of the rope settings.

    Raises:
      ValueError: a value is missing, of another type or makes no sense.
      NotImplementedError: another `model_type`, biases, a sliding window, an activation other than silu, quantized
        weights, a rope type other than default, linear, llama3 and yarn, or a rope setting that ours does not have.
    """
    model_type = config.get("model_type")
    if model_type not in _DEFAULTS:
        raise NotImplementedError(f"model_type={model_type!r}: only {' and '.join(_DEFAULTS)} checkpoints can be read")
    values = {**_SHARED_DEFAULTS, **_DEFAULTS[model_type], **config}
    for name in ("attention_bias", "mlp_bias", "sliding_window", "quantization_config"):
        if values.get(name) not in (None, False):
            raise NotImplementedError(f"{name}={values[name]!r}: the model has no such thing; only checkpoints "
                                      f"without it can be read")
    if values["hidden_act"] != "silu":
        raise NotImplementedError(f"hidden_act={values['hidden_act']!r}: the feed-forward is SwiGLU, only silu")
    model_dim, num_heads = _get(values, "hidden_size", int), _get(values, "num_attention_heads", int)
    head_dim = _get(values, "head_dim", int, None)
    if head_dim is None:
        require(num_heads > 0 and model_dim % num_heads == 0, "num_attention_heads", num_heads,
                f"must divide hidden_size={model_dim} where no head_dim is given")
        head_dim = model_dim // num_heads
    base, scaling = _rope(values)
    return ModelConfig(
        vocab_size=_get(values, "vocab_size", int), num_layers=_get(values, "num_hidden_layers", int),
        model_dim=model_dim, ffn_dim=_get(values, "intermediate_size", int),
        attention=GQAConfig(num_heads=num_heads, head_dim=head_dim,
                            num_kv_heads=_get(values, "num_key_value_heads", int, num_heads)),
        position=PositionConfig(base=base, scaling=scaling),
        tie_embeddings=_get(values, "tie_word_embeddings", bool), norm_eps=_get(values, "rms_norm_eps", float),
    )


_REQUIRED: Any = object()


def _get(values: Mapping[str, Any], name: str, kind: Any, default: Any = _REQUIRED) -> Any:
    """A value of type `kind`; `default` where it is absent or null."""
    value = values.get(name)
    if value is not None:
        return from_dict(kind, value, name)
    require(default is not _REQUIRED, name, None, "is missing from config.json")
    return default


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (new), or `rope_scaling` and `rope_theta` (old)."""
    where = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = {key: value for key, value in _get(values, where, dict, {}).items() if value is not None}
    unknown = sorted(set(rope) - _ROPE_KEYS)
    if unknown:
        raise NotImplementedError(f"{where} holds {', '.join(unknown)}: what these would change is unknown")
    if {**values, **rope}.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise NotImplementedError("partial_rotary_factor: rope turns whole heads only")
    base = _get(rope, "rope_theta", float, None) or _get(values, "rope_theta", float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, RopeScaling("linear", factor=_get(rope, "factor", float))
    if kind not in ("llama3", "yarn"):
        raise NotImplementedError(f"rope type {kind!r}: only default, linear, llama3 and yarn can be read")
    original = (_get(values, "original_max_position_embeddings", int, None)
                or _get(rope, "original_max_position_embeddings", int, None)
                or _get(values, "max_position_embeddings", int))
    if kind == "llama3":
        factors = {name: _get(rope, name, float) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        return base, RopeScaling("llama3", original_max_positions=original, **factors)
    return base, _yarn(rope, original, values)


def _yarn(rope: Mapping[str, Any], original: int, values: Mapping[str, Any]) -> RopeScaling:
    if rope.get("truncate", True) is not True:
        raise NotImplementedError("truncate=False: yarn's range of pairs is rounded to whole pairs")
    factor = _get(rope, "factor", float, None) or _get(values, "max_position_embeddings", int) / original
    magnitude = _get(rope, "attention_factor", float, None)
    mscale, mscale_all = _get(rope, "mscale", float, 0.0), _get(rope, "mscale_all_dim", float, 0.0)
    if magnitude is None and mscale and mscale_all:
        magnitude = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    return RopeScaling(
        "yarn", factor=factor, original_max_positions=original, attention_factor=magnitude,
        beta_fast=_get(rope, "beta_fast", float, 32.0), beta_slow=_get(rope, "beta_slow", float, 1.0))


def _check(tensors: Mapping[str, Any], abstract: Any) -> None:
    """Raises unless the tensors are those of the model, all of them and no others."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name, merged, shape, layers = _source(path, leaf)
        stored = tuple(math.prod(shape[axis] for axis in group) for group in merged)
        expected.update((name.format(layer), stored) for layer in range(layers))
    # Early checkpoints hold the rope frequencies, which follow from the config.
    found = {name for name in tensors if not name.endswith(".rotary_emb.inv_freq")}
    head, embed = _SOURCES["unembed"][0], _SOURCES["embed"][0]
    if head in found - set(expected) and embed in found:
        require(equal(tensors[head], tensors[embed]), "tie_word_embeddings", True,
                f"must be false, {head} differs from {embed}")
        found.remove(head)
    missing, extra = set(expected) - found, found - set(expected)
    require(not missing, "checkpoint", shorten(missing), "these tensors are missing")
    require(not extra, "checkpoint", shorten(extra), "the model of config.json has no such tensors")
    for name, shape in expected.items():
        stored = tuple(tensors[name].get_shape())
        require(stored == shape, name, stored, f"config.json asks for shape {shape}")
        if tensors[name].get_dtype() not in _STORED_TYPES:
            raise NotImplementedError(f"{name} is stored as {tensors[name].get_dtype()}; only "
                                      f"{', '.join(_STORED_TYPES)} can be read")


def _source(path: Any, leaf: Any) -> tuple[str, Merged, tuple[int, ...], int]:
    """Where a leaf comes from: name and axes as in `_SOURCES`, the shape of one layer, the number of layers."""
    key = jax.tree_util.keystr(path, simple=True, separator="/")
    name, merged = _SOURCES[key]
    return (name, merged, leaf.shape[1:], leaf.shape[0]) if key.startswith("layers/") else (name, merged, leaf.shape, 1)


def _load(tensors: Mapping[str, Any], path: Any, leaf: Any, where: NamedSharding) -> jax.Array:
    """One leaf, placed: of each distinct part, one copy is read."""
    name, merged, shape, layers = _source(path, leaf)
    stacked = len(shape) < len(leaf.shape)
    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        if str(index) not in parts:
            own = index[1:] if stacked else index
            found = [read_part(tensors[name.format(layer)], merged, shape, own).astype(leaf.dtype)
                     for layer in range(layers)[index[0] if stacked else slice(None)]]
            parts[str(index)] = np.stack(found) if stacked else found[0]
        return parts[str(index)]

    return jax.make_array_from_callback(leaf.shape, where, part)
