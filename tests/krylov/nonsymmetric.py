"""What every nonsymmetric method with a short recurrence is held to."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np

import nksolve as nks
import nksolve.problems
from nksolve import tree
from nksolve.krylov.base import LinearSystem
from tests.helpers import GALLERY, Counter
from tests.helpers.gallery import N

A = GALLERY["nonsymmetric"].matrix
B = GALLERY["nonsymmetric"].rhs
RTOL = {np.float64: 1e-8, np.float32: 1e-4, np.complex128: 1e-8}
SCALED = nks.UserPreconditioner(lambda *_: lambda v: tree.scale(0.25, v))


def split(v):
    return {"a": v[:20].reshape(4, 5), "b": v[20:]}


def join(vector):
    return jnp.concatenate([jnp.ravel(x) for x in jtu.tree_leaves(vector)])


@eqx.filter_jit
def _compiled(matrix, rhs, solver, options):
    if len(rhs) == N:
        structure = jax.eval_shape(split, rhs)
        operator = lx.FunctionLinearOperator(lambda v: split(matrix @ join(v)), structure)
        options = {name: split(value) for name, value in options.items()}
        solution = lx.linear_solve(operator, split(rhs), solver, throw=False, options=options)
        return join(solution.value), solution.result, solution.stats
    operator = lx.MatrixLinearOperator(matrix)
    solution = lx.linear_solve(operator, rhs, solver, throw=False, options=options)
    return solution.value, solution.result, solution.stats


def solve(matrix, rhs, solver, **options):
    """(value, result, stats); on a PyTree where there are N unknowns. Tolerances are traced."""
    rhs = jnp.asarray(rhs)
    real = jnp.finfo(rhs.dtype).dtype
    tolerances = jnp.asarray(solver.rtol, real), jnp.asarray(solver.atol, real)
    solver = eqx.tree_at(lambda s: (s.rtol, s.atol), solver, tolerances)
    x, result, stats = _compiled(jnp.asarray(matrix), rhs, solver, options)
    return np.asarray(x), result, stats


def is_(result, *names):
    return any(bool(result == getattr(lx.RESULTS, name)) for name in names)


def counts(stats):
    return tuple(int(stats[f"num_{name}"]) for name in ("steps", "matvecs", "restarts"))


def check_gallery(name, solver, dtype):
    """The dense oracle: success if and only if the true residual is small. Returns (ok, stats)."""
    case, rtol = GALLERY[name], RTOL[dtype]
    matrix, rhs = case.matrix, case.rhs
    if dtype == np.complex128:  # D A Dᴴ with a diagonal unitary D
        d = np.exp(1j * np.arange(N))
        matrix, rhs = d[:, None] * matrix * d.conj(), d * rhs
    matrix, rhs = matrix.astype(dtype), rhs.astype(dtype)
    solver = eqx.tree_at(lambda s: s.rtol, solver, rtol)
    x, result, stats = solve(matrix, rhs, solver)
    assert x.dtype == dtype and np.all(np.isfinite(x))
    size, true = np.linalg.norm(rhs), np.linalg.norm(rhs - matrix @ x)
    reported = float(stats["residual_norm"])
    slack = 100 * np.finfo(dtype).eps * (np.linalg.norm(matrix, 2) * np.linalg.norm(x) + true)
    assert abs(true - reported) <= slack
    ok = is_(result, "successful")
    assert ok == (reported <= rtol * size * (1 + 1e-6))
    assert ok or is_(result, "breakdown", "stagnation", "max_steps_reached")
    assert true <= size * (1 + 1e-5)  # never worse than the start
    steps, matvecs, _ = counts(stats)
    if name == "zero_rhs":
        assert ok and matvecs == 0 and not np.any(x)
    if not case.consistent:
        assert not ok
    if ok and not case.singular and case.condition <= 1e3:
        exact = np.linalg.solve(matrix, rhs)
        assert np.linalg.norm(x - exact) <= 1.1e3 * rtol * np.linalg.norm(exact)
    assert steps <= 10 * N + getattr(solver, "ell", 1) - 1
    return ok, stats


def check_exits(solver):
    """Zero, non-finite, small and empty data; a guess; limits and scales."""
    bad_rhs, bad_matrix = B.copy(), A.copy()
    bad_rhs[3] = bad_matrix[2, 7] = np.nan
    for matrix, rhs in ((A, bad_rhs), (bad_matrix, B)):
        x, result, _ = solve(matrix, rhs, solver)
        assert is_(result, "breakdown") and np.all(np.isfinite(x))
    exact = np.linalg.solve(A, B)
    x, result, stats = solve(A, B, solver, y0=jnp.asarray(exact))
    assert is_(result, "successful") and counts(stats) == (0, 1, 0)
    np.testing.assert_allclose(x, exact, rtol=1e-14)
    _, _, cold = solve(A, B, solver)
    x, result, near = solve(A, B, solver, y0=jnp.asarray(exact * (1 + 1e-4)))
    assert is_(result, "successful") and 0 < counts(near)[0] < counts(cold)[0]
    np.testing.assert_allclose(x, exact, rtol=1e-5)
    x, _, stats = solve(A, 0 * B, solver, y0=jnp.ones(N))
    assert not np.any(x) and counts(stats) == (0, 0, 0)
    x, result, stats = solve([[2.0]], [3.0], solver)
    assert is_(result, "successful") and counts(stats)[0] <= solver.__dict__.get("ell", 1)
    np.testing.assert_allclose(x, [1.5], rtol=1e-12)
    x, result, _ = solve([[0.0]], [3.0], solver)
    assert is_(result, "breakdown", "stagnation") and x[0] == 0
    for vector in ({}, {"a": jnp.zeros(0)}):
        space = solver.workspace(vector, real=True)
        out = solver.solve(
            LinearSystem(lambda v: v, None, True), vector, tolerance=0.0, workspace=space
        )
        assert bool(out.result == lx.RESULTS.successful) and int(out.num_matvecs) == 0


def check_units(solver):
    """float32: steps do not depend on the units of b; tests are relative to the data."""
    steps = set()
    for exponent in (-20, -8, 0, 8, 20):
        rhs = (B * 10.0**exponent).astype(np.float32)
        _, result, stats = solve(A.astype(np.float32), rhs, solver)
        assert is_(result, "successful")
        steps.add(counts(stats)[0])
    assert len(steps) == 1


def check_counters(make):
    """Reported matvecs and applications against those that ran; M on the right."""
    applied, preconditioned = Counter(), Counter()
    inverse = np.linalg.inv(A + 0.3 * np.eye(N))
    solver = make(
        rtol=1e-9,
        preconditioner=nks.UserPreconditioner(
            lambda *_: lambda v: jnp.asarray(inverse) @ preconditioned.tick(v)
        ),
    )
    structure = jax.ShapeDtypeStruct((N,), B.dtype)
    operator = lx.FunctionLinearOperator(lambda v: A @ applied.tick(v), structure)

    @eqx.filter_jit
    def run(b, rtol):
        return lx.linear_solve(
            operator, b, eqx.tree_at(lambda s: s.rtol, solver, rtol), throw=False
        )

    totals = set()
    for rtol in (1e-1, 1e-4, 1e-9):
        with applied.measure() as matvecs, preconditioned.measure() as applications:
            out = run(jnp.asarray(B), jnp.asarray(rtol))
        assert bool(out.result == lx.RESULTS.successful)
        # Right preconditioning tests ‖b − A x‖ itself.
        true = np.linalg.norm(B - A @ np.asarray(out.value))
        assert true <= rtol * np.linalg.norm(B) * (1 + 1e-6)
        np.testing.assert_allclose(out.stats["residual_norm"], true, rtol=1e-5, atol=1e-13)
        assert int(out.stats["num_matvecs"]) == len(matvecs.executions)
        reported = int(out.stats["num_preconditioner_applications"])
        assert reported == len(applications.executions) == len(matvecs.executions) - 1
        totals.add(reported)
    assert len(totals) >= 2


def check_lanes(solver):
    """Lanes that stop at different steps, two that fail: as each alone."""
    names = ["zero_rhs", "nonsymmetric", "convection_diffusion", "singular_consistent"]
    matrices = [GALLERY[name].matrix for name in names]
    rhs = [GALLERY[name].rhs for name in names]
    broken, nan_rhs = matrices[1].copy(), rhs[1].copy()
    broken[3, 5] = nan_rhs[0] = np.nan
    matrices = jnp.asarray(np.stack([*matrices, broken, matrices[1], np.eye(N)]))
    rhs = jnp.asarray(np.stack([*rhs, rhs[1], nan_rhs, 3 * rhs[1]]))
    solver = eqx.tree_at(lambda s: (s.rtol, s.atol), solver, (jnp.asarray(1e-5), jnp.asarray(0.0)))
    batch = eqx.filter_vmap(_compiled.__wrapped__, in_axes=(0, 0, None, None))
    values, results, stats = eqx.filter_jit(batch)(matrices, rhs, solver, {})
    steps = set()
    for lane in range(len(rhs)):
        value, result, own = solve(matrices[lane], rhs[lane], solver)
        assert int(results._value[lane]) == int(result._value), lane
        for name in own:
            if name.startswith("num_"):
                assert int(stats[name][lane]) == int(own[name]), (lane, name)
        np.testing.assert_allclose(values[lane], value, rtol=1e-6, atol=1e-8)
        steps.add(int(own["num_steps"]))
    assert len(steps) >= 4


def check_derivatives(solver, dtype=np.float64):
    """jvp and vjp of `lx.linear_solve` with respect to A and b, against dense ones."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape)
    if dtype == np.complex128:
        draw = lambda *shape: rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    shift = np.diag(np.arange(N) / N) * (1j if dtype == np.complex128 else 1)
    a, b, da, db, w = jnp.asarray(A + shift), draw(N), draw(N, N), draw(N), draw(N)

    def value(a, b):
        operator = nks.linearise(lambda y, m: split(m @ join(y)), split(b), a).operator
        return join(lx.linear_solve(operator, split(b), solver).value)

    @jax.jit
    def both(a, b, da, db, w):
        tangent = jax.jvp(value, (a, b), (da, db))[1]
        return tangent, jax.vjp(value, a, b)[1](w)

    tangent, (bar_a, bar_b) = both(a, *(jnp.asarray(v) for v in (b, da, db, w)))
    x, adjoint = np.linalg.solve(a, b), np.linalg.solve(np.asarray(a).T, w)
    close = {"rtol": 1e-6, "atol": 1e-7}
    np.testing.assert_allclose(tangent, np.linalg.solve(a, db - da @ x), **close)
    np.testing.assert_allclose(bar_b, adjoint, **close)
    np.testing.assert_allclose(bar_a, -np.outer(adjoint, x), **close)


