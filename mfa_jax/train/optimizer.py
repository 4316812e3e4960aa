"""Learning-rate schedules, AdamW and Muon, and where their state lives on the mesh.

What happens to a parameter is decided by its name, never by its rank: with layers stacked on a leading axis a norm
scale is two-dimensional and a projection three- or four-dimensional. A name that is not in the table is an error, so
that a new parameter cannot slip into the wrong optimizer. Its learning rate is that of its group, which the modules on
its path decide.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from mfa_jax.config import OptimizerConfig, require

_CONSISTENT_RMS = 0.2
_STACKED = "layers"

# How each projection is a matrix: the axes it sums over and the axes it produces; the axes left over are batches of
# independent matrices. Heads are such a batch wherever a projection produces them: a head's softmax sees only its own
# W_n, and with the low-rank variants the per-head matrices are the parameters that the method is about ("Muon Split",
# GLM-5 report, arXiv 2602.15763, splits MLA's up-projections by head for the same reason). Output projections sum over
# heads, so they are one matrix from all heads to the model width. Each expert has matrices of its own.
_MATRICES = {
    **{name: MuonDimensionNumbers(0, 1) for name in (
        "S_q", "S_k", "S_v", "N_kr", "W_DQ", "W_DKV", "W_KR", "W_gate", "W_up", "W_down", "router")},
    **{name: MuonDimensionNumbers(1, 2) for name in ("experts_gate", "experts_up", "experts_down")},
    **{name: MuonDimensionNumbers(0, 2) for name in ("W_Q", "W_K", "W_V", "W_UQ", "W_UK", "W_UV", "Q")},
    **{name: MuonDimensionNumbers((0, 1), 2) for name in ("W_O", "O")},
}
_RANK = {**{name: 2 for name in _MATRICES}, **{name: 3 for name in (
    "W_Q", "W_K", "W_V", "W_UQ", "W_UK", "W_UV", "Q", "W_O", "O", "experts_gate", "experts_up", "experts_down")},
    "embed": 2, "unembed": 2, "scale": 1, "alpha": 1, "router_bias": 1, "b_Q": 2, "b_K": 2, "b_V": 2}
_TABLES = ("embed", "unembed")
# The group of `GroupRates` that a parameter is of: that of the first name on its path that is here.
_GROUPS = {"attention": "attention", "ffn": "feed_forward", "moe": "feed_forward", "attention_norm": "norms",
           "ffn_norm": "norms", "final_norm": "norms", **dict.fromkeys(_TABLES, "embeddings")}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the updates done so far, over `n = schedule_steps` (or `steps`) updates.

    With peak `p`, warm-up `w` and final share `f`: `p i / w` for `i < w`, then
      cosine:   `p (f + (1 - f) (1 + cos(pi (i - w) / (n - w))) / 2)`, `p f` from `n` on;
      wsd:      `p`, and over the last `decay_fraction n` updates (all that follow the warm-up, if those are fewer)
                linear to `p f` (MiniCPM, arXiv 2404.06395, section 4);
      constant: `p`.
    A run that ends within its warm-up (`n <= w`) sees the warm-up alone.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    after = (config.schedule_steps or steps) - warmup
    if config.schedule == "constant" or after <= 0:
        rest = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, after, alpha=config.final_fraction)
    else:
        decay = min(max(round(config.decay_fraction * (after + warmup)), 1), after)
        fall = optax.linear_schedule(peak, peak * config.final_fraction, decay)
        rest = optax.join_schedules([optax.constant_schedule(peak), fall], [after - decay])
    if warmup == 0:
        return rest
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup])


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]


def _checked_name(path: tuple[Any, ...], leaf: Any) -> str:
    """The last name of a parameter's path.

    Raises:
      ValueError: the name is unknown, or its rank is not the one the name stands for.
    """
    names = _names(path)
    where = "/".join(names)
    if names[-1] not in _RANK:
        raise ValueError(f"parameter {where}: the optimizer does not know {names[-1]!r}; known: "
                         f"{', '.join(sorted(_RANK))}")
    rank = _RANK[names[-1]] + (names[0] == _STACKED)
    if len(leaf.shape) != rank:
        raise ValueError(f"parameter {where}: has shape {tuple(leaf.shape)}, expected {rank} axes")
    return names[-1]


def decay_mask(config: OptimizerConfig, abstract_params: Any) -> Any:
    """True where weight decay shrinks a parameter: projections, the tables by choice, no norm, bias or `alpha`."""
    decayed = (*_MATRICES, *(_TABLES if config.decay_embeddings else ()))
    return jax.tree_util.tree_map_with_path(lambda p, x: _checked_name(p, x) in decayed, abstract_params)


def group_rates(config: OptimizerConfig, abstract_params: Any) -> Any:
    """Learning rate of each parameter over that of the schedule, as its group has it; 0 for what is frozen.

    Raises:
      ValueError: a parameter of no group.
    """
    def one(path: tuple[Any, ...], _: Any) -> float:
        groups = [_GROUPS[name] for name in _names(path) if name in _GROUPS]
        require(bool(groups), "parameter", "/".join(_names(path)), f"must lie in one of {', '.join(_GROUPS)}")
        return float(getattr(config.rates, groups[0]))

    return jax.tree_util.tree_map_with_path(one, abstract_params)


def muon_dimensions(abstract_params: Any) -> Any:
    """How Muon sees each projection as a matrix, by name; None for what stays with AdamW."""
    def one(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        matrix = _MATRICES.get(_checked_name(path, leaf))
        # Counted from the end, the axes are the same with and without a leading layer axis.
        return matrix and jax.tree.map(lambda axis: axis - _RANK[_names(path)[-1]], matrix)

    return jax.tree_util.tree_map_with_path(one, abstract_params)


def make_optimizer(config: OptimizerConfig, steps: int, abstract_params: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or Muon for the projections and AdamW for the rest, each parameter at the
    rate of its group.

    Muon (Jordan 2024) replaces the momentum of each matrix by its nearest orthogonal one. Its update is scaled to the
    root mean square of Adam's, `0.2 sqrt(max(fan_in, fan_out))` times the orthogonal matrix (Liu et al., arXiv
    2502.16982, section 2.2), so that one learning rate and one weight decay serve both parts.

    Args:
      abstract_params: tree of the parameters' shapes, unboxed.

    Raises:
      ValueError: a parameter whose name, rank or group is not known.
    """
    schedule = make_schedule(config, steps)
    decay, rates = decay_mask(config, abstract_params), group_rates(config, abstract_params)
    dimensions = muon_dimensions(abstract_params)
    kinds = jax.tree.map(lambda _, rate, d: "frozen" if rate == 0 else "muon" if d and config.kind == "muon"
                         else "adamw", abstract_params, rates, dimensions)

    def adamw(mask: Any) -> optax.GradientTransformation:
        return optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
                           mask=mask)

    def muon(dimensions: Any) -> optax.GradientTransformation:
        return optax.contrib.muon(schedule, weight_decay=config.weight_decay, consistent_rms=_CONSISTENT_RMS,
                                  muon_weight_dimension_numbers=dimensions)

    found = set(jax.tree.leaves(kinds))
    if found == {"adamw"}:
        update = adamw(decay)
    else:
        each = {"muon": lambda: muon(_masked(dimensions, kinds, "muon")),
                "adamw": lambda: adamw(_masked(decay, kinds, "adamw")), "frozen": optax.set_to_zero}
        update = optax.partition({kind: make() for kind, make in each.items() if kind in found}, kinds)
    if config.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return _with_rates(update, rates)


