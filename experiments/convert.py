"""A GQA checkpoint as MFA or MFA-KR, with as large a cache or a smaller one.

Models with biases or norms of heads (Qwen2, Qwen3) cannot become either; `mean_pool` takes them.

    python -m experiments.convert --from DIR --to mfa_kr --out runs/converted
    python -m experiments.convert --from DIR --to mfa_kr --cache-ratio 1.5 --calibration FILE --out runs/smaller
    python -m experiments.convert --from DIR --to mfa --method key_pca --cache-ratio 1.5 --calibration FILE --out ...
    python -m experiments.convert --from DIR --to gqa --method mean_pool --cache-ratio 2 --out runs/pooled

At ratio 1 the logits are the original's. Above, keys and values are reduced by what queries and outputs make of them on
the calibration text, and the output projections refitted (`mfa_jax.convert.reduce`). `--method` names that or a plain
way of the literature to compare it with (`mfa_jax.convert.plain`). What is written is the folder of a
run that has not been trained: `experiments.decode`, `experiments.check_parity` and `load_trained` read it. Layers that
are done are kept beside it, in `OUT.unfinished`, so that the same command goes on after an interruption.

Memory: what one layer takes, and the embedding table. Both models lie in files beside `OUT` that have no name and go
with the process; they are mapped, which `peak_bytes` counts in, and the system may drop such pages at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from etils import epath

from experiments import cli
from mfa_jax.capacity import cache_elements_per_token, model_parameters
from mfa_jax.config import DType, GQAConfig, ModelConfig, require
from mfa_jax.convert import (
    balanced,
    gqa_to_mfa,
    gqa_to_mfa_kr,
    host,
    map_pretrained,
    pretrained_config,
    pretrained_tokenizer,
    save_run,
)
from mfa_jax.convert.calibration import calibration_rows
from mfa_jax.convert.exact import require_plain
from mfa_jax.convert.files import require_free
from mfa_jax.convert.layerwise import LayerReport, tokens_needed
from mfa_jax.convert.plain import key_pca, mean_pool
from mfa_jax.convert.reduce import reduce_gqa
from mfa_jax.data import Tokenizer
from mfa_jax.model.transformer import Transformer
from mfa_jax.train import processes


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """What is converted, to what, and on which text."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """A Hugging Face folder or a .gguf file."""
    out: str
    """Folder that is written; must not exist yet, or be empty."""
    to: Literal["mfa", "mfa_kr", "gqa"] = "mfa_kr"
    """The attention that it becomes."""
    method: Literal["commuting", "key_pca", "mean_pool"] = "commuting"
    """How the cache is made smaller. commuting: what queries and outputs use of keys and values on the calibration
    text is kept, in maps that commute with rope, and the projections are fitted anew; key_pca: real rotations of keys
    and PCA of values, makes mfa only; mean_pool: averaged key heads, makes gqa only and needs no calibration."""
    cache_ratio: float = 1.0
    """The original's cached elements a token over the new ones; 1 is exact."""
    calibration: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text files; may be given several times, each gives as many rows. Needed above ratio 1."""
    rows: int | None = None
    """Rows of calibration text; none for 32, or as many as the fit needs: 2 N C tokens, of C the width that is left."""
    context: int = 512
    """Tokens of a row."""
    spread: bool = False
    """Take the rows evenly over each whole text, not from its beginning."""
    add_bos_token: bool = False
    """Begin each row of calibration text with the begin token, what Llama and Mistral were trained with, and have what
    reads the converted model do so, too."""
    ridge: float = 0.01
    """Of the refit, as a share of the mean square of the features."""
    param_dtype: DType = "float32"
    """What parameters are read and written in: bfloat16 takes half of the memory, and each number rounds to 8 bits."""
    tokenizer: str | None = None
    """Name of the tokenizer in the folder, or beside the .gguf file; none for what it holds."""
    report: bool = False
    """Print what happened to each layer, too."""

    def __post_init__(self) -> None:
        made = {"commuting": ("mfa", "mfa_kr"), "key_pca": ("mfa",), "mean_pool": ("gqa",)}[self.method]
        require(self.to in made, "to", self.to, f"must be {' or '.join(made)} for method={self.method!r}")
        require(self.cache_ratio >= 1, "cache_ratio", self.cache_ratio, "must be at least 1")
        require(self.method == "commuting" or self.cache_ratio > 1, "cache_ratio", self.cache_ratio,
                f"must be above 1 for method={self.method!r}")
        require(self.cache_ratio == 1 or self.method == "mean_pool" or bool(self.calibration), "calibration", None,
                "is needed above cache_ratio=1")
        require(self.rows is None or self.rows >= 1, "rows", self.rows, "must be at least 1")
        require(self.context >= 2, "context", self.context, "must be at least 2")
        require(self.ridge >= 0, "ridge", self.ridge, "must not be negative")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(field.name not in unread(self.method, self.cache_ratio) or value == field.default, field.name,
                    value, f"must be left out: method={self.method!r} at cache_ratio={self.cache_ratio:g} reads none")


def goes_by_layer(method: str, ratio: float) -> bool:
    """Whether a conversion fits layer by layer to calibration text, and keeps those that are done."""
    return ratio != 1 and method != "mean_pool"


def unread(method: str, ratio: float) -> tuple[str, ...]:
    """Settings that a conversion does not read."""
    if not goes_by_layer(method, ratio):
        return ("calibration", "rows", "context", "spread", "ridge")
    return ("ridge",) if method == "key_pca" else ()


def width_of(config: ModelConfig, to: str, ratio: float) -> int:
    """The even C whose cache is at most the original's over `ratio`.

    Raises:
      ValueError: none is.
    """
    assert isinstance(config.attention, GQAConfig)
    budget = cache_elements_per_token(config.attention) / ratio
    width = 2 * int(budget / (2 if to == "mfa_kr" else 4))
    require(width >= 2, "cache_ratio", ratio, f"leaves {budget:g} elements a token, less than any {to} caches")
    return width


def pooled_heads(config: ModelConfig, ratio: float) -> int:
    """The number of key heads that is the original's over `ratio`.

    Raises:
      ValueError: it is no divisor of the original's.
    """
    assert isinstance(config.attention, GQAConfig)
    K = config.attention.num_kv_heads
    ratios = {K / k: k for k in range(1, K) if K % k == 0}
    require(ratio in ratios, "cache_ratio", ratio, f"mean_pool of {K} key heads must have one of "
            f"{', '.join(f'{r:g}' for r in sorted(ratios)) or 'none: there is one head'}")
    return ratios[ratio]


def require_convertible(config: ConvertConfig, model: ModelConfig) -> int:
    """Refuses a model that cannot become what is asked for, before its weights are read.

    Returns:
      rows of calibration text, 0 where none is read.

    Raises:
      ValueError: not a GQA model, a ratio that leaves nothing, or fewer rows than the fit needs.
      NotImplementedError: biases, norms of heads, or, with a smaller cache, no rope.
    """
    require(isinstance(model.attention, GQAConfig), "from", config.source,
            f"must hold a GQA model, not {model.attention.variant}")
    if config.to == "gqa":
        pooled_heads(model, config.cache_ratio)
        return 0
    a = require_plain(model)
    if not goes_by_layer(config.method, config.cache_ratio):
        return 0
    width = width_of(model, config.to, config.cache_ratio)
    needed = -(-tokens_needed(a, width) // config.context)
    rows = max(32, needed) if config.rows is None else config.rows
    require(rows >= needed, "rows", rows, f"must be at least {needed} of context={config.context}: {a.num_heads} heads "
                                          f"and C={width} are fitted to 2 N C = {tokens_needed(a, width)} tokens")
    return rows


def convert(config: ConvertConfig, model: ModelConfig, params: Any, tokenizer: Tokenizer) -> tuple[
        ModelConfig, Any, list[LayerReport]]:
    """The converted model, its new arrays mapped; a conversion that was interrupted goes on."""
    if config.cache_ratio == 1:
        exact = gqa_to_mfa if config.to == "mfa" else gqa_to_mfa_kr
        return (*exact(model, params, folder=beside(config.out)), [])
    if config.method == "mean_pool":
        heads = pooled_heads(model, config.cache_ratio)
        return (*mean_pool(model, params, num_kv_heads=heads, folder=beside(config.out)), [])
    width, count = width_of(model, config.to, config.cache_ratio), require_convertible(config, model)
    common: dict[str, Any] = {"width": width, "folder": unfinished(config.out), "on_layer": lambda layer: print(
        f"layer {layer.layer + 1} of {model.num_layers}: misses {layer.refitted_error:.3f} of its output's mean square",
        file=sys.stderr)}
    rows = calibration_rows(config.calibration, tokenizer, rows=count, context=config.context,
                            add_bos_token=config.add_bos_token, spread=config.spread)
    require_reads(model, params, rows[:4])
    if config.method == "key_pca":
        return key_pca(model, params, rows, **common)
    return reduce_gqa(model, params, rows, target="mfa" if config.to == "mfa" else "mfa_kr", ridge=config.ridge,
                      **common)


def require_reads(model: ModelConfig, params: Any, rows: np.ndarray) -> None:
    """Raises `ValueError` where a model predicts text no better than a guess: another tokenizer's tokens."""
    @jax.jit
    def nats(params: Any, row: jax.Array) -> jax.Array:
        logits = Transformer(model).apply({"params": params}, row[None])[0][0]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), row[1:, None], axis=-1).mean()

    params = jax.device_put(params, host())  # no copy
    loss = float(np.mean([nats(params, jnp.asarray(row)) for row in rows]))
    require(loss < math.log(model.vocab_size), "tokenizer", f"{loss:.2f} nats a token",
            f"is what the model makes of the calibration text, a guess among vocab_size={model.vocab_size} makes "
            f"{math.log(model.vocab_size):.2f}: the tokenizer must be the one that the model was trained with")


