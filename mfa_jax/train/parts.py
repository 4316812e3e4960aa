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
from mfa_jax.train.losses import Loss, Teacher, batch_loss, distillation_loss, teacher_config
from mfa_jax.train.optimizer import make_optimizer, make_schedule
from mfa_jax.train.step import TrainState, abstract_batch, create_state, jit_step, make_train_step, state_layout


@dataclasses.dataclass(frozen=True)
class Parts:
    """One run's data, and its programs for one mesh."""

    mesh: Mesh
    prepared: Prepared
    layout: TrainState
    create: Callable[[Any], TrainState]
    """The state at step 0 with these parameters; None for new ones."""
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    """Compiled, before there is a state: what it needs is known when memory runs out."""
    memory: Memory
    """Of the step."""
    evaluate: Callable[[TrainState], dict[str, float]]

    @classmethod
    def build(
        cls, config: TrainConfig, mesh: Mesh, prepared: Prepared, goodput: Goodput, teacher: Teacher | None = None
    ) -> Parts:
        device = mesh.local_devices[0]
        given = () if teacher is None else (teacher.params,)
        with goodput.phase("compile"), explaining_memory(config, device):
            model = Transformer(config.model)
            optimizer = make_optimizer(config.optimizer, config.steps, run.abstract_params(model, mesh))
            layout = state_layout(config, model, optimizer, mesh)
            schedule = make_schedule(config.optimizer, config.steps)
            step = make_train_step(config, model, optimizer, schedule, _loss(config, model, teacher))
            lowered = jit_step(step, layout).lower(layout, abstract_batch(config, mesh), *given)
            program = compile_program(lowered, device.platform, mesh.size)
        evaluate = make_evaluation(config, _loss(_plain(config), model, teacher), given, prepared, mesh)
        return cls(mesh, prepared, layout, functools.partial(create_state, config, model, optimizer, layout),
                   lambda state, batch: program(state, batch, *given), memory_of(program), evaluate)


def _loss(config: TrainConfig, model: Transformer, teacher: Teacher | None) -> Loss:
    if teacher is None:
        return functools.partial(batch_loss, config, model)
    return functools.partial(distillation_loss, config, model, Transformer(teacher_config(config, teacher.config)))


def _plain(config: TrainConfig) -> TrainConfig:
    """The config whose loss runs are compared by, whatever they minimise."""
    distillation = config.distillation and dataclasses.replace(config.distillation, temperature=1.0)
    return dataclasses.replace(config, z_loss=0.0, distillation=distillation)
