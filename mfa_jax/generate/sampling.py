"""How the next token of each row is chosen from its logits: pure functions, the config is static under `jax.jit`."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mfa_jax.config import require


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Filters in the order they act: repetition penalty, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """Logits are divided by this; 0 takes the most likely token, and the filters below have nothing to do."""
    top_k: int | None = None
    """Keep this many of the most likely tokens; of equal ones, those with lower ids. None for all."""
    top_p: float = 1.0
    """Keep the fewest of the most likely tokens whose probabilities sum to at least this; 1 for all."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the most likely one; 0 for all."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen before are divided by this where positive, multiplied where negative; 1 for no penalty."""
    vocab_limit: int | None = None
    """Ids from here on are never chosen (the padding of a padded vocabulary); None for no limit."""

    def __post_init__(self) -> None:
        # Smaller temperatures and wilder penalties would overflow float32 and choose from not-a-numbers.
        require(self.temperature == 0 or (1e-6 <= self.temperature and math.isfinite(self.temperature)), "temperature",
                self.temperature, "must be 0 (greedy), or at least 1e-6 and finite")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "must be at least 1, or none")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "must be in [0, 1]")
        require(0.01 <= self.repetition_penalty <= 100, "repetition_penalty", self.repetition_penalty,
                "must be in [0.01, 100]")
        require(self.vocab_limit is None or self.vocab_limit >= 1, "vocab_limit", self.vocab_limit,
                "must be at least 1, or none")

    def require_within(self, vocab_size: int) -> int:
        """The ids that may be chosen, `vocab_limit` or the whole vocabulary.

        Raises:
          ValueError: `top_k` or `vocab_limit` beyond the vocabulary.
        """
        limit = vocab_size if self.vocab_limit is None else self.vocab_limit
        require(limit <= vocab_size, "vocab_limit", limit, f"must be at most the vocabulary's {vocab_size}")
        require(self.top_k is None or self.top_k <= limit, "top_k", self.top_k, f"must be at most {limit}, the ids")
        return limit


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], config: SamplingConfig, seen: Bool[Array, "B V"] | None = None
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """One token for each row, and its log-probability under the model.

    The log-probability is `log softmax(logits)` at the token: before penalty, temperature and filters, in nats, over
    the ids below `vocab_limit`. A row depends on its own logits, key and `seen` only.

    Args:
      logits: the model's, any float type; computed in float32.
      keys: a PRNG key for each row.
      config: static.
      seen: which ids stand in the row's text so far; needed for a repetition penalty, else unused.

    Raises:
      ValueError: `top_k` or `vocab_limit` beyond the vocabulary, or a repetition penalty without `seen`.

    Source: repetition penalty Keskar et al. (arXiv 1909.05858, section 4.1), extended to negative logits as in Hugging
    Face's processors; top-p Holtzman et al. (arXiv 1904.09751, section 3.1); min-p Nguyen et al. (arXiv 2407.01082).
    """
    V = logits.shape[-1]
    limit = config.require_within(V)
    logits = logits.astype(jnp.float32)
    if limit < V:
        logits = jnp.where(jnp.arange(V) < limit, logits, -jnp.inf)
    scores = logits
    if config.repetition_penalty != 1:
        if seen is None:
            raise ValueError(f"seen=None: repetition_penalty={config.repetition_penalty} needs the ids seen so far")
        penalty = config.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    tokens = jnp.argmax(scores, axis=-1) if config.temperature == 0 else _draw(scores, keys, config, limit)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def _draw(
    scores: Float[Array, "B V"], keys: Key[Array, " B"], config: SamplingConfig, limit: int
) -> Int[Array, " B"]:
    # The best score becomes 0, so that no temperature overflows.
    scores = (scores - scores.max(axis=-1, keepdims=True)) / config.temperature
    candidates = None
    if config.top_k is not None or config.top_p < 1:
        # Sorted from the best down, of equal scores the lower id first.
        scores, candidates = jax.lax.top_k(scores, config.top_k or limit)
    if config.top_p < 1:
        probabilities = jax.nn.softmax(scores, axis=-1)
        better = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The best has nothing better, and always stays.
        scores = jnp.where(better < config.top_p, scores, -jnp.inf)
    if config.min_p > 0:
        scores = jnp.where(scores >= math.log(config.min_p), scores, -jnp.inf)
    choices = jax.vmap(jax.random.categorical)(keys, scores)
    return choices if candidates is None else jnp.take_along_axis(candidates, choices[:, None], axis=-1)[:, 0]
