"""The product that all projections share: its gradients are those of a plain matrix product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfa_jax.layers import linear


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [(), (6,), (2, 3)])
@pytest.mark.parametrize(("narrow", "wide"), [(5, 7), (7, 5), (5, 5)])
def test_linear_has_the_gradients_of_a_matrix_product(
        narrow: int, wide: int, rows: tuple[int, ...], dtype: str) -> None:
    given = np.random.default_rng(0)
    x, w, g = (jnp.asarray(given.standard_normal(shape), dtype)
               for shape in ((*rows, narrow), (narrow, wide), (*rows, wide)))
    y, gradients = jax.vjp(linear, x, w)
    dx, dw = gradients(g)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype,) * 3
    np.testing.assert_array_equal(y, jnp.matmul(x, w))
    exact_x, exact_w, exact_g = (np.asarray(a, np.float64) for a in (x, w, g))
    rounding = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for found, exact in ((dx, exact_g @ exact_w.T), (dw, exact_x.reshape(-1, narrow).T @ exact_g.reshape(-1, wide))):
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=rounding, atol=rounding)
