"""GGUF files, read through the `gguf` package (`pip install "mfa_jax[gguf]"`): config and weights.

A file is presented as what the rest of this package reads: the values of a `config.json`, and lazy tensors under
Hugging Face's names. Quantized tensors become float32, as far as `gguf` can dequantise their type, and only the rows
that are asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mfa_jax.config import RopeScaling, require
from mfa_jax.positions import rope_frequencies

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_CONFIG_KEYS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "context_length": "max_position_embeddings",
    "attention.sliding_window": "sliding_window",
}
_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_LLAMA3_ORIGINAL = 8192
"""Context of Llama 3 before it was extended, in tokens."""


class Tensor:
    """One tensor, behind the methods of a slice of a safetensors file."""

    def __init__(self, tensor: Any, heads: int | None = None) -> None:
        """Args: the reader's tensor, and the heads whose rows it keeps in pairs (see `_half_split`)."""
        self._tensor = tensor
        self._shape = [int(size) for size in reversed(tensor.shape)]
        self._heads = heads

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        """What `__getitem__` yields."""
        return "F32"

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        # Not before it is read: a tensor of another shape, whose rows these heads don't divide, is refused by then.
        rows = first if self._heads is None else _half_split(self._shape[0], self._heads)[first]
        # Blocks of a quantized type lie along the last axis, so that rows can be taken before it is unpacked.
        data = _gguf().dequantize(self._tensor.data[rows], self._tensor.tensor_type)
        return np.asarray(data, np.float32)[(slice(None), *rest)]


def open_file(path: Path) -> tuple[dict[str, Any], dict[str, Any], tuple[tuple[float, ...], ...] | None]:
    """The values of a `config.json`, the tensors, and the rope frequencies of each layer where the file gives factors.

    Raises:
      ValueError: not a GGUF file, or one that is cut short; or a value is missing.
      NotImplementedError: a part of a split file, another architecture, layers of different sizes, a type that `gguf`
        cannot dequantise, a rope scaling that ours lacks, or rope on a part of each head; or the package `gguf` is not
        installed.
    """
    reader = open_reader(path)
    values = _config(reader)
    rotated = values["model_type"] == "llama"
    heads = {"attn_q": values["num_attention_heads"], "attn_k": values["num_key_value_heads"]}
    tensors: dict[str, Any] = {}
    factors = None
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            factors = np.asarray(tensor.data, np.float64)
            continue
        _require_readable(tensor)
        parts = tensor.name.split(".")
        kind = parts[2] if parts[0] == "blk" and len(parts) > 2 else ""
        tensors[_hf_name(tensor.name)] = Tensor(tensor, heads.get(kind) if rotated else None)
    inv_freq = None if factors is None else _frequencies(values, factors)
    return values, tensors, inv_freq


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise NotImplementedError("reading .gguf files needs the package gguf: pip install 'mfa_jax[gguf]'") from error
    return gguf


def open_reader(path: Path) -> Any:
    gguf = _gguf()
    require(path.is_file(), "checkpoint", str(path), "no such file")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"checkpoint={str(path)!r}: is not a GGUF file, or is cut short ({error})") from error
    parts = read_value(reader, "split.count") or 1
    if parts > 1:
        raise NotImplementedError(f"split.count={parts}: {path} is a part of a file; only whole ones can be read, "
                                  f"llama-gguf-split --merge makes one")
    return reader


def read_value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _same_in_layers(reader: Any, key: str) -> Any:
    """A value that a file may give once, or for each layer.

    Raises:
      NotImplementedError: it is not the same in all layers.
    """
    value = read_value(reader, key)
    if not isinstance(value, list):
        return value
    if len(set(value)) > 1:
        raise NotImplementedError(f"{key}={value}: differs by layer; only files whose layers are alike can be read")
    return value[0] if value else None


