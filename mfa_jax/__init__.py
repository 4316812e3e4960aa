"""Multi-matrix Factorization Attention (MFA and MFA-Key-Reuse, arXiv 2412.19255) in JAX and Flax.

Start at `mfa_jax.model.transformer.Transformer` for the model, `mfa_jax.attention.build` for a variant alone,
`mfa_jax.generate` for decoding, `mfa_jax.capacity` for the closed forms.
"""

__version__ = "0.1.0"
