# SPDX-License-Identifier: Apache-2.0
"""The factor of the inverse against NumPy's inverse; damping that is raised; dead inputs."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._solvers.cholesky import inverse_cholesky
from tests.solvers.oracles import damped, problem


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_it_is_the_factor_of_the_inverse(precision):
    h = problem(1, 24)[1]
    h[5] = h[:, 5] = 0
    factor = inverse_cholesky(h, precision=precision)
    u, (full, dead) = np.asarray(factor.u, np.float64), damped(h)
    np.testing.assert_allclose(u.T @ u @ full, np.eye(24), atol=2e-4)
    np.testing.assert_array_equal(np.triu(u), u)
    np.testing.assert_array_equal(factor.dead, dead)
    assert np.flatnonzero(dead).tolist() == [5] and factor.damping == np.float32(0.01)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_damping_is_raised_until_it_suffices(precision):
    """Not positive definite by a little more than 1 % of the mean of the diagonal."""
    h = np.diag([1.0, 1.0, 1.0, 1.0])
    h[0, 1] = h[1, 0] = 1.05
    factor = inverse_cholesky(np.stack([h, np.eye(4)]), precision=precision)
    np.testing.assert_allclose(factor.damping, [0.1, 0.01], rtol=1e-6)
    assert np.isfinite(np.asarray(factor.u)).all()


def test_without_damping_a_singular_matrix_gets_some():
    factor = inverse_cholesky(np.ones((3, 3)), damping=0.0)
    assert 0 < factor.damping < 1e-2 and jnp.isfinite(factor.u).all()


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_what_is_no_sum_of_squares_is_refused(precision):
    h = np.diag([1e-30, 1.0])
    h[0, 1] = h[1, 0] = 1e6
    with pytest.raises(jc.SiteError, match="not positive definite however much is added"):
        inverse_cholesky(h, precision=precision)
    with pytest.raises(jc.FormatError, match=r"A Hessian is \[\*lead, in, in\], got \[2, 3\]"):
        inverse_cholesky(np.ones((2, 3)))
