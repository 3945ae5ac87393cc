"""`BlockTridiagonal` inverts block tridiagonal Jacobians by either elimination."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.precondition.block_tridiagonal import BlockTridiagonal
from nksolve.precondition.elimination import CyclicReduction, ScanElimination
from tests.helpers import Counter

from .structured import apply, assert_inverts, banded, block_tridiagonal, matrix_operator

SCAN, CYCLIC = ScanElimination(), CyclicReduction()


@pytest.mark.parametrize(
    ("m", "b", "dtype", "elimination"),
    [
        (1, 1, np.float64, CYCLIC),
        (2, 3, np.float64, SCAN),
        (11, 1, np.float32, SCAN),
        (13, 2, np.complex128, SCAN),
        (6, 2, np.float32, CYCLIC),
        (5, 3, np.complex128, CYCLIC),
        (5, 4, np.float64, SCAN),
        (4, 9, np.float64, CYCLIC),
        (3, 9, np.float64, SCAN),
    ],
)
def test_inverts(m, b, dtype, elimination):
    matrix = block_tridiagonal(m, b, dtype)
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    like = jnp.zeros((m, b), dtype)
    assert_inverts(BlockTridiagonal(elimination=elimination), matrix, like, rtol)


def test_runs_that_do_not_divide():
    """A pentadiagonal matrix of 11 in blocks of 2: the last is filled up."""
    assert_inverts(BlockTridiagonal(2), banded(11, 2, 2), jnp.zeros(11), 1e-12)


def test_leaves_are_interleaved():
    """(u, v, w), each (n,), and leaves of different width: blocks of all that a node has."""
    m = 5
    matrix = block_tridiagonal(m, 3)
    order = np.arange(3 * m).reshape(m, 3)
    for like, columns in (
        ((jnp.zeros(m), jnp.zeros(m), jnp.zeros(m)), order.T.ravel()),
        (
            {"a": jnp.zeros((m, 2)), "b": jnp.zeros(m)},
            np.concatenate([order[:, :2].ravel(), order[:, 2]]),
        ),
    ):
        assert_inverts(BlockTridiagonal(), matrix[np.ix_(columns, columns)], like, 1e-12)


@pytest.mark.parametrize("elimination", [SCAN, CYCLIC], ids=["scan", "cyclic"])
def test_scales(elimination):
    """Entries of 1e-25 in float32, whose determinants are zero: scaled away."""
    matrix = (block_tridiagonal(5, 2) * 1e-25).astype(np.float32)
    v = jnp.ones((5, 2), jnp.float32)
    x, _ = apply(BlockTridiagonal(elimination=elimination), matrix, 1e-25 * v, 1e-25 * v)
    exact = np.linalg.solve(matrix.astype(float) * 1e25, np.ones(10))
    np.testing.assert_allclose(np.ravel(x), exact, rtol=1e-4)


def _residual(y, args):
    """A reaction-diffusion system of two species on a line."""
    u, v = y["u"], y["v"]
    laplace = lambda x: jnp.pad(x, 1)[2:] + jnp.pad(x, 1)[:-2] - 2 * x
    return {
        "u": laplace(u) - 0.1 * (u**3 - v) + args,
        "v": 2 * laplace(v) - 0.1 * (v + u * v) + args,
    }


def test_newton_and_its_gradient_take_one_iteration_a_solve():
    n, counter = 40, Counter()
    counted = lambda y, args: _residual(counter.tick(y), args)
    y0 = {"u": jnp.zeros(n), "v": jnp.zeros(n)}
    krylov = nks.GMRES(rtol=1e-10, preconditioner=BlockTridiagonal(2))
    solver = nks.NewtonKrylov(1e-10, 1e-12, linear_solver=krylov, forcing=nks.ConstantForcing(1e-6))

    @jax.jit
    def solve(forcing):
        def objective(forcing):
            solution = nks.root_find(counted, solver, y0, forcing)
            return jnp.sum(solution.value["u"] ** 2), solution.stats

        return jax.value_and_grad(objective, has_aux=True)(forcing)

    forcing = 0.1 * jnp.ones(n)
    with counter.measure() as count:
        (_, stats), gradient = solve(forcing)
    steps = int(stats["num_steps"])
    assert steps <= 9 and int(stats["num_matvecs"]) == steps
    assert int(stats["num_probes"]) == 6 * int(stats["num_preconditioner_updates"])
    # The probes of an update are one batched matvec. Jᵀ: one iteration, and its verification.
    assert count.transposed <= 3
    step = 1e-5
    (above, _), _ = solve(forcing.at[7].add(step))
    (below, _), _ = solve(forcing.at[7].add(-step))
    np.testing.assert_allclose(gradient[7], (above - below) / (2 * step), rtol=1e-6)


def test_given_blocks_need_no_matvec():
    m, b = 6, 2
    matrix = block_tridiagonal(m, b)
    tiles = jnp.asarray(matrix.reshape(m, b, m, b).swapaxes(1, 2))
    index = jnp.arange(m)
    before, after = jnp.maximum(index - 1, 0), jnp.minimum(index + 1, m - 1)
    blocks = lambda y, args: (args[index, before], args[index, index], args[index, after])
    preconditioner = BlockTridiagonal(blocks=blocks)
    assert_inverts(preconditioner, matrix, jnp.zeros((m, b)), 1e-12, args=tiles)
    operator = matrix_operator(matrix, jnp.zeros((m, b)))
    assert preconditioner.num_probes(operator, None, None) == 0


@functools.cache
def _solve():
    solver = nks.GMRES(rtol=1e-8, preconditioner=BlockTridiagonal(1), max_steps=60)

    def run(matrix, b):
        operator = matrix_operator(matrix, b)
        solution = lx.linear_solve(operator, b, solver, throw=False)
        return solution.value, solution.stats["num_steps"], solution.result

    return jax.jit(run)


def test_singular_pivots_stay_finite():
    """A zero pivot: the outer method makes up for it. A singular matrix: no false success."""
    n = 12
    b = jnp.ones(n).at[3].set(-2.0)
    swapped = banded(n, 1, 1)
    swapped[0, 0] = 0.0
    value, steps, result = _solve()(jnp.asarray(swapped), b)
    assert result == lx.RESULTS.successful and int(steps) <= 4
    np.testing.assert_allclose(swapped @ value, b, atol=1e-7)
    singular = np.diag(np.r_[0.0, np.ones(n - 1)])
    value, _, result = _solve()(jnp.asarray(singular), b)
    assert result != lx.RESULTS.successful and np.all(np.isfinite(value))
    value, steps, result = _solve()(jnp.asarray(singular), jnp.zeros(n))
    assert result == lx.RESULTS.successful and int(steps) == 0 and not np.any(value)
    value, _, result = _solve()(jnp.asarray(swapped).at[5, 5].set(jnp.nan), b)
    assert result != lx.RESULTS.successful and np.all(np.isfinite(value))


def test_bad_input():
    two = {"u": jnp.zeros(4), "v": jnp.zeros(4)}
    operator = nks.linearise(lambda y, _: y, two).operator
    with pytest.raises(ValueError, match="multiple of 2"):
        BlockTridiagonal(3).init(operator, None, None)
    with pytest.raises(ValueError, match="at least 1"):
        BlockTridiagonal(0)
    with pytest.raises(ValueError, match=r"must have shape \(4, 2, 2\)"):
        BlockTridiagonal(blocks=lambda *_: (jnp.zeros(4),) * 3).init(operator, None, None)
    with pytest.raises(TypeError, match="lower, diagonal, upper"):
        BlockTridiagonal(blocks=lambda *_: jnp.zeros(4)).init(operator, None, None)
    empty = nks.linearise(lambda y, _: y, jnp.zeros((0, 2))).operator
    inverse = BlockTridiagonal().init(empty, None, None)
    assert inverse.mv(jnp.zeros((0, 2))).shape == (0, 2)
