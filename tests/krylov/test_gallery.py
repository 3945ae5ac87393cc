"""Every method × the gallery × PyTrees × dtypes, against NumPy's dense solve."""

import functools as ft

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from tests.helpers import GALLERY
from tests.helpers.gallery import N

METHODS = {
    "GMRES": nks.GMRES,
    "GMRES-left": ft.partial(nks.GMRES, side="left"),
    "GMRES-MGS": ft.partial(nks.GMRES, orthogonalisation=nks.MGS()),
    "FGMRES": nks.FGMRES,
    "FGMRES-MGS": ft.partial(nks.FGMRES, orthogonalisation=nks.MGS()),
}
STRUCTURES = {
    "array": lambda v: v,
    "two leaves": lambda v: {"a": v[:20].reshape(4, 5), "b": v[20:]},
    "scalar leaf": lambda v: (v[:28].reshape(2, 14), v[28]),
}
RTOL = {np.float64: 1e-8, np.float32: 1e-4, np.complex128: 1e-8}


def _flat(vector):
    return jnp.concatenate([jnp.ravel(x) for x in jtu.tree_leaves(vector)])


def _data(name, dtype):
    """The case in `dtype`; complex as D A Dᴴ and D b with a diagonal unitary D."""
    case = GALLERY[name]
    if dtype == np.complex128:
        d = np.exp(1j * np.arange(N))
        return (d[:, None] * case.matrix * d.conj()).astype(dtype), (d * case.rhs).astype(dtype)
    return case.matrix.astype(dtype), case.rhs.astype(dtype)


@ft.cache
def _solver(method, structure, dtype, restart):
    """One compiled solve for all cases: matrix, right-hand side and tolerance are arguments."""
    wrap = STRUCTURES[structure]

    @jax.jit
    def solve(matrix, rhs, rtol):
        b = wrap(rhs)
        apply = lambda v: wrap(matrix @ _flat(v))
        operator = lx.FunctionLinearOperator(apply, jax.eval_shape(lambda: b))
        solver = METHODS[method](rtol=rtol, restart=restart)
        solution = lx.linear_solve(operator, b, solver, throw=False)
        return _flat(solution.value), solution.result, solution.stats

    return solve


def _check(name, method, structure, dtype, restart=N + 3):
    matrix, rhs = _data(name, dtype)
    rtol = RTOL[dtype]
    x, result, stats = _solver(method, structure, dtype, restart)(matrix, rhs, dtype(rtol).real)
    x = np.asarray(x)
    assert x.dtype == dtype and np.all(np.isfinite(x))
    true = np.linalg.norm(rhs - matrix @ x)
    slack = 100 * np.finfo(dtype).eps * (np.linalg.norm(matrix, 2) * np.linalg.norm(x) + true)
    assert abs(true - float(stats["residual_norm"])) <= slack  # the true one, to rounding
    case = GALLERY[name]
    succeeded = bool(result == lx.RESULTS.successful)
    assert succeeded == (float(stats["residual_norm"]) <= rtol * np.linalg.norm(rhs) * (1 + 1e-6))
    if succeeded:
        assert true <= rtol * np.linalg.norm(rhs) * 1.2
        if not case.singular and case.condition <= 1e3:
            exact = np.linalg.solve(matrix, rhs)
            error = np.linalg.norm(x - exact)
            assert error <= 1.1e3 * rtol * np.linalg.norm(exact)
    return result, stats


@pytest.mark.parametrize("name", list(GALLERY))
@pytest.mark.parametrize("method", list(METHODS))
def test_methods(method, name):
    result, stats = _check(name, method, "array", np.float64)
    assert bool(result == lx.RESULTS.successful) == GALLERY[name].consistent
    if GALLERY[name].consistent:
        assert int(stats["num_steps"]) <= N + (method.endswith("MGS") and name == "ill_conditioned")
    else:
        assert bool(result == lx.RESULTS.stagnation)


@pytest.mark.parametrize("name", list(GALLERY))
@pytest.mark.parametrize(
    ("method", "structure", "dtype"),
    [
        ("GMRES", "two leaves", np.float32),
        ("FGMRES", "scalar leaf", np.complex128),
        ("GMRES-MGS", "two leaves", np.complex128),
        ("GMRES-left", "scalar leaf", np.float32),
    ],
    ids=lambda p: getattr(p, "__name__", p),
)
def test_structures_and_dtypes(method, structure, dtype, name):
    result, _ = _check(name, method, structure, dtype)
    assert bool(result == lx.RESULTS.successful) == GALLERY[name].consistent


@pytest.mark.parametrize("method", ["GMRES", "FGMRES"])
def test_cyclic_shift_stagnates_below_full_length(method):
    """The textbook's worst: no progress in a cycle shorter than n, none needed beyond."""
    result, stats = _check("cyclic_shift", method, "array", np.float64, restart=7)
    assert bool(result == lx.RESULTS.stagnation)
    assert (int(stats["num_steps"]), int(stats["num_matvecs"])) == (7, 8)
    result, stats = _check("cyclic_shift", method, "array", np.float64, restart=N)
    assert bool(result == lx.RESULTS.successful) and int(stats["num_steps"]) == N


@pytest.mark.parametrize("name", list(GALLERY))
def test_restarted(name):
    """Short cycles: no success without the residual, no NaN (`_check`), counters that add up."""
    result, stats = _check(name, "GMRES", "array", np.float64, restart=7)
    steps, restarts = int(stats["num_steps"]), int(stats["num_restarts"])
    assert steps <= 10 * N
    assert steps <= 7 * (restarts + 1)
    # One matvec a step, one at each restart, and the one that ends it without restarting.
    exhausted = bool(result == lx.RESULTS.max_steps_reached)
    assert exhausted == (steps == 10 * N)
    assert int(stats["num_matvecs"]) == steps + restarts + (steps > 0 and not exhausted)


@pytest.mark.parametrize("name", ["singular_inconsistent", "cyclic_shift"])
def test_throw(name):
    matrix, rhs = _data(name, np.float64)
    solver = nks.GMRES(rtol=1e-8, restart=7)
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix))
    solution = lx.linear_solve(operator, jnp.asarray(rhs), solver, throw=False)
    assert np.all(np.isfinite(solution.value))
    with pytest.raises(Exception, match="stagnation"):
        lx.linear_solve(operator, jnp.asarray(rhs), solver)


def test_singular_on_the_krylov_space():
    """A nilpotent A, b in its cokernel: GMRES can't move, and says so after one cycle."""
    operator = lx.MatrixLinearOperator(jnp.array([[0.0, 1.0], [0.0, 0.0]]))
    solution = lx.linear_solve(operator, jnp.array([1.0, 0.0]), nks.GMRES(), throw=False)
    assert bool(solution.result == lx.RESULTS.stagnation)
    np.testing.assert_array_equal(solution.value, [0.0, 0.0])
    assert float(solution.stats["residual_norm"]) == 1.0