def poisson(n):
    """M⁻¹ = (−Δ_h)⁻¹ on the unit square, by sine transforms; symmetric."""
    i = np.arange(1, n + 1)
    s = np.sqrt(2 / (n + 1)) * np.sin(np.pi * np.outer(i, i) / (n + 1))
    values = (2 - 2 * np.cos(np.pi * i / (n + 1))) * (n + 1) ** 2
    s, d = jnp.asarray(s), jnp.asarray(values[:, None] + values)
    return nks.UserPreconditioner(lambda *_: lambda v: s @ ((s @ v @ s) / d) @ s)


def check_newton(make):
    """Inside Newton: the root, matvecs as they ran, and the gradient against differences."""
    problem = nksolve.problems.get("convection-diffusion", n=7)
    counter = Counter()
    fn = lambda u, args: problem.fn(counter.tick(u), args)
    inner = make(rtol=1e-11, preconditioner=poisson(7))
    method = nks.NewtonKrylov(rtol=1e-11, atol=1e-11, linear_solver=inner)

    @eqx.filter_jit
    def run(strength):
        args = problem.args._replace(strength=strength)
        return nks.root_find(fn, method, problem.y0, args, throw=False)

    with counter.measure() as count:
        solution = run(problem.args.strength)
    assert bool(solution.stats["reason"] == nks.REASONS.residual_rtol) or bool(
        solution.stats["reason"] == nks.REASONS.residual_atol
    )
    start = np.linalg.norm(problem.fn(problem.y0, problem.args))
    final = np.linalg.norm(problem.fn(solution.value, problem.args))
    assert final <= 1e-11 * start * (1 + 1e-3) + 1e-11
    assert int(solution.stats["num_matvecs"]) == count.tangent > 0
    assert int(solution.stats["num_linear_failures"]) == 0
    total = lambda strength: jnp.sum(run(strength).value ** 3)
    gradient = float(jax.jit(jax.grad(total))(problem.args.strength))
    h = 1e-3
    difference = float(total(jnp.asarray(20.0 + h)) - total(jnp.asarray(20.0 - h))) / (2 * h)
    np.testing.assert_allclose(gradient, difference, rtol=1e-5)


