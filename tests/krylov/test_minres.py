"""MINRES: minimal residuals, the norm that is tested, singular systems, Newton, ℂⁿ as ℝ²ⁿ."""

import functools as ft

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.sparse.linalg as spla

import nksolve as nks
from nksolve.krylov.cg import CG
from nksolve.krylov.minres import MINRES
from nksolve.krylov.system import LinearSystem
from nksolve.problems.bratu import bratu
from tests.helpers import GALLERY
from tests.helpers.gallery import N, from_eigenvalues

INDEFINITE = GALLERY["symmetric_indefinite"]
DIAGONAL = np.linspace(0.2, 2.0, N)


@ft.partial(jax.jit, static_argnames=("steps", "scaled", "verify"))
def _solved(matrix, rhs, tolerance, steps=None, scaled=False, verify=False):
    psolve = (lambda v: jnp.asarray(DIAGONAL) * v) if scaled else None
    system = LinearSystem(lambda v: matrix @ v, psolve, True)
    solver = MINRES(max_steps=steps)
    return solver.solve(system, rhs, tolerance=tolerance, workspace=None, verify=verify)


def _krylov_minimiser(matrix, rhs, scales, steps):
    """argmin ‖b − A x‖ in the norm of M⁻¹ = diag(scales) over M⁻¹K_steps(A M⁻¹, b), densely."""
    space = [scales * rhs]
    for _ in range(steps - 1):
        v = scales * (matrix @ space[-1])
        q, _ = np.linalg.qr(np.array(space).T)
        space.append(v / np.linalg.norm(v))
        space[-1] = space[-1] - q @ (q.T @ space[-1])
        space[-1] /= np.linalg.norm(space[-1])
    basis, root = np.array(space).T, np.sqrt(scales)
    y = np.linalg.lstsq(root[:, None] * (matrix @ basis), root * rhs, rcond=None)[0]
    return basis @ y


@pytest.mark.parametrize(
    ("steps", "scaled"), [(1, False), (2, False), (7, False), (2, True), (7, True)]
)
def test_minimises_the_residual(steps, scaled):
    """… and reports its 2-norm, also where another norm is minimised."""
    matrix, rhs = INDEFINITE.matrix, INDEFINITE.rhs
    scales = DIAGONAL if scaled else np.ones(N)
    out = _solved(matrix, rhs, 0.0, steps, scaled)
    expected = _krylov_minimiser(matrix, rhs, scales, steps)
    np.testing.assert_allclose(out.value, expected, rtol=1e-8, atol=1e-11)
    true = np.linalg.norm(rhs - matrix @ expected)
    np.testing.assert_allclose(out.residual_norm, true, rtol=1e-9)
    assert int(out.num_steps) == int(out.num_matvecs) == steps
    assert int(out.num_preconditioner_applications) == (steps + 1) * scaled


def test_stops_at_the_2_norm_also_with_a_preconditioner():
    matrix, rhs = INDEFINITE.matrix, INDEFINITE.rhs
    norm = np.linalg.norm(rhs)
    for rtol in (0.3, 1e-3, 1e-9):
        out = _solved(matrix, rhs, rtol * norm, scaled=True)
        assert bool(out.result == lx.RESULTS.successful)
        true = np.linalg.norm(rhs - matrix @ out.value)
        assert true <= rtol * norm * (1 + 1e-6)
        np.testing.assert_allclose(out.residual_norm, true, rtol=1e-4)


def test_a_step_without_progress():
    """A swaps two unknowns: the first iteration gains nothing, the second finds x."""
    out = _solved(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1.0, 0.0]), 1e-12)
    assert bool(out.result == lx.RESULTS.successful) and int(out.num_steps) == 2
    np.testing.assert_allclose(out.value, [0.0, 1.0], atol=1e-15)


def test_a_negative_definite_preconditioner_does_what_its_negative_does():
    """As that of a negative definite A is, or −I."""
    matrix, diagonal = jnp.asarray(INDEFINITE.matrix), jnp.asarray(1.0 + np.arange(N) % 3)

    @jax.jit
    def solve(sign, b):
        system = LinearSystem(lambda v: matrix @ v, lambda v: sign * diagonal * v, True)
        return MINRES().solve(system, b, tolerance=1e-8, workspace=None, verify=True)

    one, other = solve(1.0, INDEFINITE.rhs), solve(-1.0, INDEFINITE.rhs)
    assert bool(other.result == lx.RESULTS.successful)
    assert int(other.num_steps) == int(one.num_steps)
    np.testing.assert_array_equal(other.value, one.value)


