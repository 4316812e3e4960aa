"""A model to run, from the folder of a run or from a checkpoint: what several scripts open, and their flags for it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from mfa_jax import axes
from mfa_jax.attention import decode_call
from mfa_jax.config import DType, GQAConfig, MeshConfig, ModelConfig, require
from mfa_jax.convert import load_pretrained, pretrained_tokenizer
from mfa_jax.data import Tokenizer, load_tokenizer
from mfa_jax.kernels import default_device, resolve, sharded
from mfa_jax.model.transformer import Transformer
from mfa_jax.train import cluster
from mfa_jax.train.run import TOKENIZER, load_trained

CacheDType = Literal["float32", "bfloat16", "int8", "float8_e4m3fn"]
DecodeKernel = Literal["auto", "reference", "xla", "mosaic_tpu", "mosaic_tpu_interpret", "mosaic_gpu",
                       "mosaic_gpu_interpret"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model, its parameters, and its tokenizer."""

    name: str
    """Where it was found, for messages and records."""
    model: Transformer
    params: Any
    tokenizer: Tokenizer
    add_bos_token: bool = False
    """Whether it is a run's that was trained, or converted, with a begin token before each row."""


ONE_DEVICE = MeshConfig(data=1)


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of a script that takes as many devices as it is told, the first ones; of several processes all.

    Raises:
      ValueError: there are not as many; with several processes, there are more.
    """
    require(jax.process_count() == 1 or config != ONE_DEVICE, "mesh", "one device",
            f"must be one of all {jax.device_count()} devices of the {jax.process_count()} processes")
    sizes = dataclasses.astuple(config)
    some = -1 not in sizes and jax.process_count() == 1
    return axes.make_mesh(sizes, jax.devices()[:math.prod(sizes)] if some else None)


@contextlib.contextmanager
def joined_mesh(config: MeshConfig) -> Iterator[Mesh]:
    """Inside, this process is one of its cluster's, and the mesh is set where it has more than one device.

    Raises:
      ValueError: what `make_mesh` and `cluster.joined` raise.
    """
    with cluster.joined():
        mesh = make_mesh(config)
        with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
            yield mesh


@dataclasses.dataclass(frozen=True)
class OpenConfig:
    """Which model is opened."""

    workdir: str | None = None
    """Folder of a run."""
    hf: str | None = None
    """Or a checkpoint: a Hugging Face folder or a .gguf file."""
    dtype: DType | None = None
    """What the model computes in; none for what a run says, and float32 for a checkpoint."""
    tokenizer: str | None = None
    """Name of the tokenizer in the folder of a checkpoint; none for what it holds."""
    step: int | None = None
    """Checkpoint of a run; none for the newest intact one."""
    ema: bool = False
    """Read the moving average of a run's weights."""

    def open(self, mesh: Mesh | None = None) -> Opened:
        """See `open_model`."""
        return open_model(self.workdir, self.hf, tokenizer=self.tokenizer, dtype=self.dtype, step=self.step,
                          ema=self.ema, mesh=mesh)

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer alone, which is read in no time. Raises: ValueError: there is none."""
        if self.hf is not None:
            return pretrained_tokenizer(self.hf, self.tokenizer)
        require(self.workdir is not None, "workdir", None, "give the folder of a run, or a checkpoint (--hf)")
        return load_tokenizer(Path(str(self.workdir)) / TOKENIZER)


@dataclasses.dataclass(frozen=True)
class DecodingConfig(OpenConfig):
    """Which model is opened, and how it decodes."""

    cache_dtype: CacheDType | None = None
    """Type of the cached arrays, those of 8 bits with a scale a token; none for the model's."""
    implementation: DecodeKernel | None = None
    """Decode kernel; auto takes the device's own where it can serve, none what the model's config says."""


def open_model(
    workdir: str | None, hf: str | None, *, tokenizer: str | None = None, dtype: DType | None = None,
    param_dtype: DType = "float32", step: int | None = None, ema: bool = False, mesh: Mesh | None = None,
) -> Opened:
    """The newest checkpoint of the run in `workdir` (or that of `step`), or the checkpoint at `hf`.

    Args:
      hf: a Hugging Face folder or a `.gguf` file.
      tokenizer: name of the tokenizer in the folder `hf`; None for what it holds.
      dtype: what the model computes in; None for what a run says, and float32 for a checkpoint.
      param_dtype: what the parameters of a checkpoint are held in; those of a run are as they were saved.
      mesh: where the parameters are placed; None for the first device.

    Raises:
      ValueError: not one of both; nothing there, or nothing that fits together.
      NotImplementedError: a checkpoint that ours does not compute.
    """
    require((workdir is None) != (hf is None), "workdir", workdir,
            f"give the folder of a run (--workdir) or a checkpoint (--hf, here {hf!r}), one of both")
    if workdir is not None:
        require(tokenizer is None, "tokenizer", tokenizer, "must be left out: a run keeps its own")
        trained = load_trained(workdir, step=step, ema=ema, mesh=mesh)
        config = trained.model.config
        config = dataclasses.replace(config, dtype=dtype or config.dtype)
        return Opened(f"{workdir}, step {trained.step}", Transformer(config), trained.params, trained.tokenizer,
                      trained.config.data.add_bos_token)
    assert hf is not None
    require(step is None and not ema, "step", step, "and ema are for the folder of a run")
    # First the small one: what is missing is told before a large model is read.
    found = pretrained_tokenizer(hf, tokenizer)
    config, params = load_pretrained(hf, dtype=dtype or "float32", param_dtype=param_dtype, mesh=mesh)
    require(found.vocab_size <= config.vocab_size, "tokenizer.vocab_size", found.vocab_size,
            f"must be at most the model's vocab_size={config.vocab_size}")
    return Opened(hf, Transformer(config), params, found)


def decode_kernel(
    config: ModelConfig, implementation: DecodeKernel | None, capacity: int, cache_dtype: str | None,
    rows: int | None = None,
) -> tuple[ModelConfig, str]:
    """The config with the decode kernel that was asked for (None: its own), and the name of what serves it here.

    Args:
      capacity: tokens that a row of the cache holds, of which a device of the ambient mesh may have a part.
      rows: of the batch, which say how the mesh splits the cache; None where batches differ: as on one device.

    Raises:
      ValueError: a layout that can't split this cache.
      NotImplementedError: the kernel can't serve this model on this device.
    """
    if implementation is not None:
        config = dataclasses.replace(config, decode_implementation=implementation)
    attention, sizes = config.attention, {} if rows is None else sharded.mesh_sizes() or {}
    K = attention.num_kv_heads if isinstance(attention, GQAConfig) else 1
    layout = sharded.choose(sizes, B=rows or 1, N=attention.num_heads, K=K, S=capacity, layout=config.decode_layout)
    call = decode_call(attention, config.position, capacity=capacity // math.prod(sizes[a] for a in layout.sequence),
                       dtype=config.dtype, cache_dtype=cache_dtype or config.dtype)
    if K == 1 and layout.name == "heads":  # a call is of one key head, of which this device has some of the heads
        call = dataclasses.replace(call, N=call.N // math.prod(sizes[a] for a in layout.heads))
    return config, resolve(config.decode_implementation, call, default_device())
