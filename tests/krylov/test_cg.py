"""CG: textbook iterates, negative curvature, the truncation of Steihaug and Toint, Newton."""

import functools as ft
import itertools as it

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.optimize as spo
import scipy.sparse.linalg as spla

import nksolve as nks
from nksolve.krylov.cg import CG
from nksolve.krylov.system import LinearSystem
from nksolve.problems.bratu import bratu
from tests.helpers import GALLERY
from tests.helpers.gallery import N

SPD, INDEFINITE = GALLERY["symmetric_positive_definite"], GALLERY["symmetric_indefinite"]
DIAGONAL = np.linspace(0.2, 2.0, N)


def _system(matrix, scales=None):
    psolve = None if scales is None else lambda v: scales * v
    return LinearSystem(lambda v: matrix @ v, psolve, True)


@jax.jit
def _solved(matrix, rhs, tolerance):
    return CG().solve(_system(matrix), rhs, tolerance=tolerance, workspace=None)


@ft.partial(jax.jit, static_argnums=4)
def _truncated(matrix, rhs, radius, tolerance, scaled=False):
    system = _system(matrix, jnp.asarray(DIAGONAL) if scaled else None)
    return CG().steihaug(system, rhs, radius=radius, tolerance=tolerance)


def _iterates(matrix, rhs):
    """Textbook CG in NumPy: x_k, and the curvature ⟨p_k, A p_k⟩/‖p_k‖² of the step from it."""
    x, r = np.zeros_like(rhs), rhs.copy()
    p = r.copy()
    while True:
        q = matrix @ p
        curvature = p @ q / (p @ p)
        yield x, curvature
        alpha = (r @ r) / (p @ q)
        x, new = x + alpha * p, r - alpha * q
        p = new + (new @ new) / (r @ r) * p
        r = new


def _last_before_negative_curvature(matrix, rhs):
    """The number of products with A until it is seen, and the iterate before."""
    return next(
        (k, x) for k, (x, curvature) in enumerate(_iterates(matrix, rhs), 1) if curvature < 0
    )


def _model(matrix, rhs, x):
    return 0.5 * x @ matrix @ x - rhs @ x


def test_iterates_are_the_textbooks():
    """The tolerance of the k-th solve lies at the residual of the k-th iterate."""
    for steps, (x, _) in enumerate(it.islice(_iterates(SPD.matrix, SPD.rhs), 1, 9), 1):
        residual = np.linalg.norm(SPD.rhs - SPD.matrix @ x)
        out = _solved(SPD.matrix, SPD.rhs, residual * (1 + 1e-9))
        assert int(out.num_steps) == steps
        np.testing.assert_allclose(out.value, x, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("sign", [1, -1])
def test_negative_curvature_is_a_breakdown_at_the_iterate_before(sign):
    """A mostly positive matrix with one negative eigenvalue, and minus that matrix."""
    values = np.linspace(1.0, 10.0, N)
    values[0] = -1e-3
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((N, N)))[0]
    matrix = sign * (q * values) @ q.T
    rhs = q @ np.ones(N)
    steps, expected = _last_before_negative_curvature(sign * matrix, rhs)
    expected = sign * expected
    assert steps > 5
    out = _solved(matrix, rhs, 1e-12)
    assert bool(out.result == lx.RESULTS.breakdown)
    assert int(out.num_steps) == int(out.num_matvecs) == steps
    np.testing.assert_allclose(out.value, expected, rtol=1e-6)
    true = np.linalg.norm(rhs - matrix @ out.value)
    np.testing.assert_allclose(out.residual_norm, true, rtol=1e-8)


def test_zero_curvature_is_a_breakdown():
    out = _solved(np.diag([1.0, -1.0]), np.ones(2), 1e-12)
    assert bool(out.result == lx.RESULTS.breakdown) and not np.any(out.value)
    # Singular, b not in the range: the curvature falls to rounding, x stays finite.
    case = GALLERY["singular_inconsistent"]
    out = _solved(case.matrix, case.rhs, 1e-8)
    assert bool(out.result == lx.RESULTS.breakdown) and np.all(np.isfinite(out.value))


def test_an_indefinite_preconditioner_is_a_breakdown():
    scales = jnp.asarray(np.where(np.arange(N) % 2, 1.0, -1.0))
    solve = lambda b: CG().solve(_system(SPD.matrix, scales), b, tolerance=1e-8, workspace=None)
    out = jax.jit(solve)(SPD.rhs)
    assert bool(out.result == lx.RESULTS.breakdown) and np.all(np.isfinite(out.value))


