"""LSMR against dense least squares: equations, least squares, damping, what it reports."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve import tree
from nksolve.krylov.base import LinearSystem
from nksolve.krylov.lsmr import LSMR
from tests.helpers import GALLERY, Counter
from tests.helpers.gallery import N

A = GALLERY["nonsymmetric"].matrix
B = GALLERY["nonsymmetric"].rhs
RTOL = {np.float64: 1e-8, np.float32: 1e-4, np.complex128: 1e-8}
RNG = np.random.default_rng(7)
TALL, WIDE = RNG.standard_normal((37, 11)), RNG.standard_normal((11, 37))
DEFICIENT = TALL[:, :6] @ RNG.standard_normal((6, 11))  # rank 6


def _split(v):
    return {"a": v[:20].reshape(4, 5), "b": v[20:]}


def _flat(vector):
    return jnp.concatenate([jnp.ravel(x) for x in jtu.tree_leaves(vector)])


def _least_squares(matrix, rhs, damp=0.0):
    """The dense solution of least norm."""
    n = matrix.shape[1]
    rows = np.concatenate([matrix, damp * np.eye(n)]) if damp else matrix
    rhs = np.concatenate([rhs, np.zeros(n)]) if damp else rhs
    return np.linalg.lstsq(rows, rhs, rcond=1e-12)[0]


@eqx.filter_jit
def _compiled(matrix, rhs, solver, options):
    operator = lx.MatrixLinearOperator(matrix)
    return lx.linear_solve(operator, rhs, solver, throw=False, options=options)


def _solve(matrix, rhs, solver, **options):
    traced = jnp.asarray(solver.rtol), jnp.asarray(solver.atol)
    solver = eqx.tree_at(lambda s: (s.rtol, s.atol), solver, traced)
    return _compiled(jnp.asarray(matrix), jnp.asarray(rhs), solver, options)


def _ok(solution):
    return bool(solution.result == lx.RESULTS.successful)


def _counts(solution):
    names = ("num_steps", "num_matvecs", "num_transposed_matvecs")
    return tuple(int(solution.stats[name]) for name in names)


@ft.cache
def _gallery_solver(dtype):
    """Arrays in float64, PyTrees otherwise."""
    wrap = (lambda v: v) if dtype == np.float64 else _split

    @jax.jit
    def solve(matrix, rhs, rtol):
        b = wrap(rhs)
        operator = lx.FunctionLinearOperator(
            lambda v: wrap(matrix @ _flat(v)), jax.eval_shape(lambda: b)
        )
        solution = lx.linear_solve(operator, b, LSMR(rtol=rtol), throw=False)
        return _flat(solution.value), solution.result, solution.stats

    return solve


@pytest.mark.parametrize("name", list(GALLERY))
@pytest.mark.parametrize("dtype", list(RTOL), ids=lambda t: t.__name__)
def test_square_systems_are_equations(dtype, name):
    """Success is the true residual's; else the reason, and the least-squares solution."""
    case, rtol = GALLERY[name], RTOL[dtype]
    matrix, rhs = case.matrix.astype(dtype), case.rhs.astype(dtype)
    if dtype == np.complex128:
        d = np.exp(1j * np.arange(N))
        matrix, rhs = (1 + 0.5j) * d[:, None] * matrix * d.conj(), (1 + 0.5j) * d * rhs
    x, result, stats = _gallery_solver(dtype)(matrix, rhs, rtol)
    x = np.asarray(x)
    assert x.dtype == dtype and np.all(np.isfinite(x))
    norm = np.linalg.norm(rhs)
    true = np.linalg.norm(rhs - matrix @ x)
    slack = 100 * np.finfo(dtype).eps * (np.linalg.norm(matrix, 2) * np.linalg.norm(x) + norm)
    assert abs(true - float(stats["residual_norm"])) <= slack
    success = bool(result == lx.RESULTS.successful)
    assert success == (float(stats["residual_norm"]) <= rtol * norm * (1 + 1e-6))
    hopeless = name == "ill_conditioned" and dtype != np.float32
    if hopeless:  # its condition number squared is beyond float64
        assert bool(result == lx.RESULTS.max_steps_reached)
    else:
        assert success == case.consistent
    if not case.consistent:
        assert bool(result == lx.RESULTS.stagnation)
    if case.singular or (case.condition <= 1e3 and not hopeless):
        exact = np.linalg.pinv(case.matrix, rcond=1e-12) @ case.rhs
        exact = exact * d if dtype == np.complex128 else exact
        assert np.linalg.norm(x - exact) <= 100 * rtol * max(np.linalg.norm(exact), 1e-300)