def _config(reader: Any) -> dict[str, Any]:
    name = read_value(reader, "general.architecture")
    if name not in _ARCHITECTURES:
        raise NotImplementedError(f"general.architecture={name!r}: only {', '.join(_ARCHITECTURES)} files can be read")
    values = {ours: value for key, ours in _CONFIG_KEYS.items() if (value := _same_in_layers(reader, f"{name}.{key}"))}
    for key in ("attention.head_count", "embedding_length"):
        require(isinstance(values.get(_CONFIG_KEYS[key]), int), f"{name}.{key}", values.get(_CONFIG_KEYS[key]),
                "must be in the file, an integer")
    head_dim = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
    rotated = read_value(reader, f"{name}.rope.dimension_count")
    if rotated not in (None, head_dim):
        raise NotImplementedError(f"{name}.rope.dimension_count={rotated}: rope turns whole heads only, of "
                                  f"{head_dim} dimensions here")
    if "rms_norm_eps" in values:  # stored in float32: 1e-05 is what 9.999999747378752e-06 was
        values["rms_norm_eps"] = float(str(np.float32(values["rms_norm_eps"])))
    if "head_dim" in values:
        require(read_value(reader, f"{name}.attention.value_length") in (None, values["head_dim"]),
                f"{name}.attention.value_length", read_value(reader, f"{name}.attention.value_length"),
                f"must be key_length={values['head_dim']}")
    names = {tensor.name: tensor for tensor in reader.tensors}
    require("token_embd.weight" in names, "checkpoint", "token_embd.weight", "is missing from the file")
    return {
        "model_type": name, "num_key_value_heads": values["num_attention_heads"],
        "use_sliding_window": "sliding_window" in values, **values,
        "vocab_size": int(names["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in names, "rope_scaling": _rope_scaling(reader, name),
    }


def _rope_scaling(reader: Any, name: str) -> dict[str, Any] | None:
    """As llama.cpp reads it: linear unless a type is named, by an older key's factor where the newer is missing."""
    settings = {key.removeprefix(f"{name}.rope.scaling."): read_value(reader, key) for key in reader.fields
                if key.startswith(f"{name}.rope.scaling.")}
    kind, original = settings.pop("type", "linear"), settings.pop("original_context_length", None)
    factor = settings.pop("factor", read_value(reader, f"{name}.rope.scale_linear"))
    settings.pop("finetuned", None)
    if settings or kind not in ("none", "linear", "yarn"):
        raise NotImplementedError(f"{name}.rope.scaling type={kind!r}, {settings}: only linear and yarn without "
                                  f"further settings can be read")
    if kind == "none" or factor in (None, 0, 1):
        return None
    rope = {"rope_type": kind, "factor": factor}
    return rope if kind == "linear" else {**rope, "original_max_position_embeddings": original}


def _frequencies(values: dict[str, Any], factors: np.ndarray) -> tuple[tuple[float, ...], ...] | None:
    """`base ** (-2 j / H) / factor_j`, the same for all layers: how files keep Llama 3.1's scaling.

    Where the factors are that scaling's, it is put into `values`; there and for factors of one the answer is None.
    """
    for name in ("rope_theta", "num_hidden_layers"):
        require(name in values, name, None, "is missing from the file, which has factors of its rope frequencies")
    if values["rope_scaling"] is not None:
        raise NotImplementedError(f"rope_freqs.weight beside rope_scaling={values['rope_scaling']}: only one of them "
                                  f"can be read")
    if np.all(factors == 1):
        return None
    width, base = 2 * len(factors), values["rope_theta"]
    row = base ** (-np.arange(0, width, 2, dtype=np.float64) / width) / factors
    # Files do not name the settings; all models of that scaling so far have these.
    scaling = RopeScaling("llama3", max(1.0, float(factors.max())), _LLAMA3_ORIGINAL)
    if np.allclose(row, rope_frequencies(width, base, scaling), rtol=1e-6, atol=0):
        values["rope_scaling"] = {
            "rope_type": "llama3", "factor": scaling.factor, "original_max_position_embeddings": _LLAMA3_ORIGINAL,
            "low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        return None
    return (tuple(row.astype(np.float32).tolist()),) * values["num_hidden_layers"]


def _half_split(rows: int, heads: int) -> np.ndarray:
    """The stored row of each of our rows.

    Llama files keep a head's rows in pairs that turn together, `(j, H/2 + j)`, one after the other; ours keep the
    first halves of all pairs before the second.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; an unknown one keeps its own, and is refused with those left over."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{_BLOCK_NAMES[parts[2]]}.{parts[3]}"
    return f"{_GLOBAL_NAMES[parts[0]]}.{parts[1]}" if len(parts) == 2 and parts[0] in _GLOBAL_NAMES else name


def _require_readable(tensor: Any) -> None:
    gguf = _gguf()
    kind = tensor.tensor_type
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    if kind in plain:
        return
    try:
        gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
    except NotImplementedError as error:
        raise NotImplementedError(f"{tensor.name} is stored as {kind.name}, which gguf cannot dequantise") from error
