"""The folder of a run: what is in it, and how a trained model is read back from it.

    <workdir>/config.json          the config of the last start
              tokenizer/           the tokenizer
              data/                token shards, unless the config names another place
              checkpoints/<step>/  see `checkpoint`
              metrics.jsonl        see `metrics`
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from mfa_jax import axes
from mfa_jax.attention import ANY_CALL
from mfa_jax.config import ModelConfig, TrainConfig, from_dict, require, to_dict, to_json
from mfa_jax.data import Tokenizer, load_tokenizer
from mfa_jax.kernels import default_device
from mfa_jax.model import dispatch, grouped
from mfa_jax.model.transformer import Transformer, init_params
from mfa_jax.train.checkpoint import Checkpoints

CONFIG, TOKENIZER, DATA, CHECKPOINTS = "config.json", "tokenizer", "data", "checkpoints"

_EXECUTION = ("dtype", "remat", "unroll_layers", "attention_implementation", "decode_implementation", "decode_layout",
              "expert_implementation", "expert_exchange", "expert_exchange_tokens")
"""Fields of a model config that say how it is computed, not what it is."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model read from a run."""

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    config: TrainConfig
    step: int
    skipped: dict[int, str]
    """Newer checkpoints that could not be used, each with its reason."""


def load_trained(
    workdir: str | Path, *, step: int | None = None, ema: bool = False, mesh: Mesh | None = None
) -> Trained:
    """The newest intact checkpoint of a run (or that of `step`), its parameters placed on `mesh`. Nothing is changed
    but kernels that were named for training and can't serve here, which become `auto`, and tokens to experts in parts.

    Args:
      ema: read the moving average of the weights in place of the weights.
      mesh: None for a mesh of one device.

    Raises:
      ValueError: no run there, no checkpoint, no moving average in it, or a model other than the one that was saved.
    """
    with _opened(workdir) as checkpoints:
        _, config = _saved_config(checkpoints, step)
        require(not ema or config.ema_decay is not None, "ema", True, "the run kept no moving average (ema_decay)")
        model = Transformer(_for_any_call(config.model))
        mesh = mesh or axes.make_mesh((1,) * len(axes.MESH_AXES), jax.devices()[:1])
        item = "ema" if ema else "params"
        restored = checkpoints.restore({item: abstract_params(model, mesh)}, step)
    assert restored is not None
    return Trained(model, restored.items[item], load_tokenizer(Path(workdir) / TOKENIZER), config, restored.step,
                   restored.skipped)


def _for_any_call(model: ModelConfig) -> ModelConfig:
    """The model without what was named for training: kernels serve no cache, or not on this device, and a number of
    tokens divides those of a training step."""
    device, changes = default_device(), dict[str, Any](expert_exchange_tokens=None)
    if model.attention_implementation not in ANY_CALL:
        changes["attention_implementation"] = "auto"
    serves = {"expert_implementation": lambda name: grouped.resolve(name, device.platform, device.compute_capability),
              "expert_exchange": lambda name: dispatch.resolve_exchange(name, device.platform)}
    for name, resolve in serves.items():
        try:
            resolve(getattr(model, name))
        except NotImplementedError:
            changes[name] = "auto"
    return dataclasses.replace(model, **changes)


def load_config(workdir: str | Path, *, field: str = "workdir") -> tuple[int, TrainConfig]:
    """The step of the newest checkpoint of a run, and the config that it was saved with.

    Args:
      field: what names the folder in errors.

    Raises:
      ValueError: no run there, or no checkpoint.
    """
    with _opened(workdir, field) as checkpoints:
        return _saved_config(checkpoints, None, field)


def parameters_digest(workdir: str | Path, step: int) -> str:
    """What tells the parameters of a checkpoint from others, without reading them. Raises: as `load_config`."""
    with _opened(workdir) as checkpoints:
        return checkpoints.digest(step, "params")


def write_config(workdir: Path, config: TrainConfig) -> None:
    """The config of a start; that of the one before is there until it is whole, and stays where it is the same."""
    text, file, part = to_json(config), workdir / CONFIG, workdir / f"{CONFIG}.partial"
    if not file.exists() or file.read_text() != text:
        part.write_text(text)
        part.replace(file)


def _opened(workdir: str | Path, field: str = "workdir") -> Checkpoints:
    folder = Path(workdir) / CHECKPOINTS
    require(folder.is_dir(), field, str(workdir), f"holds no run: there is no folder {CHECKPOINTS}")
    return Checkpoints(folder, read_only=True)


def _saved_config(checkpoints: Checkpoints, step: int | None, field: str = "workdir") -> tuple[int, TrainConfig]:
    found = checkpoints.read_meta(step)
    if found is None:
        raise ValueError(f"{field}={os.fspath(checkpoints.folder.parent)!r}: holds no finished checkpoint yet")
    return found[0], from_dict(TrainConfig, found[1]["config"], f"{checkpoints.folder}/{found[0]}")


def abstract_params(model: Transformer, mesh: Mesh) -> Any:
    """Shapes, types and places of a model's parameters on a mesh."""
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
                        nn.unbox(boxed), axes.shardings(boxed, mesh))


def require_same_model(saved: ModelConfig, given: ModelConfig, workdir: str, field: str = "workdir") -> None:
    """Refuses to go on with a model other than the saved one; how it is computed may change.

    Args:
      field: of the config, that names the folder.

    Raises:
      ValueError: the fields that differ, with both values.
    """
    differing = [
        f"model.{f.name}={to_dict(getattr(given, f.name))!r} (saved: {to_dict(getattr(saved, f.name))!r})"
        for f in dataclasses.fields(ModelConfig)
        if f.name not in _EXECUTION and getattr(saved, f.name) != getattr(given, f.name)
    ]
    if differing:
        raise ValueError(f"{field}={workdir!r}: holds a run of another model: {'; '.join(differing)}; accepted: the "
                         f"saved model, or another {field}")
