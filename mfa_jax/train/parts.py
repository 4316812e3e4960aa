"""What a run is made of: its data, the layout of its state, and its programs, the step compiled ahead."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from mfa_jax.config import TrainConfig
from mfa_jax.data import Prepared
from mfa_jax.model.transformer import Transformer
from mfa_jax.train import run
from mfa_jax.train.compiling import Memory, compile_program, explaining_memory, memory_of
from mfa_jax.train.evaluation import make_evaluation
from mfa_jax.train.goodput import Goodput
from mfa_jax.train.optimizer import make_optimizer, make_schedule
from mfa_jax.train.step import TrainState, abstract_batch, create_state, jit_step, make_train_step, state_layout


@dataclasses.dataclass(frozen=True)
class Parts:
    """One run's data, and its programs for one mesh."""

    mesh: Mesh
    prepared: Prepared
    layout: TrainState
    create: Callable[[], TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    """Compiled, before there is a state: what it needs is known when memory runs out."""
    memory: Memory
    """Of the step."""
    evaluate: Callable[[TrainState], dict[str, float]]

    @classmethod
    def build(cls, config: TrainConfig, mesh: Mesh, prepared: Prepared, goodput: Goodput) -> Parts:
        device = mesh.local_devices[0]
        with goodput.phase("compile"), explaining_memory(config, device):
            model = Transformer(config.model)
            optimizer = make_optimizer(config.optimizer, config.steps, run.abstract_params(model, mesh))
            layout = state_layout(config, model, optimizer, mesh)
            step = make_train_step(config, model, optimizer, make_schedule(config.optimizer, config.steps))
            lowered = jit_step(step, layout).lower(layout, abstract_batch(config, mesh))
            program = compile_program(lowered, device.platform, mesh.size)
        return cls(
            mesh, prepared, layout, functools.partial(create_state, config, model, optimizer, layout), program,
            memory_of(program), make_evaluation(config, model, prepared, mesh))
