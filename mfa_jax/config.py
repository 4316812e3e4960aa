"""What a run is made of: frozen, hashable dataclasses, checked once when they are built, JSON both ways.

Every error is a `ValueError` that names the field, the value and what would be accepted. Frozen configs are
static arguments of `jax.jit`: two equal configs share one compilation.
"""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

DType = Literal["float32", "bfloat16"]


def require(condition: bool, field: str, value: object, accepted: str) -> None:
    """Raises `ValueError("field=value: accepted")` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{field}={value!r}: {accepted}")


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 1, name, value, "must be at least 1")


# ---- positions and attention -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rope frequencies of a model are stretched for longer contexts (as Hugging Face's `rope_scaling`)."""

    kind: Literal["linear", "llama3", "yarn"] = "linear"
    factor: float = 1.0
    """Context extension: new length over original length."""
    original_max_positions: int = 8192
    """Context length before the extension (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original / this are fully stretched."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original / this are left alone."""
    beta_fast: float = 32.0
    """yarn: rotations over the original context above which a frequency is left alone."""
    beta_slow: float = 1.0
    """yarn: rotations below which a frequency is fully stretched."""
    attention_factor: float | None = None
    """yarn: rotated queries and keys are multiplied by this; None means 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        require(self.factor >= 1, "factor", self.factor, "must be at least 1")
        _require_positive(self, "original_max_positions")
        require(self.high_freq_factor > self.low_freq_factor, "high_freq_factor", self.high_freq_factor,
                f"must exceed low_freq_factor={self.low_freq_factor}")
        require(self.beta_fast > self.beta_slow, "beta_fast", self.beta_fast,
                f"must exceed beta_slow={self.beta_slow}")


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """How attention learns where a token stands."""

    kind: Literal["rope", "alibi", "none"] = "rope"
    base: float = 500000.0
    """Rope base: frequency j of a width W is base**(-2j/W)."""
    scaling: RopeScaling | None = None
    """Context extension of the rope frequencies; None for none."""

    def __post_init__(self) -> None:
        require(self.base > 1, "base", self.base, "must exceed 1")
        require(self.scaling is None or self.kind == "rope", "scaling", self.scaling,
                f"only kind='rope' can be scaled, not kind={self.kind!r}")


@dataclasses.dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention: MHA when `num_kv_heads == num_heads`, MQA when it is 1."""

    kind: Literal["gqa"] = "gqa"
    num_heads: int = 8
    """N, query heads."""
    num_kv_heads: int = 8
    """K, key and value heads; divides N."""
    head_dim: int = 64
    """H, width of a head."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")

    @property
    def variant(self) -> str:
        """`mha`, `gqa` or `mqa`, by the number of key heads."""
        return {self.num_heads: "mha", 1: "mqa"}.get(self.num_kv_heads, "gqa")

    @property
    def rotated_dim(self) -> int:
        """Width that rope rotates."""
        return self.head_dim


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds a latent and one rope key."""

    kind: Literal["mla"] = "mla"
    num_heads: int = 8
    """N, query heads."""
    nope_dim: int = 64
    """Width of a head's key that is read from the latent; a head's key width is H = nope_dim + rope_dim."""
    rope_dim: int = 32
    """R, width of the rope key that all heads share."""
    value_dim: int = 64
    """h, width of a head's value."""
    latent_dim: int = 256
    """C, width of the cached latent."""
    query_rank: int | None = None
    """Q, width of the query's own normed latent; None projects the query directly."""
    norm_eps: float = 1e-6
    """Epsilon of the norms of both latents."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_heads", "nope_dim", "rope_dim", "value_dim", "latent_dim")
        require(self.query_rank is None or self.query_rank >= 1, "query_rank", self.query_rank,
                "must be at least 1, or none")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "must be positive")

    @property
    def variant(self) -> str:
        return self.kind

    @property
    def rotated_dim(self) -> int:
        """Width that rope rotates."""
        return self.rope_dim


@dataclasses.dataclass(frozen=True)
class MFAConfig:
    """Multi-matrix factorization attention (arXiv 2412.19255, section 3): one wide key and value for all heads."""

    kind: Literal["mfa"] = "mfa"
    num_heads: int = 16
    """N, query heads."""
    latent_dim: int = 128
    """C, width of the shared key and value and of each query head."""
    query_rank: int = 128
    """Q, width of the shared query latent (the paper takes Q = C, Step-3 takes Q = 2048 for C = 256)."""
    query_norm: bool = True
    """RMSNorm on the query latent."""
    norm_eps: float = 1e-5
    """Epsilon of that norm."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_heads", "latent_dim", "query_rank")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "must be positive")

    @property
    def variant(self) -> str:
        return self.kind

    @property
    def rotated_dim(self) -> int:
        """Width that rope rotates."""
        return self.latent_dim


