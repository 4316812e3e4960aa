"""A training run: its data, optimizer and mesh, and how long it goes."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Literal

from mfa_jax.config.checks import require, require_positive
from mfa_jax.config.model import ModelConfig


def _require_folder(config: DataConfig | TrainConfig, name: str) -> None:
    place = getattr(config, name)
    require("://" not in (place or ""), name, place, "must be a folder; a bucket can be mounted as one")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    source: str = "stdlib"
    """`stdlib` (the source of Python's standard library), a file, a folder, or `hf:NAME[:SPLIT]` (a dataset of Hugging
    Face)."""
    tokenizer: str = "bytes"
    """`bytes`, a `tokenizer.json` or a folder with one, or a sentencepiece table `.bin`."""
    prepared: str | None = None
    """Folder of the token shards, written once; None for `<workdir>/data`."""
    sequence_length: int = 256
    """T, tokens a row."""
    batch_size: int = 16
    """Rows of a step over all devices and accumulation steps."""
    held_out: float = 0.02
    """Share of the documents kept for evaluation, never seen in training; chosen by a hash of the document."""
    held_out_source: str | None = None
    """Where the documents kept for evaluation come from, in place of a share of `source`: as `source` is given."""
    text_field: str = "text"
    """Field of a JSONL or Hugging Face row that holds the document."""
    separate_documents: bool = True
    """Documents packed in one row do not see each other."""
    add_bos_token: bool = False
    """Each row begins with the tokenizer's begin token, and with `separate_documents` each document in it, too, as
    models expect that were trained so (Llama, Mistral): it takes the place of the token before."""
    seed: int = 0
    """Seed of the shuffle, below 2^32. Epoch e is shuffled by seed + e: runs of several epochs that are to differ take
    seeds that lie further apart."""

    def __post_init__(self) -> None:
        require_positive(self, "batch_size")
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in 0 .. 2^32 - 1")
        _require_folder(self, "prepared")
        require(self.sequence_length >= 2, "sequence_length", self.sequence_length, "must be at least 2")
        require(0 <= self.held_out < 1, "held_out", self.held_out, "must be in [0, 1)")
        for name in ("source", "held_out_source"):
            require(getattr(self, name) != "", name, "", "must be stdlib, a path, or hf:NAME")
        require(self.held_out_source is None or self.held_out > 0, "held_out", self.held_out,
                f"holds nothing out, though held_out_source={self.held_out_source!r} is given")


@dataclasses.dataclass(frozen=True)
class GroupRates:
    """Learning rate of each group of parameters over that of the schedule. A group with 0 is frozen: its parameters
    stay as they are, bit for bit, and have no gradient and no optimizer state. A run may go on with other rates, but
    with the same groups frozen."""

    attention: float = 1.0
    """All that is in attention: projections, biases, alpha, norms of latents and heads."""
    feed_forward: float = 1.0
    """Feed-forward, experts and routers."""
    norms: float = 1.0
    """The norms before attention and feed-forward, and the last one."""
    embeddings: float = 1.0
    """The embedding and output tables."""

    def __post_init__(self) -> None:
        rates = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, rate in rates.items():
            require(0 <= rate < math.inf, name, rate, "must be 0 or positive")
        require(any(rates.values()), "rates", rates, "one of them must be positive, or nothing would train")


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
    rates: GroupRates = dataclasses.field(default_factory=GroupRates)
    """Learning rates by group of parameters, and what is frozen."""

    def __post_init__(self) -> None:
        require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "must be positive and finite")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must not be negative")
        require(self.schedule_steps is None or self.schedule_steps > self.warmup_steps, "schedule_steps",
                self.schedule_steps, f"must exceed warmup_steps={self.warmup_steps}, or none")
        require(0 <= self.final_fraction <= 1, "final_fraction", self.final_fraction, "must be in [0, 1]")
        require(0 < self.decay_fraction <= 1, "decay_fraction", self.decay_fraction, "must be in (0, 1]")
        require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "must be 0 or positive")
        require(0 <= self.b1 < 1, "b1", self.b1, "must be in [0, 1)")
        require(0 <= self.b2 < 1, "b2", self.b2, "must be in [0, 1)")
        require(0 < self.eps < math.inf, "eps", self.eps, "must be positive and finite")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm,
                "must be positive, or none")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """What a run learns from another model, its teacher, in place of the text alone.

    The loss of a target is `(1 - w) t^2 KL(softmax(l_teacher / t) || softmax(l / t)) + w nll`, with `t` the
    temperature and `w` the share of the cross entropy (Hinton et al., arXiv 1503.02531), plus the weight of the hidden
    states times the mean over layers of `|x - x_teacher|^2 / |x_teacher|^2`, `x` the residual stream after the layer.
    Where there are routers their balance loss is added.
    """

    teacher: str
    """A Hugging Face folder, a `.gguf` file or the folder of a run; it is read anew at each start."""
    tokenizer: str | None = None
    """Name of the tokenizer in the teacher's folder; None for what it holds."""
    temperature: float = 1.0
    """t"""
    cross_entropy: float = 0.0
    """w, in [0, 1]"""
    hidden: float = 0.0
    """Weight of the hidden states; above 0 the teacher must have as many layers of the same width."""

    def __post_init__(self) -> None:
        require(bool(self.teacher), "teacher", self.teacher, "must name a checkpoint or the folder of a run")
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "must be positive")
        require(0 <= self.cross_entropy <= 1, "cross_entropy", self.cross_entropy, "must be in [0, 1]")
        require(0 <= self.hidden < math.inf, "hidden", self.hidden, "must not be negative")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Size of each mesh axis; one of them may be -1: all the devices that the others leave."""

    data: int = -1
    """Replicas of the parameters, each with its share of the batch."""
    fsdp: int = 1
    """Shards of the parameters, each with its share of the batch."""
    expert: int = 1
    """Shards of the experts, each with its share of the batch (in a dense model it acts as data)."""
    context: int = 1
    """Shards of the sequence; 2 context must divide it."""
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
    """Folder of everything the run writes; an existing run there is resumed. A bucket can be mounted as one."""
    preset: str | None = None
    """Name of the preset to take the model from: by the flag (`--preset NAME --help` shows the flags of that model), or
    by a file that has no `model`. {tiny,nano,small,base}-{mha,gqa,mqa,mla,mfa,mfa-kr}, these with -moe for experts,
    paper-7b-{mha,mla,mfa,mfa-kr}, step3. In code it is a name and no more: give `model` with it."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    initial: str | None = None
    """Folder of a run of the same model, with whose newest parameters this one starts; they are evaluated first. None
    for new ones."""
    distillation: DistillationConfig | None = None
    """The model that this one learns from (`experiments.heal`); None to learn from the text alone."""
    steps: int = 500
    """Optimizer steps of the whole run, those of earlier starts counted in."""
    accumulate: int = 1
    """Parts the batch is computed in; gradients are summed over them."""
    seed: int = 0
    """Seed of the initial parameters, below 2^32."""
    z_loss: float = 0.0
    """Weight of the squared log-partition in the loss (1e-4 keeps logits from drifting)."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, kept beside them, which must be float32; None for none."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    eval_every: int = 100
    """Steps between two evaluations on the held-out documents; 0 for the end only."""
    eval_batches: int = 8
    """Batches of an evaluation."""
    save_every: int = 100
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: int = 3
    """How many of the latest checkpoints stay; the one with the lowest held-out loss stays besides, in distillation the
    one nearest to the teacher (`eval_kl`)."""
    on_save_failure: Literal["stop", "continue"] = "stop"
    """What a checkpoint, or a line of metrics, that cannot be written (disk full, ...) does to the run: it stops, or it
    goes on, tells, and tries again at the next line of metrics or save (in a run of one process); the save at the end
    of a run must succeed either way."""
    compilation_cache: str | None = None
    """Folder where compiled programs are kept, so that the next start need not compile: worth it wherever runs are
    restarted. It is trusted like code, grows without bound, and serves one kind of device and version of JAX. None
    leaves it to JAX_COMPILATION_CACHE_DIR: off unless that is set."""
    profile: tuple[int, int] | None = None
    """Two numbers: after how many steps a trace of the profiler begins, and how many steps it covers; it is written to
    `<workdir>/profile`. None for no trace."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "accumulate", "log_every", "eval_batches", "save_every", "keep_checkpoints")
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in 0 .. 2^32 - 1")
        require(bool(self.workdir), "workdir", self.workdir, "must name a folder")
        _require_folder(self, "workdir")
        require(self.eval_every >= 0, "eval_every", self.eval_every, "must not be negative")
        require(0 <= self.z_loss < math.inf, "z_loss", self.z_loss, "must be 0 or positive")
        require(self.distillation is None or self.z_loss == 0, "z_loss", self.z_loss,
                "must be 0 with distillation, where the teacher's logits hold those of the model")
        same = self.initial is not None and os.path.abspath(self.initial) == os.path.abspath(self.workdir)
        require(self.initial != "" and not same, "initial", self.initial,
                "must be the folder of another run than workdir, or none")
        require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay,
                "must be in (0, 1), or none")
        require(self.profile is None or (len(self.profile) == 2 and self.profile[0] >= 0 and self.profile[1] >= 1),
                "profile", self.profile, "must be a step from 0 on and a number of steps from 1 on, or none")
        if self.data.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.data.batch_size} is not a multiple of accumulate={self.accumulate}")
