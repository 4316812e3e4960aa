"""How good a model is: log-likelihoods and texts for many requests at once, and the tasks of lm-eval.

`harness`, and the tasks in `TASKS`, need the optional package: pip install "mfa_jax[evaluate]".
"""

from pathlib import Path

from mfa_jax.evaluate.completion import complete_until
from mfa_jax.evaluate.scoring import Score, loglikelihoods

TASKS = Path(__file__).parent / "tasks"
"""Task files for evaluation sets that lie on the machine: lm-eval's `include_path`."""

__all__ = ["TASKS", "Score", "complete_until", "loglikelihoods"]
