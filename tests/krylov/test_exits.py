"""How a solve ends: exits, warm starts, limits, the empty and the non-finite, what is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.krylov.base import LinearSystem
from tests.helpers import GALLERY
from tests.helpers.gallery import N

A = GALLERY["nonsymmetric"].matrix
B = GALLERY["nonsymmetric"].rhs
_methods = pytest.mark.parametrize("method", [nks.GMRES, nks.FGMRES])


@eqx.filter_jit
def _compiled(matrix, rhs, solver, options):
    operator = lx.MatrixLinearOperator(matrix)
    return lx.linear_solve(operator, rhs, solver, throw=False, options=options)


def _solve(matrix, rhs, solver, **options):
    """Tolerances are traced, so that one program serves many tests."""
    tolerances = jnp.asarray(solver.rtol), jnp.asarray(solver.atol)
    solver = eqx.tree_at(lambda s: (s.rtol, s.atol), solver, tolerances)
    return _compiled(jnp.asarray(matrix), jnp.asarray(rhs), solver, options)


def _counts(solution):
    return tuple(int(solution.stats[k]) for k in ("num_steps", "num_matvecs", "num_restarts"))


def _ok(solution):
    return bool(solution.result == lx.RESULTS.successful)


@_methods
def test_leaves_inside_a_cycle(method):
    solution = _solve(A, B, method(rtol=1e-2))
    steps, matvecs, restarts = _counts(solution)
    assert _ok(solution) and 0 < steps < 8 and matvecs == steps + 1 and restarts == 0
    true = np.linalg.norm(B - A @ solution.value)
    np.testing.assert_allclose(solution.stats["residual_norm"], true, rtol=1e-12)


@_methods
def test_warm_start(method):
    solver = method(rtol=1e-8)
    exact = jnp.asarray(np.linalg.solve(A, B))
    solution = _solve(A, B, solver, y0=exact)
    assert _ok(solution) and _counts(solution) == (0, 1, 0)
    np.testing.assert_allclose(solution.value, exact, rtol=1e-15)
    near = _solve(A, B, solver, y0=exact + 1e-5)
    far = _solve(A, B, solver, y0=exact + 1e5)
    cold = _solve(A, B, solver)
    assert _ok(near) and _ok(far) and _counts(near)[0] < _counts(cold)[0] < _counts(far)[0]
    for solution in (near, far):
        np.testing.assert_allclose(solution.value, exact, rtol=1e-6, atol=1e-7)


def test_zero_rhs_needs_no_tolerance_to_forget_a_guess():
    solution = _solve(A, 0 * B, nks.GMRES(rtol=1e-8), y0=jnp.ones(N))
    assert _ok(solution) and _counts(solution) == (0, 0, 0)
    np.testing.assert_array_equal(solution.value, 0)


@_methods
def test_max_steps(method):
    solver = method(rtol=1e-12, restart=4, max_steps=6)
    solution = _solve(A, B, solver)
    assert bool(solution.result == lx.RESULTS.max_steps_reached)
    assert _counts(solution) == (6, 7, 1)
    assert np.linalg.norm(B - A @ solution.value) < np.linalg.norm(B)
    loose = eqx.tree_at(lambda s: s.rtol, solver, 0.05)
    assert _ok(_solve(A, B, loose)) and _counts(_solve(A, B, loose))[0] < 6


def test_tolerances_add_up():
    norm = np.linalg.norm(B)
    for rtol, atol in ((0.0, 0.3), (0.05, 0.0), (0.05, 0.2)):
        solution = _solve(A, B, nks.GMRES(rtol=rtol, atol=atol))
        assert _ok(solution) and 0 < float(solution.stats["residual_norm"]) <= atol + rtol * norm
    assert _counts(_solve(A, B, nks.GMRES(rtol=0.0, atol=2 * norm))) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_out_of_reach_tolerance_stagnates_at_the_solution(dtype):
    """Past rounding the estimate is fiction (in float32 ‖u‖² would overflow): the solve goes on
    from the true residual, gives up, and hands back what is as good as it gets."""
    matrix, rhs = A.astype(dtype), B.astype(dtype)
    for guess in ({}, {"y0": jnp.full(N, 1e10, dtype)}):
        solution = _solve(matrix, rhs, nks.GMRES(rtol=1e-35, restart=N), **guess)
        assert bool(solution.result == lx.RESULTS.stagnation)
        true = np.linalg.norm(B - A @ np.asarray(solution.value, np.float64))
        assert true <= 100 * np.finfo(dtype).eps * np.linalg.norm(B)


def test_happy_breakdown():
    """Three distinct eigenvalues: the space is invariant after three steps."""
    d = np.repeat([1.0, 2.0, -3.0], [10, 9, 10])
    for dtype in (np.float64, np.float32):
        rtol = 1e-5 if dtype == np.float32 else 1e-13
        solution = _solve(np.diag(d).astype(dtype), B.astype(dtype), nks.GMRES(rtol=rtol))
        assert _ok(solution) and _counts(solution) == (3, 4, 0)
        np.testing.assert_allclose(solution.value, B / d, rtol=20 * rtol)


def test_a_single_unknown():
    for method in (nks.GMRES, nks.FGMRES):
        solution = _solve([[2.0]], [3.0], method())
        assert _ok(solution) and _counts(solution) == (1, 2, 0)
        np.testing.assert_allclose(solution.value, [1.5])
    solution = _solve([[0.0]], [3.0], nks.GMRES())
    assert bool(solution.result == lx.RESULTS.stagnation) and float(solution.value[0]) == 0


@_methods
def test_no_unknowns(method):
    solution = _solve(np.zeros((0, 0)), np.zeros(0), method())
    assert _ok(solution) and _counts(solution) == (0, 0, 0) and solution.value.shape == (0,)
    # Lineax itself stumbles on a tree without leaves; the method does not.
    solver, system = method(), LinearSystem(lambda v: v, None, True)
    for vector in ({}, {"a": jnp.zeros(0)}):
        space = solver.workspace(vector, real=True)
        out = solver.solve(system, vector, tolerance=0.0, workspace=space, verify=True)
        assert out.value == vector if not vector else out.value["a"].shape == (0,)
        assert bool(out.result == lx.RESULTS.successful) and int(out.num_matvecs) == 0


@_methods
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_data_is_a_breakdown(method, bad):
    """Never success, and the value stays finite: the last one that was."""
    rhs, matrix = B.copy(), A.copy()
    rhs[3] = bad
    matrix[2, 7] = bad
    for options in ({}, {"y0": jnp.ones(N)}):
        for a, b in ((A, rhs), (matrix, B)):
            solution = _solve(a, b, method(rtol=1e-6), **options)
            assert bool(solution.result == lx.RESULTS.breakdown)
            assert np.all(np.isfinite(solution.value))
    solution = _solve(A, B, method(rtol=1e-6), y0=jnp.full(N, np.nan))
    assert bool(solution.result == lx.RESULTS.breakdown)
    with pytest.raises(Exception, match="breakdown"):
        lx.linear_solve(lx.MatrixLinearOperator(jnp.asarray(A)), jnp.asarray(rhs), method())


def test_a_matvec_that_turns_bad_gives_up_its_cycle():
    """The operator overflows on some vectors only: x stays as at the last restart."""
    system = LinearSystem(lambda v: jnp.where(jnp.abs(v[0]) > 0.5, A @ v, jnp.nan * v), None, True)
    b = jnp.asarray(np.eye(N)[0])
    solver = nks.GMRES()
    space = solver.workspace(b, real=True)
    out = solver.solve(system, b, tolerance=1e-6, workspace=space)
    assert bool(out.result == lx.RESULTS.breakdown) and int(out.num_steps) == 2
    np.testing.assert_array_equal(out.value, 0)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(out.workspace))


@_methods
def test_solve_as_newton_calls_it(method):
    """No verification: one matvec a step; a used workspace changes nothing. Descent is ⟨b, A x⟩
    after one cycle, and no more than that after several."""
    system = LinearSystem(lambda v: A @ v, lambda v: 0.2 * v, True)
    b, solver = jnp.asarray(B), method(restart=5)
    norm = np.linalg.norm(B)

    @jax.jit
    def solve(tolerance, space):
        return solver.solve(system, b, tolerance=tolerance, workspace=space)

    fresh = solve(1e-6 * norm, solver.workspace(b, real=True))
    again = solve(1e-6 * norm, fresh.workspace)
    np.testing.assert_array_equal(fresh.value, again.value)
    image = A @ fresh.value
    assert np.linalg.norm(B - image) <= 1e-6 * norm * (1 + 1e-6)
    assert 0.99 * B @ image < float(fresh.descent) <= B @ image * (1 + 1e-12)
    assert int(fresh.num_matvecs) == int(fresh.num_steps) + int(fresh.num_restarts)
    assert int(fresh.num_restarts) > 0
    first = solve(0.05 * norm, fresh.workspace)
    assert int(first.num_restarts) == 0
    np.testing.assert_allclose(first.descent, B @ (A @ first.value), rtol=1e-10)
    idle = solve(np.inf, fresh.workspace)
    assert int(idle.num_matvecs) == 0 and not np.any(idle.value) and float(idle.descent) == 0
    assert bool(idle.result == lx.RESULTS.successful)


@_methods
def test_refused(method):
    for keywords in ({"restart": 0}, {"rtol": -1.0}, {"atol": -1e-3}, {"rtol": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(keywords))):
            method(**keywords)
    with pytest.raises(ValueError, match=r"tolerance"):
        _solve(A, B, method(), tolerance=1.0)
    with pytest.raises(ValueError, match="square"):
        lx.linear_solve(lx.MatrixLinearOperator(jnp.ones((3, 2))), jnp.ones(3), method())


def test_side_is_left_or_right():
    with pytest.raises(Exception, match="side"):
        nks.GMRES(side="both")  # pyright: ignore