@dataclasses.dataclass(frozen=True)
class MFAKRConfig:
    """MFA with key reuse (arXiv 2412.19255, section 3): values are `k + alpha * (N_kr k)`, only the key is cached."""

    kind: Literal["mfa_kr"] = "mfa_kr"
    num_heads: int = 16
    """N, query heads."""
    latent_dim: int = 128
    """C, width of the shared key and of each query head."""
    query_rank: int = 128
    """Q, width of the shared query latent."""
    query_norm: bool = True
    """RMSNorm on the query latent."""
    norm_eps: float = 1e-5
    """Epsilon of that norm."""
    reuse: Literal["pre_rope", "post_rope"] = "pre_rope"
    """Which key the value reuses. pre_rope makes the value a fixed linear map of the token, whatever its position."""
    alpha_init: float = 0.0
    """Initial value of every element of alpha; 0 starts with values equal to keys."""
    n_kr_init_scale: float = 1.0
    """N_kr starts normal with standard deviation this / sqrt(C)."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_heads", "latent_dim", "query_rank")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "must be positive")
        require(self.n_kr_init_scale >= 0, "n_kr_init_scale", self.n_kr_init_scale, "must not be negative")

    @property
    def variant(self) -> str:
        return self.kind

    @property
    def rotated_dim(self) -> int:
        """Width that rope rotates."""
        return self.latent_dim


AttentionConfig = Union[GQAConfig, MLAConfig, MFAConfig, MFAKRConfig]
VARIANTS = ("mha", "gqa", "mqa", "mla", "mfa", "mfa_kr")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model: pre-norm RMSNorm, attention, SwiGLU."""

    vocab_size: int = 264
    """V, token ids are 0 .. V - 1."""
    num_layers: int = 2
    """L, blocks."""
    model_dim: int = 64
    """D, width of the residual stream."""
    ffn_dim: int = 192
    """F, hidden width of the SwiGLU feed-forward."""
    attention: AttentionConfig = dataclasses.field(default_factory=MFAConfig)
    """The attention variant and its widths."""
    position: PositionConfig = dataclasses.field(default_factory=PositionConfig)
    """Rope, ALiBi or none."""
    inv_freq: tuple[tuple[float, ...], ...] | None = None
    """Rope frequencies of each layer, [L, rotated width / 2], in place of base and scaling; None for those."""
    tie_embeddings: bool = True
    """Read logits out with the embedding table."""
    norm_eps: float = 1e-5
    """Epsilon of the block norms and the final norm."""
    dtype: DType = "float32"
    """What the forward pass computes in; softmax, norms, angles and loss stay in float32."""
    param_dtype: DType = "float32"
    """What parameters are stored in."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, everything in a block."""
    attention_implementation: Literal["auto", "dense", "blockwise", "splash", "cudnn", "tokamax"] = "auto"
    """Attention for training and prefill, by name; auto resolves by device and size and can be asked (`core.resolve`)."""
    depth_scaled_init: bool = True
    """Projections into the residual stream start smaller by sqrt(2 L)."""

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "num_layers", "model_dim", "ffn_dim")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "must be positive")
        width = self.attention.rotated_dim
        if self.position.kind == "rope":
            require(width % 2 == 0, _ROTATED_FIELD[self.attention.kind], width,
                    "rope rotates pairs, the width must be even")
        if self.inv_freq is not None:
            require(self.position.kind == "rope", "inv_freq", "given", f"needs rope, not {self.position.kind!r}")
            require(len(self.inv_freq) == self.num_layers and all(len(row) == width // 2 for row in self.inv_freq),
                    "inv_freq", f"{len(self.inv_freq)} rows",
                    f"must be num_layers={self.num_layers} rows of {width // 2} frequencies")


_ROTATED_FIELD = {"gqa": "head_dim", "mla": "rope_dim", "mfa": "latent_dim", "mfa_kr": "latent_dim"}


# ---- training --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    source: str = "stdlib"
    """`stdlib` (the source of Python's standard library), a file, a folder, or `hf:NAME[:SPLIT]` (a Hugging Face dataset)."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a `tokenizer.json`."""
    prepared: str | None = None
    """Folder of the token shards, written once; None for `<workdir>/data`."""
    sequence_length: int = 256
    """T, tokens a row."""
    batch_size: int = 16
    """Rows of a step over all devices and accumulation steps."""
    held_out: float = 0.02
    """Share of the documents kept for evaluation, never seen in training; chosen by a hash of the document."""
    text_field: str = "text"
    """Field of a JSONL or Hugging Face row that holds the document."""
    separate_documents: bool = True
    """Documents packed in one row do not see each other."""
    seed: int = 0
    """Seed of the shuffle."""

    def __post_init__(self) -> None:
        _require_positive(self, "batch_size")
        require(self.sequence_length >= 2, "sequence_length", self.sequence_length, "must be at least 2")
        require(0 <= self.held_out < 1, "held_out", self.held_out, "must be in [0, 1)")
        require(bool(self.source), "source", self.source, "must be stdlib, a path, or hf:NAME")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, its schedule, and what bounds the update."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the update of each projection; norms, alpha and embeddings stay with AdamW."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay, warm-up-stable-decay (linear decay at the end), or none."""
    warmup_steps: int = 50
    """Steps of linear warm-up from zero."""
    schedule_steps: int | None = None
    """Length of the whole schedule in steps; None for the run's `steps`."""
    final_fraction: float = 0.1
    """Learning rate at the end over the peak."""
    decay_fraction: float = 0.2
    """wsd: share of the schedule that decays."""
    weight_decay: float = 0.1
    """Decoupled weight decay; never on norms or alpha."""
    decay_embeddings: bool = False
    """Whether embedding and output tables decay too."""
    b1: float = 0.9
    """Decay of the first moment (muon: momentum is 0.95, this serves its AdamW part)."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None for no clipping."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be positive")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must not be negative")
        require(self.schedule_steps is None or self.schedule_steps > self.warmup_steps, "schedule_steps",
                self.schedule_steps, f"must exceed warmup_steps={self.warmup_steps}, or none")
        require(0 <= self.final_fraction <= 1, "final_fraction", self.final_fraction, "must be in [0, 1]")
        require(0 < self.decay_fraction <= 1, "decay_fraction", self.decay_fraction, "must be in (0, 1]")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must not be negative")
        require(0 <= self.b1 < 1, "b1", self.b1, "must be in [0, 1)")
        require(0 <= self.b2 < 1, "b2", self.b2, "must be in [0, 1)")
        require(self.eps > 0, "eps", self.eps, "must be positive")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm,
                "must be positive, or none")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Size of each mesh axis; one of them may be -1: all the devices that the others leave."""

    data: int = -1
    """Replicas of the parameters, each with its share of the batch."""
    fsdp: int = 1
    """Shards of the parameters, each with its share of the batch."""
    expert: int = 1
    """Shards of the experts (no use in a dense model)."""
    context: int = 1
    """Shards of the sequence."""
    tensor: int = 1
    """Shards of heads, feed-forward and vocabulary."""

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        for field, size in zip(dataclasses.fields(self), sizes, strict=True):
            require(size >= 1 or size == -1, field.name, size, "must be at least 1, or -1 for the rest")
        require(sizes.count(-1) <= 1, "mesh", sizes, "only one axis may be -1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    workdir: str = "runs/default"
    """Folder of everything the run writes; an existing run there is resumed."""
    preset: str | None = None
    """Name of the preset the model came from, for the record."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    steps: int = 500
    """Optimizer steps of the whole run, those of earlier starts counted in."""
    accumulate: int = 1
    """Parts the batch is computed in; gradients are summed over them."""
    seed: int = 0
    """Seed of the initial parameters."""
    z_loss: float = 0.0
    """Weight of the squared log-partition in the loss (1e-4 keeps logits from drifting)."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, kept beside them; None for none."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    eval_every: int = 100
    """Steps between two evaluations on the held-out documents; 0 for the end only."""
    eval_batches: int = 8
    """Batches of an evaluation."""
    save_every: int = 100
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: int = 3
    """How many of the latest checkpoints stay; the one with the lowest held-out loss stays besides."""

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "accumulate", "log_every", "eval_batches", "save_every", "keep_checkpoints")
        require(bool(self.workdir), "workdir", self.workdir, "must name a folder")
        require(self.eval_every >= 0, "eval_every", self.eval_every, "must not be negative")
        require(self.z_loss >= 0, "z_loss", self.z_loss, "must not be negative")
        require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay,
                "must be in (0, 1), or none")
        if self.data.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.data.batch_size} is not a multiple of accumulate={self.accumulate}")