@pytest.mark.parametrize("damp", [0.0, 0.7])
@pytest.mark.parametrize("matrix", [TALL, WIDE, DEFICIENT], ids=["tall", "wide", "deficient"])
def test_least_squares(matrix, damp):
    """Also where the rank is deficient: the solution of least norm. `damp` may be traced."""
    rhs = np.random.default_rng(1).standard_normal(matrix.shape[0])
    solution = _solve(matrix, rhs, LSMR(rtol=1e-10, damp=jnp.asarray(damp) if damp else 0.0))
    exact = _least_squares(matrix, rhs, damp)
    assert _ok(solution)
    np.testing.assert_allclose(solution.value, exact, rtol=1e-7, atol=1e-9)
    residual = np.linalg.norm(np.concatenate([rhs - matrix @ exact, damp * exact]))
    np.testing.assert_allclose(solution.stats["residual_norm"], residual, rtol=1e-9, atol=1e-8)


def test_the_same_iterates_as_scipy():
    """Iteration by iteration; ‖Aᴴr‖ falls in each, and so does ‖r‖."""
    lsmr = pytest.importorskip("scipy.sparse.linalg").lsmr
    rhs = np.random.default_rng(1).standard_normal(len(TALL))
    system = LinearSystem(lambda v: TALL @ v, None, True, lambda w: TALL.T @ w)
    b = jnp.asarray(rhs)

    @ft.partial(jax.jit, static_argnums=0)
    def solve(steps):
        return LSMR(max_steps=steps).solve(system, b, tolerance=1e-14, workspace=None)

    normals, residuals = [], []
    for steps in (1, 2, 5, 8):
        ours = solve(steps)
        theirs = lsmr(TALL, rhs, atol=0, btol=0, conlim=0, maxiter=steps)
        np.testing.assert_allclose(ours.value, theirs[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(ours.residual_norm, theirs[3], rtol=1e-9)
        r = rhs - TALL @ np.asarray(ours.value)
        np.testing.assert_allclose(ours.residual_norm, np.linalg.norm(r), rtol=1e-9)
        assert 0 < float(ours.descent) <= rhs @ (rhs - r) * (1 + 1e-12)
        assert bool(ours.result == lx.RESULTS.max_steps_reached)
        assert (int(ours.num_steps), int(ours.num_matvecs)) == (steps, steps)
        assert int(ours.num_transposed_matvecs) == steps + 1
        normals.append(np.linalg.norm(TALL.T @ r))
        residuals.append(np.linalg.norm(r))
    assert np.all(np.diff(normals) < 0) and np.all(np.diff(residuals) < 0)


def test_success_of_least_squares_is_the_normal_equations():
    rhs = np.random.default_rng(1).standard_normal(len(TALL))
    for rtol in (1e-2, 1e-5):
        solution = _solve(TALL, rhs, LSMR(rtol=rtol))
        r = rhs - TALL @ solution.value
        ratio = np.linalg.norm(TALL.T @ r) / (np.linalg.norm(TALL, 2) * np.linalg.norm(r))
        assert _ok(solution) and 0 < ratio <= rtol
        # k iterations, k + 1 transposed products; the true residual and its normal one on top
        steps, matvecs, transposed = _counts(solution)
        assert matvecs == steps + 1 and transposed == steps + 2
    assert np.linalg.norm(r) > 0.5  # no equation


def _right(v):
    """M⁻¹, far from symmetric."""
    return v / (1.0 + np.arange(N) % 7) + 0.1 * jnp.roll(v, 1)


@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_preconditioner(damp):
    """On the right with its transpose; x is that of the system without it, also damped."""
    scaled = A * (1.0 + np.arange(N) % 7)[None, :] ** 2
    solver = LSMR(rtol=1e-9, damp=jnp.asarray(damp))
    by_field = LSMR(
        rtol=1e-9,
        damp=jnp.asarray(damp),
        preconditioner=nks.UserPreconditioner(lambda *_: lambda v: _right(_right(v))),
    )
    plain, solution = _solve(scaled, B, solver), _solve(scaled, B, by_field)
    assert _ok(plain) and _ok(solution)
    exact = _least_squares(scaled, B, damp)
    np.testing.assert_allclose(solution.value, exact, rtol=1e-5, atol=1e-8)
    steps, _, transposed = _counts(solution)
    assert int(solution.stats["num_preconditioner_applications"]) == steps + transposed
    if not damp:
        assert steps < 0.8 * _counts(plain)[0]


def test_preconditioner_of_a_rectangular_system():
    rhs = np.random.default_rng(1).standard_normal(len(TALL))
    scale = 30.0 ** (np.arange(11) % 4)
    space = jax.eval_shape(lambda: jnp.zeros(11))
    operator = lx.FunctionLinearOperator(lambda v: v / scale, space)
    plain = _solve(TALL * scale, rhs, LSMR(rtol=1e-9))
    solution = _solve(TALL * scale, rhs, LSMR(rtol=1e-9), preconditioner=operator)
    exact = _least_squares(TALL * scale, rhs)
    assert _ok(solution) and _counts(solution)[0] < _counts(plain)[0] / 2
    np.testing.assert_allclose(solution.value, exact, rtol=1e-7)


@pytest.mark.parametrize(
    ("kind", "reverse"),
    [
        ("complex", True),
        ("tall", False),
        pytest.param("square", True, marks=pytest.mark.slow),
        pytest.param("tall", True, marks=pytest.mark.slow),
        pytest.param("wide", True, marks=pytest.mark.slow),
    ],
)
def test_derivatives(kind, reverse):
    """Those of the pseudo-inverse, which are those of the inverse for regular A."""
    matrix = {"square": A, "complex": A + 0.3j * A.T, "tall": TALL, "wide": WIDE}[kind]
    rng = np.random.default_rng(3)
    rhs, w = rng.standard_normal(len(matrix)), rng.standard_normal(matrix.shape[1])
    da, db = rng.standard_normal(matrix.shape), rng.standard_normal(len(matrix))
    primals = tuple(jnp.asarray(z.astype(matrix.dtype)) for z in (matrix, rhs))
    tangents = tuple(jnp.asarray(z.astype(matrix.dtype)) for z in (da, db))
    x = lambda a, b: lx.linear_solve(lx.MatrixLinearOperator(a), b, LSMR(rtol=1e-12)).value
    tangent = jax.jit(lambda p, t: jax.jvp(x, p, t)[1])(primals, tangents)
    step = 1e-6
    forward, backward = (_least_squares(matrix + s * da, rhs + s * db) for s in (step, -step))
    np.testing.assert_allclose(tangent, (forward - backward) / (2 * step), rtol=1e-5, atol=1e-7)
    if reverse:  # cotangents are dual to tangents in JAX's pairing, without conjugation
        w = w.astype(matrix.dtype)
        bar_a, bar_b = jax.jit(lambda p, w: jax.vjp(x, *p)[1](w))(primals, jnp.asarray(w))
        dual = np.sum(np.asarray(bar_a) * da) + np.asarray(bar_b) @ db
        np.testing.assert_allclose(dual, w @ np.asarray(tangent), rtol=1e-8)


def test_derivatives_with_damping():
    """With respect to b they are right; with respect to A they are refused, not wrong."""
    rng = np.random.default_rng(3)
    w = jnp.asarray(rng.standard_normal(11))
    rhs = jnp.asarray(rng.standard_normal(37))
    solver = LSMR(rtol=1e-12, damp=0.7)
    x = lambda a, b: lx.linear_solve(lx.MatrixLinearOperator(a), b, solver).value
    (bar,) = jax.jit(lambda b, w: jax.vjp(lambda b: x(jnp.asarray(TALL), b), b)[1](w))(rhs, w)
    inverse = np.linalg.solve(TALL.T @ TALL + 0.49 * np.eye(11), TALL.T)
    np.testing.assert_allclose(bar, inverse.T @ w, rtol=1e-8)
    with pytest.raises(NotImplementedError, match="stack its rows"):
        jax.jvp(lambda a: x(a, rhs), (jnp.asarray(TALL),), (jnp.asarray(TALL),))


def test_lanes_are_as_if_alone():
    names = ["zero_rhs", "nonsymmetric", "symmetric_indefinite", "cyclic_shift"]
    names += ["singular_inconsistent", "singular_consistent"]
    matrices = [GALLERY[name].matrix for name in names]
    rhs = [GALLERY[name].rhs for name in names]
    broken, nan = matrices[1].copy(), rhs[1].copy()
    broken[3, 5] = nan[0] = np.nan
    matrices, rhs = np.stack([*matrices, broken, A, np.eye(N)]), np.stack([*rhs, B, nan, 3 * B])
    scale = nks.UserPreconditioner(lambda *_: lambda v: 0.25 * v)

    @jax.jit
    def alone(matrix, b):
        solver = LSMR(rtol=1e-8, preconditioner=scale)
        solution = lx.linear_solve(lx.MatrixLinearOperator(matrix), b, solver, throw=False)
        return solution.value, solution.result._value, solution.stats

    values, results, stats = jax.jit(jax.vmap(alone))(matrices, rhs)
    assert np.all(np.isfinite(values)) and len(set(map(int, stats["num_steps"]))) >= 5
    for lane in range(len(rhs)):
        value, result, own = alone(matrices[lane], rhs[lane])
        assert int(results[lane]) == int(result)
        # once the least-squares solution is reached, rounding says when that is noticed
        if lane != names.index("singular_inconsistent"):
            for name in own.keys() - {"residual_norm"}:
                assert int(stats[name][lane]) == int(own[name]), (lane, name)
        np.testing.assert_allclose(values[lane], value, rtol=1e-7, atol=1e-9)


def test_warm_start_limits_and_reasons():
    solver = LSMR(rtol=1e-8)
    exact = jnp.asarray(np.linalg.solve(A, B))
    solution = _solve(A, B, solver, y0=exact)
    assert _ok(solution) and _counts(solution) == (0, 1, 0)
    near = _solve(A, B, solver, y0=exact + 1e-5)
    cold = _solve(A, B, solver)
    assert _ok(near) and 0 < _counts(near)[0] < _counts(cold)[0]
    np.testing.assert_allclose(near.value, exact, rtol=1e-6)
    solution = _solve(A, 0 * B, solver, y0=exact)
    assert _ok(solution) and _counts(solution) == (0, 0, 0) and not np.any(solution.value)
    solution = _solve(A, B, LSMR(rtol=0.0, atol=2 * np.linalg.norm(B)))
    assert _ok(solution) and _counts(solution) == (0, 0, 0) and not np.any(solution.value)
    solution = _solve(A, B, LSMR(rtol=1e-8, max_steps=4))
    assert bool(solution.result == lx.RESULTS.max_steps_reached) and _counts(solution) == (4, 5, 6)
    assert np.linalg.norm(B - A @ solution.value) < np.linalg.norm(B)
    # Out of reach: as good as it gets.
    solution = _solve(A, B, LSMR(rtol=1e-30))
    assert bool(solution.result == lx.RESULTS.stagnation)
    np.testing.assert_allclose(solution.value, exact, rtol=1e-12)


def test_a_single_unknown_and_none():
    solution = _solve([[2.0]], [3.0], LSMR())
    assert _ok(solution) and _counts(solution) == (1, 2, 2)
    np.testing.assert_allclose(solution.value, [1.5])
    solution = _solve([[0.0]], [3.0], LSMR())
    assert bool(solution.result == lx.RESULTS.stagnation) and float(solution.value[0]) == 0
    system = LinearSystem(lambda v: v, None, True, lambda w: w)
    for vector in ({}, {"a": jnp.zeros(0)}):
        out = LSMR().solve(system, vector, tolerance=0.0, workspace=None, verify=True)
        assert bool(out.result == lx.RESULTS.successful) and int(out.num_matvecs) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_data_is_a_breakdown(bad):
    rhs, matrix = B.copy(), A.copy()
    rhs[3] = matrix[2, 7] = bad
    for options in ({}, {"y0": jnp.ones(N)}):
        for a, b in ((A, rhs), (matrix, B)):
            solution = _solve(a, b, LSMR(), **options)
            assert bool(solution.result == lx.RESULTS.breakdown)
            assert np.all(np.isfinite(solution.value))


def test_products_are_counted_as_they_run():
    """One site of A and one of Aᵀ; nothing applied that is not reported."""
    counter = Counter()
    matrix = jnp.asarray(A)
    fn = lambda y, _: _split(matrix @ counter.tick(_flat(y)))
    start = _split(jnp.zeros(N))

    @jax.jit
    def solve(rtol):
        operator = nks.linearise(fn, start, None).operator
        solution = lx.linear_solve(operator, _split(jnp.asarray(B)), LSMR(rtol=rtol))
        return _flat(solution.value), solution.stats

    for rtol in (1e-2, 1e-9):
        with counter.measure() as work:
            value, stats = solve(rtol)
        assert work.tangent == int(stats["num_matvecs"])
        assert work.transposed == int(stats["num_transposed_matvecs"])
    np.testing.assert_allclose(value, np.linalg.solve(A, B), rtol=1e-6)


def test_inside_newton_and_its_adjoint():
    """A root and its gradient, J and Jᵀ from one linearisation; as Newton calls `solve`."""
    matrix = jnp.asarray(A)
    fn = lambda y, p: matrix @ y + 0.1 * y**3 - p
    solver = nks.NewtonKrylov(rtol=1e-10, atol=1e-12, linear_solver=LSMR())
    root = lambda p: nks.root_find(fn, solver, jnp.zeros(N), p).value
    p = jnp.asarray(B)
    y, bar = jax.jit(lambda p: (root(p), jax.grad(lambda p: jnp.sum(root(p)))(p)))(p)
    np.testing.assert_allclose(fn(y, p), 0, atol=1e-8)
    jacobian = A + np.diag(0.3 * np.asarray(y) ** 2)
    np.testing.assert_allclose(bar, np.linalg.solve(jacobian.T, np.ones(N)), rtol=1e-4, atol=1e-6)


def test_refused():
    for keywords in ({"damp": -1.0}, {"rtol": -1.0}, {"max_steps": -1}, {"damp": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(keywords))):
            LSMR(**keywords)  # pyright: ignore
    tall = lx.MatrixLinearOperator(jnp.asarray(TALL))
    made = LSMR(preconditioner=nks.UserPreconditioner(lambda *_: lambda v: v))
    with pytest.raises(ValueError, match="rectangular"):
        lx.linear_solve(tall, jnp.ones(37), made)
    wrong = lx.IdentityLinearOperator(jax.eval_shape(lambda: jnp.zeros(37)))
    wrong = lx.FunctionLinearOperator(wrong.mv, wrong.in_structure())
    with pytest.raises(ValueError, match="itself"):
        lx.linear_solve(tall, jnp.ones(37), LSMR(), options={"preconditioner": wrong})
    system = LinearSystem(lambda v: tree.scale(2.0, v), None, True)
    with pytest.raises(ValueError, match="transpose"):
        LSMR().solve(system, jnp.ones(3), tolerance=0.0, workspace=None)