def kelley(make, preconditioned):
    """(reason, stats) of Kelley's linear convection–diffusion problem, n = 31, η = 9.8e-4."""
    problem = nksolve.problems.get("convection-diffusion-linear")
    operator = nks.linearise(problem.fn, problem.y0, problem.args).operator
    b = -problem.fn(problem.y0, problem.args)
    choice = {"preconditioner": poisson(31)} if preconditioned else {}
    solver = make(rtol=9.8e-4, **choice)
    solution = eqx.filter_jit(lx.linear_solve)(operator, b, solver, throw=False)
    true = np.linalg.norm(b - operator.mv(solution.value)) / np.linalg.norm(b)
    assert bool(solution.result == lx.RESULTS.successful) and true <= 9.8e-4
    return solution.stats


def after(steps, make, matrix, rhs, **keywords):
    """x after so many steps, and Newton's way of calling: no verification, M⁻¹ = ¼."""
    solver = make(max_steps=steps, **keywords)
    rhs = jnp.asarray(rhs)
    real = not jnp.iscomplexobj(rhs)
    system = LinearSystem(lambda v: jnp.asarray(matrix) @ v, lambda v: 0.25 * v, real)
    space = solver.workspace(rhs, real=real)
    out = eqx.filter_jit(solver.solve)(system, rhs, tolerance=0.0, workspace=space)
    assert int(out.num_steps) == steps and int(out.num_restarts) == 0
    return np.asarray(out.value), out
