"""A model converted layer by layer, with the streams of calibration text that pass through the layers beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mfa_jax.config import GQAConfig, ModelConfig, require, to_dict
from mfa_jax.convert import activations
from mfa_jax.convert.exact import Layer, require_plain
from mfa_jax.convert.progress import Progress

VERSION = 1
"""Of what a conversion makes of the same input: one more where code that changes it, for layers of two don't mix."""

Streams = dict[str, np.ndarray]
"""Of each model that is followed, the stream `[rows, T, D]` before the layer at hand."""


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """How a layer was converted."""

    layer: int
    key_elements: int
    """Elements of the cached row that rope turns."""
    error: float
    """Mean square of what the stream after attention misses, over that of the attention's output; before the refit"""
    refitted_error: float
    """and after it, on the calibration text."""


class Step(Protocol):
    """Makes a layer's new attention, `rebuilt`'s parameters, and moves the streams past the attention, in place."""

    def __call__(self, layer: Layer, i: int, streams: Streams) -> tuple[Layer, LayerReport]: ...


class Layerwise:
    """Calls `step` for each layer in order, or takes what an earlier run of it left; `rebuilt` calls `convert`.

    Raises:
      ValueError: the folder holds another conversion.
    """

    def __init__(
        self, config: ModelConfig, params: Any, tokens: np.ndarray, step: Step, *, streams: tuple[str, ...],
        settings: dict[str, Any], folder: Path | None, on_layer: Callable[[LayerReport], None],
    ) -> None:
        """Args:
          step: see `Step`.
          streams: names of the streams, which all start as the embedded tokens.
          settings: of the conversion, JSON: what else than model and text its result follows from.
          folder: keeps what is done, layer by layer; None for none.
          on_layer: is told of each layer.
        """
        self.config, self.layers, self.step, self.on_layer = config, params["layers"], step, on_layer
        embedded = np.asarray(np.asarray(params["embed"])[tokens], np.float32)
        self.streams: Streams = {name: embedded.copy() for name in streams}
        self.reports: list[LayerReport] = []
        self.progress = None
        if folder is None:
            return
        digest = hashlib.sha256(tokens.tobytes())
        for leaf in jax.tree.leaves(params):
            for part in np.asarray(leaf):  # on the first axis, so that no more than a layer is copied
                digest.update(part.tobytes())
        self.progress = Progress(folder, {"version": VERSION, "config": to_dict(config), **settings,
                                          "tokens": list(tokens.shape), "digest": digest.hexdigest()})
        if self.progress.layers:
            self.streams = self.progress.state()

    def convert(self, layer: Layer, i: int) -> Layer:
        """The new parameters of layer i."""
        if self.progress is not None and i < self.progress.layers:
            new = self.progress.layer(i)
            self.reports.append(LayerReport(**json.loads(str(new.pop("report")))))
            return new
        new, report = self.step(layer, i, self.streams)
        # Through numpy, as all of a layer: what the whole model lies on is no place to compute.
        params = {name: {key: jnp.asarray(np.asarray(leaf[i])) for key, leaf in self.layers[name].items()}
                  for name in ("ffn", "ffn_norm")}
        for stream in self.streams.values():
            for rows in activations.batches(stream):
                stream[rows] = activations.feed_forward(self.config, params, stream[rows])
        self.reports.append(report)
        if self.progress is not None:
            self.progress.save({**new, "report": np.array(json.dumps(dataclasses.asdict(report)))}, self.streams)
        self.on_layer(report)
        return new


def require_reducible(
    config: ModelConfig, tokens: np.ndarray, target: Literal["mfa", "mfa_kr"], width: int
) -> GQAConfig:
    """The attention of a model that can be reduced to `width` on these calibration tokens; raises otherwise."""
    a = require_plain(config)
    if config.position.kind != "rope":
        raise NotImplementedError(f"position={config.position.kind!r}: only models with rope are reduced; any can be "
                                  f"converted with as large a cache")
    full = a.num_kv_heads * a.head_dim * (2 if target == "mfa_kr" else 1)
    require(2 <= width < full and width % 2 == 0, "width", width, f"must be even and in 2 .. {full - 1}")
    require(tokens.size >= tokens_needed(a, width), "calibration", tokens.size,
            f"must have at least 2 N C = {tokens_needed(a, width)} tokens")
    return a


def tokens_needed(attention: GQAConfig, width: int) -> int:
    """How many tokens of calibration a fit with C = `width` needs: twice the rows of the output projection."""
    return 2 * attention.num_heads * width