# ---- JSON ------------------------------------------------------------------------------------------------------


def to_dict(config: Any) -> Any:
    """A config as plain dicts, lists and scalars, ready for `json.dumps`."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [to_dict(v) for v in config] if isinstance(config, (tuple, list)) else config


def from_dict(kind: Any, value: Any, where: str = "config") -> Any:
    """The config of type `kind` that `to_dict` made `value` from; strict, with the path of what is wrong.

    Raises:
      ValueError: an unknown field, a value of another type, or what the config itself refuses.
    """
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), where, value, f"must be an object with the fields of {kind.__name__}")
        hints = get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        require(not unknown, where, unknown, f"unknown field; accepted: {', '.join(sorted(hints))}")
        fields = {name: from_dict(hints[name], item, f"{where}.{name}") for name, item in value.items()}
        try:
            return kind(**fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if get_origin(kind) in (Union, types.UnionType):
        return _union_from_dict(get_args(kind), value, where)
    if get_origin(kind) is Literal:
        require(value in get_args(kind), where, value, f"must be one of {', '.join(map(str, get_args(kind)))}")
        return value
    if get_origin(kind) is tuple:
        require(isinstance(value, (list, tuple)), where, value, "must be a list")
        return tuple(from_dict(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(isinstance(value, kind) and not (kind is int and isinstance(value, bool)), where, value,
            f"must be of type {kind.__name__}")
    return value


def _union_from_dict(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    if dataclasses.is_dataclass(members[0]) and type(None) not in members:
        require(isinstance(value, dict) and "kind" in value, where, value, "must be an object with a `kind`")
        kinds = {get_args(get_type_hints(m)["kind"])[0]: m for m in members}
        require(value["kind"] in kinds, f"{where}.kind", value["kind"], f"must be one of {', '.join(kinds)}")
        return from_dict(kinds[value["kind"]], value, where)
    return from_dict(next(m for m in members if m is not type(None)), value, where)


def to_json(config: Any) -> str:
    return json.dumps(to_dict(config), indent=2)


def load_json(kind: Any, path: str | Path) -> Any:
    """Reads a config of type `kind` from a JSON file.

    Raises:
      ValueError: the file is missing, not JSON, or not such a config.
    """
    try:
        value = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"config={str(path)!r}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"config={str(path)!r}: is not JSON ({error})") from error
    return from_dict(kind, value)