def test_an_indefinite_preconditioner_is_a_breakdown():
    system = LinearSystem(lambda v: v, lambda v: v * jnp.where(jnp.arange(N) % 2, 1.0, -9.0), True)
    solve = lambda b: MINRES().solve(system, b, tolerance=1e-8, workspace=None)
    out = jax.jit(solve)(INDEFINITE.rhs)
    assert bool(out.result == lx.RESULTS.breakdown) and not np.any(out.value)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_singular_and_almost_singular(dtype):
    """Null spaces, ill-conditioned matrices, inconsistent sides of any size: `stagnation` exactly
    where b is not in the range, with the true residual, never more than ‖b‖."""
    rng, exponents = np.random.default_rng(5), 3.0 if dtype == np.float32 else 4.0
    rtol, verdicts = (1e-4 if dtype == np.float32 else 1e-8), set()
    for trial in range(9):
        values = rng.choice([-1.0, 1.0], N) * 10 ** rng.uniform(-exponents, 0, N)
        values[: trial % 3] = 0.0
        if trial < 3:
            values = np.abs(values)
        matrix = from_eigenvalues(rng, values)
        rhs = matrix @ rng.standard_normal(N)
        rhs /= np.linalg.norm(rhs)
        outside = 0.0
        if trial % 3 and trial < 6:
            u = np.linalg.eigh(matrix)
            null = u[1][:, np.argmin(np.abs(u[0]))]
            outside = 10 ** rng.uniform(-2, 1)
            rhs = rhs + outside * null
        norm = np.linalg.norm(rhs)
        out = _solved(
            matrix.astype(dtype), rhs.astype(dtype), dtype(rtol * norm), 100 * N, verify=True
        )
        if outside:
            assert bool(out.result == lx.RESULTS.stagnation), trial
            true = np.linalg.norm(rhs - matrix @ np.asarray(out.value, np.float64))
            np.testing.assert_allclose(out.residual_norm, true, rtol=1e-3)
            assert 0.99 * outside <= float(out.residual_norm) <= 1.001 * norm
        else:
            assert bool(out.result == lx.RESULTS.successful), trial
        assert np.all(np.isfinite(out.value))
        verdicts.add(bool(outside))
    assert verdicts == {True, False}


def test_bratu_takes_the_iterations_of_scipy():
    """SciPy stops by another test: its iterates are held to ours."""
    problem = bratu(24)
    b = -problem.fn(problem.y0, problem.args)
    symmetric = frozenset({lx.symmetric_tag})
    operator = nks.linearise(problem.fn, problem.y0, problem.args, tags=symmetric).operator
    mv = jax.jit(operator.mv)
    apply = lambda v: np.asarray(mv(jnp.asarray(v.reshape(b.shape)))).ravel()
    flat = np.asarray(b).ravel()
    linear = spla.LinearOperator((b.size, b.size), matvec=apply, dtype=float)
    residuals = []
    spla.minres(
        linear,
        flat,
        rtol=1e-14,
        callback=lambda x: residuals.append(np.linalg.norm(flat - apply(x))),
    )
    for rtol in (1e-3, 1e-8):
        expected = 1 + next(k for k, r in enumerate(residuals) if r <= rtol * np.linalg.norm(flat))
        solution = lx.linear_solve(operator, b, MINRES(rtol=rtol))
        assert abs(int(solution.stats["num_steps"]) - expected) <= 2


def test_newton_on_an_indefinite_problem():
    """A y + y³/10 = s b, A indefinite: root and derivative as with GMRES."""
    a, b = jnp.asarray(INDEFINITE.matrix), jnp.asarray(INDEFINITE.rhs)
    fn = lambda y, s: a @ y + y**3 / 10 - s * b

    @ft.partial(jax.jit, static_argnums=0)
    def solve(method, s):
        solver = nks.NewtonKrylov(1e-11, 0.0, linear_solver=method)

        def loss(s):
            tags = frozenset({lx.symmetric_tag})
            solution = nks.root_find(fn, solver, jnp.zeros(N), s, tags=tags)
            return jnp.sum(solution.value**2), solution.stats

        return jax.value_and_grad(loss, has_aux=True)(s)

    (value, stats), gradient = solve(MINRES(), jnp.asarray(1.0))
    (expected, _), slope = solve(nks.GMRES(restart=N), jnp.asarray(1.0))
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(gradient, slope, rtol=1e-7)
    assert int(stats["num_linear_failures"]) == 0


@pytest.mark.parametrize(("method", "shift"), [(CG, 12.0), (MINRES, 0.3)])
def test_real_space(method, shift):
    """v → H v + S conj(v), symmetric for Re⟨v, w⟩ on ℂⁿ as ℝ²ⁿ; definite or indefinite."""
    n, rng = 9, np.random.default_rng(3)
    h, s, b = (rng.standard_normal((2, n, k)) for k in (n, n, 1))
    h, s, b = (x[0] + 1j * x[1] for x in (h, s, b))
    h, s, b = (h + h.conj().T) / 2 + shift * np.eye(n), (s + s.T) / 2, b[:, 0]
    dense = np.block([[h.real + s.real, s.imag - h.imag], [h.imag + s.imag, h.real - s.real]])
    np.testing.assert_allclose(dense, dense.T, atol=1e-14)
    assert (np.linalg.eigvalsh(dense)[0] > 0) == (method is CG)
    exact = np.linalg.solve(dense, np.concatenate([b.real, b.imag]))
    system = LinearSystem(
        lambda v: h @ v + s @ v.conj(), lambda v: v * jnp.asarray(DIAGONAL[:n], v.dtype), True
    )
    solver = method()
    out = jax.jit(lambda b: solver.solve(system, b, tolerance=1e-11, workspace=None))(b)
    assert (
        int(out.result._value) == lx.RESULTS.successful._value and int(out.num_steps) <= 2 * n + 4
    )
    np.testing.assert_allclose(out.value, exact[:n] + 1j * exact[n:], rtol=1e-8)