def test_a_large_region_changes_nothing():
    free = _solved(SPD.matrix, SPD.rhs, 1e-8)
    for radius in (1e3, np.inf):
        out = _truncated(SPD.matrix, SPD.rhs, radius, 1e-8)
        assert bool(out.result == lx.RESULTS.successful)
        assert not bool(out.on_boundary) and not bool(out.negative_curvature)
        assert int(out.num_steps) == int(out.num_matvecs) == int(free.num_steps)
        np.testing.assert_allclose(out.value, free.value, rtol=1e-12)
        decrease = -_model(SPD.matrix, SPD.rhs, np.asarray(out.value))
        np.testing.assert_allclose(out.predicted_decrease, decrease, rtol=1e-12)
        assert not np.any(out.direction)


def _best(matrix, rhs, radius):
    """The least m in the region, by the secular equation (no hard case here)."""
    values, q = np.linalg.eigh(matrix)
    g = q.T @ rhs
    norm = lambda shift: np.linalg.norm(g / (values + shift))
    lowest = max(0.0, -values[0])
    if values[0] > 0 and norm(0.0) <= radius:
        return _model(matrix, rhs, q @ (g / values))
    shift = spo.brentq(lambda t: norm(t) - radius, lowest + 1e-10, lowest + 1e6, xtol=1e-14)
    return _model(matrix, rhs, q @ (g / (values + shift)))


@pytest.mark.parametrize("radius", [1e-3, 0.05, 0.3, 2.0])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("case", [SPD, INDEFINITE], ids=["definite", "indefinite"])
def test_truncation(case, scaled, radius):
    matrix, rhs = case.matrix, case.rhs
    out = _truncated(matrix, rhs, radius, 1e-10, scaled)
    x = np.asarray(out.value)
    decrease = -_model(matrix, rhs, x)
    np.testing.assert_allclose(out.predicted_decrease, decrease, rtol=1e-9)
    np.testing.assert_allclose(
        out.residual_norm, np.linalg.norm(rhs - matrix @ x), rtol=1e-7, atol=1e-10
    )
    assert bool(out.result == lx.RESULTS.successful)
    assert np.linalg.norm(x) <= radius * (1 + 1e-12)
    outside = case is INDEFINITE or np.linalg.norm(np.linalg.solve(matrix, rhs)) > radius
    assert bool(out.on_boundary) == outside
    if outside:
        np.testing.assert_allclose(np.linalg.norm(x), radius, rtol=1e-12)
    assert not bool(out.negative_curvature) or case is INDEFINITE
    # At least the decrease along the first direction, at most that of the dense subproblem; in the
    # definite case at least half of it (Yuan, 2000).
    first = DIAGONAL * rhs if scaled else rhs
    slope, curvature = rhs @ first, first @ matrix @ first
    step = radius / np.linalg.norm(first)
    if curvature > 0:
        step = min(step, slope / curvature)
    cauchy, best = -_model(matrix, rhs, step * first), -_best(matrix, rhs, radius)
    assert cauchy * (1 - 1e-12) <= decrease <= best * (1 + 1e-9)
    if case is SPD and not scaled:
        assert decrease >= 0.5 * best


def test_negative_curvature_in_a_region():
    """The direction is one of negative curvature; x goes along it to the boundary."""
    out = _truncated(INDEFINITE.matrix, INDEFINITE.rhs, 50.0, 1e-10)
    assert bool(out.negative_curvature) and bool(out.on_boundary)
    d = np.asarray(out.direction)
    np.testing.assert_allclose(np.linalg.norm(d), 1.0, rtol=1e-12)
    assert d @ INDEFINITE.matrix @ d < 0
    steps, before = _last_before_negative_curvature(INDEFINITE.matrix, INDEFINITE.rhs)
    assert int(out.num_steps) == steps
    tau = d @ (np.asarray(out.value) - before)
    assert tau > 0
    np.testing.assert_allclose(out.value, before + tau * d, rtol=1e-8)
    # Without a region there is nowhere to go: the iterate before.
    out = _truncated(INDEFINITE.matrix, INDEFINITE.rhs, np.inf, 1e-10)
    assert bool(out.result == lx.RESULTS.breakdown) and bool(out.negative_curvature)
    assert not bool(out.on_boundary)
    np.testing.assert_allclose(out.value, before, rtol=1e-8, atol=1e-14)
    # A negative definite: at once.
    out = _truncated(-SPD.matrix, SPD.rhs, 2.0, 1e-10)
    assert bool(out.negative_curvature) and int(out.num_steps) == 1
    np.testing.assert_allclose(out.value, 2 * SPD.rhs / np.linalg.norm(SPD.rhs), rtol=1e-12)