def beside(out: str) -> Path:
    """Where the models lie while they are converted: on the disk that is to hold the new one."""
    folder = Path(out).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def unfinished(out: str) -> Path:
    """Where a conversion that goes layer by layer keeps the layers that are done."""
    return Path(out).with_name(f"{Path(out).name}.unfinished")


@contextlib.contextmanager
def _alone(out: str) -> Iterator[None]:
    """Inside, no other conversion keeps its layers there. Raises: ValueError: one does."""
    folder = unfinished(out)
    folder.mkdir(parents=True, exist_ok=True)
    with processes.sole_writer(epath.Path(folder)):
        try:
            yield
        finally:
            if not any(folder.glob("*.*")):  # nothing but the lock
                shutil.rmtree(folder)


def main(config: ConvertConfig) -> None:
    start = time.monotonic()
    require_free(Path(config.out))
    tokenizer = pretrained_tokenizer(config.source, config.tokenizer)
    require(not config.add_bos_token or tokenizer.bos_id is not None, "add_bos_token", True,
            "the tokenizer has no begin token")
    require_convertible(config, pretrained_config(config.source))
    kept = goes_by_layer(config.method, config.cache_ratio)
    with _alone(config.out) if kept else contextlib.nullcontext():
        given, params = map_pretrained(config.source, beside(config.out), param_dtype=config.param_dtype)
        require(tokenizer.vocab_size <= given.vocab_size, "tokenizer.vocab_size", tokenizer.vocab_size,
                f"must be at most the model's vocab_size={given.vocab_size}")
        resumed = kept and any(unfinished(config.out).glob("state-*.npz"))
        found, converted, layers = convert(config, given, params, tokenizer)
        converted = balanced(found, converted, folder=beside(config.out))
        save_run(config.out, found, converted, tokenizer, add_bos_token=config.add_bos_token)
        for file in unfinished(config.out).glob("*.*") if kept else ():
            file.unlink()
    if config.report:
        for layer in layers:
            print(json.dumps(dataclasses.asdict(layer)))
    old, new = (cache_elements_per_token(c.attention) for c in (given, found))
    print(json.dumps({
        "out": config.out, "attention": found.attention.variant, "cached_elements": [old, new],
        "cache_ratio": round(old / new, 3), "parameters": [model_parameters(c).total for c in (given, found)],
        "resumed": resumed, "seconds": round(time.monotonic() - start, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}))


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(ConvertConfig)))
