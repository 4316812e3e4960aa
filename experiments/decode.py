"""Decode from the checkpoint of a run, through the cache.

    python -m experiments.decode --workdir runs/tiny --prompt "def " --max-new-tokens 64 --temperature 0

Several prompts are decoded as one batch. With one prompt the text is written as it comes. `--mesh.tensor 2` and the
like decode on more devices than the first. On several hosts the same command runs on each, with a mesh of all their
devices, as with `experiments.train`; process 0 reads the terminal and writes the text.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import tyro

from experiments.cli import parse, run
from experiments.opening import ONE_DEVICE, CacheDType, DecodeKernel, decode_kernel, joined_mesh
from mfa_jax.config import MeshConfig, require
from mfa_jax.generate import SamplingConfig, cache_size, complete, encode_prompts, stream_text
from mfa_jax.model.transformer import Transformer
from mfa_jax.train import cluster, processes
from mfa_jax.train.run import Trained, load_trained


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """What to decode, and how tokens are chosen."""

    workdir: str
    """Folder of the run."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be given several times. Without any, lines are read from the terminal, one by one."""
    max_new_tokens: int = 256
    """At most so many tokens a prompt."""
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int | None = None
    """Only the k most probable tokens; none for all."""
    top_p: float = 1.0
    """Only the most probable tokens that together have this probability; in (0, 1]."""
    min_p: float = 0.0
    """Only tokens with at least this share of the most probable one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were seen before are less probable."""
    seed: int = 0
    """The same seed gives the same text."""
    stop_at_end: bool = True
    """Stop where the model ends a document."""
    add_bos_token: bool = False
    """Begin each prompt with the begin token, as is always done for a run that was trained or converted with it."""
    capacity: int | None = None
    """Tokens that the cache holds; none for what is needed."""
    cache_dtype: CacheDType | None = None
    """Type of the cached arrays, those of 8 bits with a scale a token; none for the model's."""
    implementation: DecodeKernel | None = None
    """Decode kernel; auto takes the device's own where it can serve, none what the run's config says."""
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: ONE_DEVICE)
    """Which devices, and how parameters, caches and rows lie on them; one device unless given."""
    step: int | None = None
    """Checkpoint to read; none for the newest intact one."""
    ema: bool = False
    """Read the moving average of the weights."""

    def sampling(self, vocab_limit: int) -> SamplingConfig:
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
                              vocab_limit=vocab_limit)


def _begins(config: DecodeConfig, trained: Trained) -> bool:
    return config.add_bos_token or trained.config.data.add_bos_token


def _decode(config: DecodeConfig, trained: Trained, prompts: tuple[str, ...]) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens, "capacity": config.capacity, "cache_dtype": config.cache_dtype,
        "stop_at_end": config.stop_at_end, "add_bos_token": _begins(config, trained),
    }
    sampling, key = config.sampling(trained.tokenizer.vocab_size), jax.random.key(config.seed)
    arguments = (trained.model, trained.params, trained.tokenizer)
    if len(prompts) > 1:
        for prompt, text in zip(prompts, complete(*arguments, prompts, sampling, key, **options), strict=True):
            _write(f"{prompt}{text}\n{'-' * 20}\n")
        return
    pieces = stream_text(*arguments, prompts[0], sampling, key, **options)
    for piece in itertools.chain([prompts[0] + next(pieces)], pieces):  # what is refused is refused before it is begun
        _write(piece)
    _write("\n")


def _write(text: str) -> None:
    if jax.process_index() == 0:
        sys.stdout.write(text)
        sys.stdout.flush()


def _tell(message: str) -> None:
    if jax.process_index() == 0:
        print(message, file=sys.stderr)


def _lines() -> Iterator[str]:
    """Lines of the terminal, which process 0 reads and all decode."""
    while line := processes.gather(sys.stdin.readline() if jax.process_index() == 0 else "")[0]:
        if line.strip("\n"):
            yield line.strip("\n")


def _with_kernel(config: DecodeConfig, trained: Trained, prompts: tuple[str, ...]) -> tuple[Trained, str]:
    """The model with the kernel that was asked for, and the name of that which decodes such prompts.

    Raises:
      NotImplementedError: the kernel can't serve this model on this device.
    """
    lengths = encode_prompts(trained.tokenizer, prompts, add_bos_token=_begins(config, trained))[1]
    capacity = config.capacity or cache_size(int(lengths.max()), config.max_new_tokens)
    model, chosen = decode_kernel(trained.model.config, config.implementation, capacity, config.cache_dtype,
                                  rows=len(prompts))
    return dataclasses.replace(trained, model=Transformer(model)), chosen


def _tell_model(config: DecodeConfig, trained: Trained, kernel: str) -> None:
    mesh = jax.sharding.get_mesh()
    where = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    _tell(f"step {trained.step} of {config.workdir}: {trained.model.config.attention.variant}, "
          f"{where and f'{mesh.size} x '}{jax.devices()[0].platform}{where and f' ({where})'}, decode attention by "
          f"{kernel}")


def main() -> None:
    config = parse(DecodeConfig)
    require(config.max_new_tokens >= 1, "max_new_tokens", config.max_new_tokens, "must be at least 1")
    require(0 <= config.seed < 2**32, "seed", config.seed, "must be in 0 .. 2^32 - 1")
    config.sampling(1)  # refuses what cannot work before anything is loaded
    with joined_mesh(config.mesh) as mesh:
        trained = load_trained(config.workdir, step=config.step, ema=config.ema, mesh=mesh)
        for step, reason in trained.skipped.items():
            _tell(f"step {step} is skipped: {reason}")
        told = None
        for prompts in [config.prompt] if config.prompt else ((line,) for line in _lines()):
            try:
                served, kernel = _with_kernel(config, trained, prompts)
                if kernel != told:  # a longer line may be served by another one
                    _tell_model(config, served, told := kernel)
                _decode(config, served, prompts)
            except ValueError as error:
                if config.prompt:
                    raise
                _tell(f"error: {error}")  # too long for the cache, say; the next line may not be


if __name__ == "__main__":
    with cluster.leaving_at_once():
        run(main, label=cluster.label)