def test_truncation_of_the_trivial_and_the_broken():
    out = _truncated(SPD.matrix, 0 * SPD.rhs, 1.0, 1e-10)
    assert bool(out.result == lx.RESULTS.successful) and int(out.num_matvecs) == 0
    assert float(out.predicted_decrease) == 0 and not np.any(out.value)
    rhs = SPD.rhs.copy()
    rhs[2] = np.nan
    for matrix, b in ((SPD.matrix, rhs), (np.nan * SPD.matrix, SPD.rhs)):
        out = _truncated(matrix, b, 1.0, 1e-10)
        assert bool(out.result == lx.RESULTS.breakdown) and not np.any(out.value)
        assert not bool(out.on_boundary)
    with pytest.raises(ValueError, match="radius"):
        CG().steihaug(_system(SPD.matrix), jnp.asarray(SPD.rhs), radius=0.0, tolerance=0.0)


def test_truncation_in_lanes():
    radii = jnp.asarray([1e-3, 0.3, 2.0, np.inf])
    matrices = jnp.stack([SPD.matrix, INDEFINITE.matrix, INDEFINITE.matrix, SPD.matrix])
    rhs = jnp.asarray(SPD.rhs)
    batch = jax.vmap(lambda m, r: _truncated(m, rhs, r, 1e-8))(matrices, radii)
    for lane in range(4):
        out = _truncated(matrices[lane], rhs, radii[lane], 1e-8)
        assert int(out.num_steps) == int(batch.num_steps[lane])
        for name in ("on_boundary", "negative_curvature"):
            assert bool(getattr(out, name)) == bool(getattr(batch, name)[lane])
        for name in ("value", "direction", "predicted_decrease"):
            np.testing.assert_allclose(
                getattr(batch, name)[lane], getattr(out, name), rtol=1e-8, atol=1e-12
            )


def test_bratu_takes_the_matvecs_of_scipy():
    problem = bratu(24)
    b = -problem.fn(problem.y0, problem.args)
    symmetric = frozenset({lx.symmetric_tag})
    operator = nks.linearise(problem.fn, problem.y0, problem.args, tags=symmetric).operator
    mv = jax.jit(operator.mv)
    for rtol in (1e-3, 1e-8):
        matvecs = []

        def apply(v, matvecs=matvecs):
            matvecs.append(v)
            return np.asarray(mv(jnp.asarray(v.reshape(b.shape)))).ravel()

        dense = spla.LinearOperator((b.size, b.size), matvec=apply, dtype=float)
        _, info = spla.cg(dense, np.asarray(b).ravel(), rtol=rtol)
        solution = lx.linear_solve(operator, b, CG(rtol=rtol))
        assert info == 0 and abs(int(solution.stats["num_matvecs"]) - len(matvecs)) <= 2


def test_newton_and_its_gradient():
    """Same root and gradient as with GMRES, in about as many matvecs."""
    problem = bratu(16)
    scaled = nks.Jacobi(lambda y, args: 4.0 - args / 17**2 * jnp.exp(y))
    reference = nks.NewtonKrylov(1e-10, 0.0, linear_solver=nks.GMRES())
    solver = nks.NewtonKrylov(1e-10, 0.0, linear_solver=CG(preconditioner=scaled))

    @ft.partial(jax.jit, static_argnums=0)
    def solve(solver, lam):
        def loss(lam):
            tags = frozenset({lx.symmetric_tag})
            solution = nks.root_find(problem.fn, solver, problem.y0, lam, tags=tags)
            return jnp.sum(solution.value**2), solution.stats

        return jax.value_and_grad(loss, has_aux=True)(lam)

    (value, stats), gradient = solve(solver, problem.args)
    (expected, plain), slope = solve(reference, problem.args)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(gradient, slope, rtol=1e-7)
    assert int(stats["num_matvecs"]) <= 1.15 * int(plain["num_matvecs"])
    assert int(stats["num_linear_failures"]) == 0 and int(stats["num_rejected_steps"]) == 0
