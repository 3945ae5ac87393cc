"""`Richardson`, `SparseDirect`, `BandedDirect` against dense solves, in Newton, in adjoints."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve import tree
from nksolve.krylov.direct import BandedDirect, DenseDirect, SparseDirect
from nksolve.krylov.richardson import Richardson
from nksolve.linearise.sparsity import Pattern
from nksolve.problems import registry
from tests.helpers import Counter

N = 31
_rng = np.random.default_rng(2)
# Diagonals −2 … 1, nonsymmetric, no entry of the band zero.
_OFFSETS = (-2, -1, 0, 1)
_BAND = sum(np.diag(_rng.uniform(0.5, 1.0, N - abs(k)), k) for k in _OFFSETS) + 2 * np.eye(N)
B = _rng.standard_normal(N)
W = _rng.standard_normal(N)
PATTERN = Pattern.from_coo(*np.nonzero(_BAND), N)

SOLVERS = {
    "sparse": SparseDirect(rtol=1e-12),
    "sparse-given": SparseDirect(rtol=1e-12, pattern=PATTERN),
    "banded": BandedDirect(rtol=1e-12),
    "banded-given": BandedDirect(rtol=1e-12, lower=2, upper=1),
    "block": BandedDirect(rtol=1e-12, block=2),
    "dense": DenseDirect(rtol=1e-12),
}
_solvers = pytest.mark.parametrize("name", SOLVERS)


def _diagonals(matrix):
    return [jnp.asarray(np.diag(matrix, k)) for k in _OFFSETS]


def _apply(diagonals, v):
    """The banded product, whose program shows its band."""
    out = jnp.zeros_like(v)
    for k, d in zip(_OFFSETS, diagonals, strict=True):
        term = d.astype(v.dtype) * (v[:k] if k < 0 else v[k:])
        out = out + jnp.pad(term, (-k, 0) if k < 0 else (0, k))
    return out


def _linear_solve(solver, diagonals, b, **keywords):
    operator = nks.linearise(lambda y, d: _apply(d, y), jnp.zeros_like(b), diagonals).operator
    return lx.linear_solve(operator, b, solver, **keywords)


def _slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", ["sparse", *_slow(*[x for x in SOLVERS if x != "sparse"])])
def test_derivatives_and_counters(name):
    solver = SOLVERS[name]

    @jax.jit
    def everything(d, b, dd, db, w):
        out = _linear_solve(solver, d, b)
        solve = lambda d, b: _linear_solve(solver, d, b).value
        tangent = jax.jvp(solve, (d, b), (dd, db))[1]
        return out.value, out.stats, tangent, jax.vjp(solve, d, b)[1](w)

    change = _rng.standard_normal((N, N))
    db = _rng.standard_normal(N)
    d = _diagonals(_BAND)
    arguments = (d, jnp.asarray(B), _diagonals(change), jnp.asarray(db), jnp.asarray(W))
    value, stats, tangent, (bar_d, bar_b) = everything(*arguments)
    x = np.linalg.solve(_BAND, B)
    np.testing.assert_allclose(value, x, rtol=1e-11)
    banded = sum(np.diag(np.diag(change, k), k) for k in _OFFSETS)
    np.testing.assert_allclose(tangent, np.linalg.solve(_BAND, db - banded @ x), rtol=1e-9)
    adjoint = np.linalg.solve(_BAND.T, W)
    np.testing.assert_allclose(bar_b, adjoint, rtol=1e-10, atol=1e-14)
    for k, bar in zip(_OFFSETS, bar_d, strict=True):
        np.testing.assert_allclose(bar, np.diag(-np.outer(adjoint, x), k), rtol=1e-9, atol=1e-13)
    assert int(stats["num_steps"]) == int(stats["num_preconditioner_applications"]) == 1
    assert int(stats["num_matvecs"]) == 2  # its own residual, and the check of the verified solve
    assert float(stats["residual_norm"]) <= 1e-12 * np.linalg.norm(B)


@_solvers
def test_value_and_transpose(name):
    solver = SOLVERS[name]
    operator = nks.linearise(lambda y, d: _apply(d, y), jnp.zeros(N), _diagonals(_BAND)).operator

    @jax.jit
    def both(b):
        state = solver.init(operator, {})
        transposed, _ = solver.transpose(state, {})
        return solver.compute(state, b, {})[0], solver.compute(transposed, b, {})[0]

    out, adjoint = both(jnp.asarray(B))
    np.testing.assert_allclose(out, np.linalg.solve(_BAND, B), rtol=1e-10)
    np.testing.assert_allclose(adjoint, np.linalg.solve(_BAND.T, B), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse", "banded"])
def test_hessian(name):
    """d²/dt² of wᵀ(A + t D)⁻¹ b, twice through the solve."""

    @jax.jit
    def second(t):
        d = [x * (1 + t) if k == 1 else x for k, x in zip(_OFFSETS, _diagonals(_BAND), strict=True)]
        return jnp.asarray(W) @ _linear_solve(SOLVERS[name], d, jnp.asarray(B)).value

    change = np.diag(np.diag(_BAND, 1), 1)
    inverse = np.linalg.inv(_BAND)
    exact = 2 * W @ inverse @ change @ inverse @ change @ inverse @ B
    np.testing.assert_allclose(jax.hessian(second)(0.0), exact, rtol=1e-9)


@pytest.mark.parametrize("name", ["sparse", *_slow("banded-given")])
def test_lanes_are_as_if_alone(name):
    """Among them an exactly singular, an inconsistent, a broken and an idle one."""
    laplacian = 2 * np.eye(N) - np.eye(N, k=1) - np.eye(N, k=-1)
    laplacian[0, 0] = laplacian[-1, -1] = 1.0
    broken = _BAND.copy()
    broken[4, 4] = np.nan
    nan_rhs = np.where(np.arange(N) == 3, np.nan, B)
    cases = [
        (_BAND, B, True),
        (_BAND.T @ _BAND * (np.abs(_BAND) > 0), B, True),
        (laplacian, B, False),
        (np.zeros((N, N)), B, False),
        (broken, B, False),
        (_BAND, nan_rhs, False),
        (_BAND, 0 * B, True),
    ]
    diagonals = [jnp.stack(x) for x in zip(*(_diagonals(a) for a, _, _ in cases), strict=True)]
    rhs = jnp.asarray(np.stack([b for _, b, _ in cases]))
    solver = eqx.tree_at(lambda s: s.rtol, SOLVERS[name], 1e-10)

    def run(d, b):
        out = _linear_solve(solver, d, b, throw=False)
        return out.value, out.result == lx.RESULTS.successful, out.stats

    alone = jax.jit(run)
    value, success, stats = jax.jit(jax.vmap(run))(diagonals, rhs)
    for k, (a, b, solvable) in enumerate(cases):
        single = alone([d[k] for d in diagonals], rhs[k])
        np.testing.assert_array_equal(success[k], single[1])
        for key in ("num_steps", "num_matvecs", "num_preconditioner_applications"):
            assert int(stats[key][k]) == int(single[2][key])
        np.testing.assert_allclose(value[k], single[0], rtol=1e-12)
        assert np.isfinite(value[k]).all()
        assert bool(success[k]) == solvable
        if solvable:
            np.testing.assert_allclose(value[k], np.linalg.solve(a, b), rtol=1e-8, atol=1e-14)
    assert int(stats["num_matvecs"][-1]) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.complex128, np.complex64])
@pytest.mark.parametrize("name", ["sparse", *_slow("banded")])
def test_other_dtypes(name, dtype):
    eps = np.finfo(dtype).eps
    solver = eqx.tree_at(lambda s: s.rtol, SOLVERS[name], float(50 * eps))
    turn = np.exp(0.3j) if np.issubdtype(dtype, np.complexfloating) else 1.0
    a = (_BAND * turn + (turn - 1) * np.diag(B)).astype(dtype)
    b = (B * turn + (turn - 1) * W).astype(dtype)
    out = jax.jit(ft.partial(_linear_solve, solver))(_diagonals(a), jnp.asarray(b))
    assert out.value.dtype == dtype
    exact = np.linalg.solve(a.astype(complex), b.astype(complex))
    np.testing.assert_allclose(out.value, exact, rtol=1e4 * eps, atol=1e3 * eps)


def test_complex_residual_that_is_not_holomorphic():
    """J is real-linear only: solved by parts, without the tag and without a warning."""

    def fn(z, c):
        return 3 * z + 0.5j * jnp.conj(jnp.roll(z, 1)) + 0.2 * z * jnp.conj(z) - c

    c = jnp.asarray(B + 1j * W)
    solver = nks.NewtonKrylov(rtol=0.0, atol=1e-12, linear_solver=SparseDirect())
    run = lambda c: nks.root_find(fn, solver, jnp.zeros(N, complex), c)
    solution = jax.jit(run)(c)
    assert np.linalg.norm(fn(solution.value, c)) <= 1e-12
    steps = int(solution.stats["num_steps"])
    assert steps <= 8
    assert int(solution.stats["num_matvecs"]) == steps
    # The adjoint solves by the transposed factorisation.
    loss = jax.jit(lambda t: jnp.sum(jnp.abs(run(c * t).value) ** 2))
    h = 1e-5
    difference = (loss(1.0 + h) - loss(1.0 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(loss)(1.0), difference, rtol=1e-7)


@ft.cache
def _challenge(name):
    solvers = {
        "sparse": SparseDirect(),
        "banded": BandedDirect(),
        "block": BandedDirect(block=1),
    }
    problem = registry.get("bratu-1d", n=10_000, lam=3.51382)
    solver = nks.NewtonKrylov(rtol=0.0, atol=5e-14, linear_solver=solvers[name])
    return nks.root_find(problem.fn, solver, problem.y0, problem.args, throw=False)


@pytest.mark.parametrize(
    "name", ["sparse", "banded", pytest.param("block", marks=pytest.mark.slow)]
)
def test_bratu_a_hair_below_the_fold(name):
    solution = _challenge(name)
    problem = registry.get("bratu-1d", n=10_000, lam=3.51382)
    assert np.linalg.norm(problem.fn(solution.value, problem.args)) <= 5e-14
    assert abs(float(solution.value.max()) - 1.18394) < 5e-6
    stats = solution.stats
    steps = int(stats["num_steps"])
    assert steps == 11  # as exact Newton
    assert int(stats["num_matvecs"]) == int(stats["num_preconditioner_applications"]) == steps
    assert int(stats["num_probes"]) == 3 * steps
    assert int(stats["num_linear_failures"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse", "banded"])
def test_food_web_and_its_gradient(name):
    """Exact Newton steps; the gradient by the transposed factorisation against differences."""
    problem = registry.get("food-web", mx=4)
    linear = SparseDirect(rtol=1e-10) if name == "sparse" else BandedDirect(lower=24, upper=24)
    solver = nks.NewtonKrylov(rtol=0.0, atol=1e-10, linear_solver=linear)

    @jax.jit
    def run(t):
        args = problem.args._replace(growth=problem.args.growth * t)
        solution = nks.root_find(problem.fn, solver, problem.y0, args)
        return jnp.mean(solution.value), (solution.value, solution.stats)

    (_, (y, stats)), gradient = jax.value_and_grad(run, has_aux=True)(1.0)
    assert np.linalg.norm(problem.fn(y, problem.args)) <= 1e-9
    assert int(stats["num_steps"]) <= 6
    h = 1e-5
    difference = (run(1.0 + h)[0] - run(1.0 - h)[0]) / (2 * h)
    np.testing.assert_allclose(gradient, difference, rtol=1e-6)


def test_singular_jacobian_ends_newton_with_a_reason():
    """f = y³ − 1 and zero-flux diffusion, both singular at the start: no exception, no success."""
    solver = nks.NewtonKrylov(rtol=1e-8, atol=1e-8, linear_solver=SparseDirect())
    lap = lambda y: jnp.diff(jnp.pad(jnp.diff(y), 1))
    for fn in (lambda y, _: y**3 - 1, lambda y, _: lap(y) + 1.0):
        solution = nks.root_find(fn, solver, jnp.zeros(8), throw=False)
        assert solution.stats["reason"] == nks.REASONS.linear_solve_failed
        np.testing.assert_array_equal(solution.value, 0.0)


def test_two_fields_side_by_side_are_a_band():
    """Leaf after leaf the pattern reaches across; node after node it has two on each side."""

    def fn(y, _):
        lap = lambda w: jnp.pad(w, 1)[2:] - 3.0 * w + jnp.pad(w, 1)[:-2]
        return {"u": lap(y["u"]) + 0.1 * y["v"], "v": lap(y["v"]) - y["u"] ** 2}

    point = {"u": jnp.asarray(B), "v": jnp.asarray(W)}
    operator = nks.linearise(fn, point).operator
    banded = BandedDirect().preconditioner.resolved(operator)  # pyright: ignore
    assert (banded.lower, banded.upper) == (2, 2)
    for solver in (BandedDirect(rtol=1e-12), SparseDirect(rtol=1e-12)):
        rhs = operator.mv(point)
        out = lx.linear_solve(operator, rhs, solver)
        np.testing.assert_allclose(out.value["u"], B, rtol=1e-9)
        np.testing.assert_allclose(out.value["v"], W, rtol=1e-9)


def test_errors():
    with pytest.raises(ValueError, match="`lower` and `upper`, or `block`"):
        BandedDirect(lower=1)
    with pytest.raises(ValueError, match="`lower` and `upper`, or `block`"):
        BandedDirect(lower=1, upper=1, block=2)
    with pytest.raises(ValueError, match="rtol"):
        SparseDirect(rtol=-1.0)
    wide = nks.linearise(lambda y, _: y**2 + y[::-1], jnp.ones(100)).operator
    with pytest.raises(ValueError, match=r"no band for 100 unknowns.*SparseDirect"):
        lx.linear_solve(wide, jnp.ones(100), BandedDirect())


class TestRichardson:
    """A = I − E with ‖E‖ = 0.5 known, so that everything about the iteration is."""

    e = 0.5 * np.linalg.qr(_rng.standard_normal((N, N)))[0]

    def _system(self, counter=None):
        a = jnp.asarray(np.eye(N) - self.e)
        tick = (lambda v: v) if counter is None else counter.tick
        return lx.FunctionLinearOperator(
            lambda v: a @ tick(v), jax.ShapeDtypeStruct((N,), jnp.float64)
        )

    @pytest.mark.parametrize("start", [False, True])
    def test_iterates_and_counters(self, start):
        """‖r_k‖ = 2⁻ᵏ‖r_0‖, since E is half an orthogonal matrix."""
        matvecs, applications = Counter(), Counter()
        preconditioner = nks.UserPreconditioner(lambda *_: lambda v: applications.tick(v))
        solver = Richardson(rtol=0.0, atol=1.0, preconditioner=preconditioner)
        b = jnp.asarray(1000.0 * B / np.linalg.norm(B))
        options = {"y0": jnp.zeros(N)} if start else {}

        @jax.jit
        def solve(b):
            out = lx.linear_solve(self._system(matvecs), b, solver, options=options)
            return out.value, out.stats

        jax.block_until_ready(solve(b))
        with matvecs.measure() as count, applications.measure() as applied:
            value, stats = solve(b)
        x = np.zeros(N)
        for _ in range(10):  # 2⁻¹⁰ · 1000 < 1 < 2⁻⁹ · 1000
            x = x + np.asarray(b) - (x - self.e @ x)
        np.testing.assert_allclose(value, x, rtol=1e-12)
        assert int(stats["num_steps"]) == 10
        assert int(stats["num_matvecs"]) == len(count.executions) == 11 + start
        assert int(stats["num_preconditioner_applications"]) == len(applied.executions) == 10
        np.testing.assert_allclose(stats["residual_norm"], 1000.0 / 2**10, rtol=1e-10)

    def test_reports_the_true_residual_below_which_there_is_none(self):
        """Not one by recurrence, which would go on to fall: x is of size 1e6, b of size 1."""
        a = np.diag(np.geomspace(1.0, 1e-6, N)) @ (np.eye(N) - self.e)
        operator = lx.FunctionLinearOperator(
            lambda v: jnp.asarray(a) @ v, jax.ShapeDtypeStruct((N,), jnp.float64)
        )
        inverse = jnp.asarray(np.linalg.inv(a * (1 + 1e-3 * _rng.standard_normal((N, N)))))
        solver = Richardson(preconditioner=nks.UserPreconditioner(lambda *_: lambda v: inverse @ v))
        b = jnp.ones(N)
        state = solver.init(operator, {})
        out = solver.solve(state.system(True), b, tolerance=1e-16, workspace=None)
        true = np.linalg.norm(np.asarray(b) - a @ np.asarray(out.value))
        assert out.result != lx.RESULTS.successful
        assert 1e-15 < true < 1e-9
        assert true / 30 < float(out.residual_norm) < 30 * true

    def test_divergence_zero_rhs_nan_and_one_unknown(self):
        @jax.jit
        def run(scale, b):
            operator = lx.FunctionLinearOperator(
                lambda v: scale * v, jax.ShapeDtypeStruct(b.shape, b.dtype)
            )
            solver = Richardson(rtol=1e-10, max_steps=500)
            out = lx.linear_solve(operator, b, solver, throw=False)
            return out.value, out.result, out.stats

        value, result, _ = run(jnp.asarray(5.0), jnp.ones(40))  # I − A = −4
        assert result == lx.RESULTS.breakdown
        np.testing.assert_array_equal(value, 0.0)
        value, result, stats = run(jnp.asarray(0.5), jnp.zeros(40))
        assert (result == lx.RESULTS.successful, int(stats["num_matvecs"])) == (True, 0)
        value, result, _ = run(jnp.asarray(jnp.nan), jnp.ones(40))
        assert result == lx.RESULTS.breakdown
        assert np.isfinite(value).all()
        value, result, _ = run(jnp.asarray(0.5), jnp.ones(40).at[3].set(jnp.nan))
        assert result == lx.RESULTS.breakdown
        value, result, _ = run(jnp.asarray(0.5), jnp.ones(1))
        assert result == lx.RESULTS.successful
        np.testing.assert_allclose(value, 2.0)

    def test_trees_complex_and_transposed(self):
        """The adjoint iterates with Aᵀ and M⁻ᵀ."""
        a = jnp.asarray((np.eye(N) - self.e) * np.exp(0.4j))
        m = jnp.asarray(np.diag(np.exp(-0.4j) * np.linspace(0.8, 1.2, N)))
        split, join = (lambda v: (v[:5], v[5:])), jnp.concatenate
        preconditioner = nks.UserPreconditioner(lambda *_: lambda v: split(m @ join(v)))
        solver = Richardson(rtol=1e-12, preconditioner=preconditioner)
        operator = lx.FunctionLinearOperator(
            lambda v: split(a @ join(v)), jax.eval_shape(split, jnp.zeros(N, complex))
        )
        solve = lambda b: join(lx.linear_solve(operator, split(b), solver).value)
        b = jnp.asarray(B + 1j * W)
        value, pull = jax.vjp(jax.jit(solve), b)
        np.testing.assert_allclose(value, np.linalg.solve(a, b), rtol=1e-10)
        np.testing.assert_allclose(pull(b)[0], np.linalg.solve(np.asarray(a).T, b), rtol=1e-10)
        assert tree.size(operator.in_structure()) == N

    def test_bad_fields(self):
        with pytest.raises(ValueError, match="max_steps"):
            Richardson(max_steps=-1)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("solver", [SparseDirect(), BandedDirect(), Richardson(max_steps=30)])
def test_no_unknown_and_one(solver, n):
    operator = nks.linearise(lambda y, _: 0.5 * y + 0.1 * y**2, jnp.ones(n)).operator
    out = lx.linear_solve(operator, 7.0 * jnp.ones(n), solver, options={"y0": jnp.ones(n)})
    np.testing.assert_allclose(out.value, 10.0 * np.ones(n), rtol=1e-5)