def _with_rates(optimizer: optax.GradientTransformation, rates: Any) -> optax.GradientTransformation:
    """The updates times the rates, weight decay included: as if the learning rate were that much larger. The state is
    that of `optimizer`, so that a run may go on with other rates; but what is frozen has none, so that which are 0 must
    stay."""
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, state, params)
        return jax.tree.map(lambda u, rate: u if rate in (0, 1) else u * rate, updates, rates), state

    return optax.GradientTransformation(optimizer.init, update)


def _masked(tree: Any, kinds: Any, kind: str) -> Any:
    """`tree` as one transformation of a partition sees it: the others' leaves are masked out."""
    return jax.tree.map(lambda k, leaf: leaf if k == kind else optax.MaskedNode(), kinds, tree)


def state_shardings(abstract_opt_state: Any, abstract_params: Any, param_shardings: Any) -> Any:
    """The sharding of each leaf of an optimizer state: that of the parameter with its path suffix and shape.

    What belongs to no parameter is replicated. `jit(init)` without these would hold a whole copy of the moments on
    every device.
    """
    shardings = jax.tree.leaves(param_shardings)
    table = {path: (leaf.shape, sharding) for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(abstract_params), shardings, strict=True)}
    replicated = NamedSharding(shardings[0].mesh, PartitionSpec())

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = table.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(one, abstract_opt_state)
