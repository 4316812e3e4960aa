"""Planning: the real training step or decoding loop, compiled ahead of time for a TPU slice that is not here.

`chips` holds published figures, `compiler` the way to libtpu, `programs` what is compiled, `hlo` and `costs` read the
compiled program, `report` sets it against the chip, `search` looks for the smallest slice.
"""

from mfa_jax.plan.chips import CHIPS, Chip, Topology, parse_topology
from mfa_jax.plan.compiler import libtpu, mesh_of, prepare
from mfa_jax.plan.programs import Decoding
from mfa_jax.plan.report import Plan, plan_decoding, plan_training
from mfa_jax.plan.search import Suggestion, suggest
from mfa_jax.train.compiling import DoesNotFitError

__all__ = [
    "CHIPS", "Chip", "Decoding", "DoesNotFitError", "Plan", "Suggestion", "Topology", "libtpu", "mesh_of",
    "parse_topology", "plan_decoding", "plan_training", "prepare", "suggest",
]
