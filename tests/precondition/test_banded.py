"""`Banded` inverts banded Jacobians, of arrays and of interleaved leaves."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.precondition.banded import Banded
from nksolve.precondition.elimination import CyclicReduction, ScanElimination

from .structured import assert_inverts, banded, matrix_operator


@pytest.mark.parametrize(
    ("n", "lower", "upper", "dtype", "elimination"),
    [
        (1, 0, 0, np.float64, ScanElimination()),
        (1, 2, 1, np.float64, CyclicReduction()),
        (23, 1, 1, np.float32, ScanElimination()),
        (11, 1, 2, np.complex128, CyclicReduction()),
        (23, 3, 0, np.float64, ScanElimination()),
        (3, 4, 4, np.float64, CyclicReduction()),  # a band wider than the matrix
    ],
)
def test_inverts(n, lower, upper, dtype, elimination):
    matrix = banded(n, lower, upper, dtype)
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    preconditioner = Banded(lower, upper, elimination=elimination)
    assert_inverts(preconditioner, matrix, jnp.zeros(n, dtype), rtol)
    operator = matrix_operator(matrix, jnp.zeros(n, dtype))
    assert preconditioner.num_probes(operator, None, None) == min(n, lower + upper + 1)


def test_leaves_are_interleaved():
    """u₀ v₀ u₁ v₁ …: a band of 2 in that order, far from banded leaf after leaf."""
    m = 9
    matrix = banded(2 * m, 2, 2)
    order = np.arange(2 * m).reshape(m, 2).T.ravel()
    like = {"u": jnp.zeros(m), "v": jnp.zeros(m)}
    assert_inverts(Banded(2, 2), matrix[np.ix_(order, order)], like, 1e-12)


def test_fewer_probes_than_blocks_need():
    matrix = banded(12, 2, 2)
    operator = matrix_operator(matrix, jnp.zeros(12))
    assert Banded(2, 2).num_probes(operator, None, None) == 5


def test_preconditions_a_gradient_with_its_transpose():
    """One iteration for J, one for Jᵀ: in `vmap` too, lane by lane as alone."""
    matrix = jnp.asarray(banded(17, 2, 1))
    solver = nks.GMRES(rtol=1e-10, preconditioner=Banded(2, 1))
    rng = np.random.default_rng(1)
    rhs = jnp.asarray(rng.standard_normal((3, 17))) * jnp.array([[1.0], [0.0], [1e-6]])

    def solve(b):
        operator = matrix_operator(matrix, b)
        solution = lx.linear_solve(operator, b, solver)
        return solution.value, solution.stats["num_steps"]

    @jax.jit
    def batch(rhs):
        x, steps = jax.vmap(solve)(rhs)
        _, tangent = jax.jvp(lambda b: solve(b)[0], (rhs[0],), (rhs[2],))
        _, pull = jax.vjp(lambda b: solve(b)[0], rhs[0])
        return x, steps, tangent, pull(rhs[0])[0]

    x, steps, tangent, cotangent = batch(rhs)
    exact = np.linalg.solve(matrix, np.asarray(rhs).T).T
    np.testing.assert_allclose(x, exact, rtol=1e-8, atol=1e-18)
    assert list(steps) == [1, 0, 1]
    np.testing.assert_allclose(tangent, exact[2], rtol=1e-8, atol=1e-15)
    np.testing.assert_allclose(cotangent, np.linalg.solve(matrix.T, rhs[0]), rtol=1e-8, atol=1e-9)


def test_bad_input():
    with pytest.raises(ValueError, match="must not be negative"):
        Banded(-1, 1)
    scalars = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    operator = nks.linearise(lambda y, _: y, scalars).operator
    with pytest.raises(ValueError, match="one of them is a scalar"):
        Banded(1, 1).init(operator, None, None)
    uneven = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    operator = nks.linearise(lambda y, _: y, uneven).operator
    with pytest.raises(ValueError, match="in common"):
        Banded(1, 1).init(operator, None, None)
    mixed = (jnp.zeros(3), jnp.zeros(3, complex))
    operator = nks.linearise(lambda y, _: y, mixed).operator
    with pytest.raises(ValueError, match="all real or all complex"):
        Banded(1, 1).init(operator, None, None)
