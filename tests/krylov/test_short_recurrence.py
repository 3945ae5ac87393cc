"""CG and MINRES on the short recurrences' driver: the gallery, exits, counters, transforms."""

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
from nksolve.krylov.cg import CG
from nksolve.krylov.minres import MINRES
from nksolve.krylov.short_recurrence import AbstractShortRecurrence, Context, Progress
from nksolve.krylov.system import LinearSystem
from nksolve.precondition.base import AbstractPreconditioner, Identity
from tests.helpers import GALLERY, Counter
from tests.helpers.gallery import N

METHODS = {"CG": CG, "MINRES": MINRES}
STRUCTURES = {
    "array": lambda v: v,
    "two leaves": lambda v: {"a": v[:20].reshape(4, 5), "b": v[20:]},
    "scalar leaf": lambda v: (v[:28].reshape(2, 14), v[28]),
}
RTOL = {np.float64: 1e-8, np.float32: 1e-4, np.complex128: 1e-8}
CASES = [name for name, case in GALLERY.items() if case.symmetric or name == "zero_rhs"]
SPD, INDEFINITE = GALLERY["symmetric_positive_definite"], GALLERY["symmetric_indefinite"]
SUCCESS, BREAKDOWN = lx.RESULTS.successful._value, lx.RESULTS.breakdown._value
STAGNATION, EXHAUSTED = lx.RESULTS.stagnation._value, lx.RESULTS.max_steps_reached._value
# Positive, and not a multiple of the identity.
SCALES = 1 + np.arange(N) % 3
_methods = pytest.mark.parametrize("method", list(METHODS))


def _flat(vector):
    return jnp.concatenate([jnp.ravel(x) for x in jtu.tree_leaves(vector)])


def _data(name, dtype):
    """The case in `dtype`; complex as D A Dᴴ and D b with a diagonal unitary D."""
    case = GALLERY[name]
    if dtype == np.complex128:
        d = np.exp(1j * np.arange(N))
        return (d[:, None] * case.matrix * d.conj()).astype(dtype), (d * case.rhs).astype(dtype)
    return case.matrix.astype(dtype), case.rhs.astype(dtype)


def _alone(method, structure, preconditioned, warm, max_steps=None):
    wrap = STRUCTURES[structure]

    def solve(matrix, rhs, rtol, guess):
        b = wrap(rhs)
        scales = jnp.asarray(SCALES).astype(rhs.dtype)
        build = lambda *_: lambda v: wrap(scales * _flat(v))
        preconditioner = nks.UserPreconditioner(build) if preconditioned else nks.Identity()
        # Lineax has no tag for what is Hermitian but not symmetric.
        tags = () if jnp.iscomplexobj(rhs) else (lx.symmetric_tag,)
        operator = lx.FunctionLinearOperator(
            lambda v: wrap(matrix @ _flat(v)), jax.eval_shape(lambda: b), tags
        )
        solver = METHODS[method](rtol=rtol, max_steps=max_steps, preconditioner=preconditioner)
        options = {"y0": wrap(guess)} if warm else {}
        solution = lx.linear_solve(operator, b, solver, throw=False, options=options)
        return _flat(solution.value), solution.result._value, solution.stats

    return solve


@ft.cache
def _compiled(*key):
    return jax.jit(_alone(*key))


def _run(
    method, matrix, rhs, rtol, guess=None, structure="array", preconditioned=False, limit=None
):
    warm = guess is not None
    solve = _compiled(method, structure, preconditioned, warm, limit)
    rhs = jnp.asarray(rhs)
    rtol = jnp.asarray(rtol, tree.real_dtype(rhs))
    return solve(jnp.asarray(matrix), rhs, rtol, guess if warm else rhs)


def _counts(stats):
    return tuple(int(stats[k]) for k in ("num_steps", "num_matvecs", "num_restarts"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("structure", "dtype", "preconditioned"),
    [
        ("array", np.float64, False),
        ("two leaves", np.float32, True),
        ("scalar leaf", np.complex128, True),
    ],
    ids=lambda p: getattr(p, "__name__", str(p)),
)
@_methods
def test_gallery(method, structure, dtype, preconditioned, name):
    case = GALLERY[name]
    matrix, rhs = _data(name, dtype)
    rtol, norm = RTOL[dtype], np.linalg.norm(rhs)
    x, result, stats = _run(
        method, matrix, rhs, rtol, structure=structure, preconditioned=preconditioned
    )
    x = np.asarray(x)
    assert x.dtype == dtype and np.all(np.isfinite(x))
    true, told = np.linalg.norm(rhs - matrix @ x), float(stats["residual_norm"])
    slack = 100 * np.finfo(dtype).eps * (np.linalg.norm(matrix, 2) * np.linalg.norm(x) + norm)
    assert abs(true - told) <= slack
    indefinite = name == "symmetric_indefinite"
    if method == "CG" and (indefinite or not case.consistent):
        assert int(result) == BREAKDOWN
    elif not case.consistent:
        assert int(result) == STAGNATION
        if not preconditioned:  # the least-squares residual: what of b is not in the range
            null = np.linalg.svd(matrix)[0][:, -1]
            np.testing.assert_allclose(told, abs(null.conj() @ rhs), rtol=1e-6)
    else:
        assert int(result) == SUCCESS and told <= rtol * norm * (1 + 1e-6)
        if name == "zero_rhs":
            assert _counts(stats) == (0, 0, 0) and not np.any(x)
        elif case.condition <= 1e3:
            exact = np.linalg.solve(matrix, rhs)
            assert np.linalg.norm(x - exact) <= 60 * rtol * np.linalg.norm(exact)


@_methods
def test_negative_definite(method):
    """A and b with the other sign: the same iterates."""
    x, result, stats = _run(method, SPD.matrix, SPD.rhs, 1e-8)
    y, negative, again = _run(method, -SPD.matrix, -SPD.rhs, 1e-8)
    assert int(result) == int(negative) == SUCCESS and _counts(stats) == _counts(again)
    np.testing.assert_allclose(y, x, rtol=1e-12)


@_methods
def test_tolerance_below_rounding_stagnates_soon(method):
    for dtype, rtol in ((np.float32, 1e-12), (np.float64, 1e-25)):
        for guess in (None, jnp.full(N, 100, dtype)):
            x, result, stats = _run(
                method, SPD.matrix.astype(dtype), SPD.rhs.astype(dtype), rtol, guess
            )
            assert int(result) == STAGNATION and int(stats["num_steps"]) <= 3 * N
            true = np.linalg.norm(SPD.rhs - SPD.matrix @ np.asarray(x, np.float64))
            assert true <= 30 * np.finfo(dtype).eps * np.linalg.norm(SPD.rhs)


@_methods
def test_warm_start(method):
    exact = jnp.asarray(np.linalg.solve(SPD.matrix, SPD.rhs))
    x, result, stats = _run(method, SPD.matrix, SPD.rhs, 1e-8, exact)
    assert int(result) == SUCCESS and _counts(stats) == (0, 1, 0)
    np.testing.assert_allclose(x, exact, rtol=1e-15)
    near = _run(method, SPD.matrix, SPD.rhs, 1e-8, exact * (1 + 1e-5))
    far = _run(method, SPD.matrix, SPD.rhs, 1e-8, exact + 1e5)
    cold = _run(method, SPD.matrix, SPD.rhs, 1e-8)
    steps = [int(out[2]["num_steps"]) for out in (near, cold, far)]
    assert steps == sorted(steps) and steps[0] < steps[1]
    for x, result, _ in (near, far):
        assert int(result) == SUCCESS
        np.testing.assert_allclose(x, exact, rtol=1e-6, atol=1e-8)
    # What is zero needs no guess; a guess that is not finite is none.
    x, result, stats = _run(method, SPD.matrix, 0 * SPD.rhs, 1e-8, exact)
    assert int(result) == SUCCESS and _counts(stats) == (0, 0, 0) and not np.any(x)
    x, result, stats = _run(method, SPD.matrix, SPD.rhs, 1e-8, jnp.full(N, np.nan))
    assert int(result) == BREAKDOWN and not np.any(x)


@_methods
def test_max_steps(method):
    x, result, stats = _run(method, SPD.matrix, SPD.rhs, 1e-12, limit=6)
    assert int(result) == EXHAUSTED and _counts(stats) == (6, 7, 0)
    told = float(stats["residual_norm"])
    np.testing.assert_allclose(told, np.linalg.norm(SPD.rhs - SPD.matrix @ x), rtol=1e-10)
    assert int(_run(method, SPD.matrix, SPD.rhs, 0.9, limit=6)[1]) == SUCCESS


@_methods
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_data_is_a_breakdown(method, bad):
    rhs, matrix = SPD.rhs.copy(), SPD.matrix.copy()
    rhs[3] = bad
    matrix[2, 7] = matrix[7, 2] = bad
    for guess in (None, jnp.ones(N)):
        for a, b in ((SPD.matrix, rhs), (matrix, SPD.rhs)):
            x, result, _ = _run(method, a, b, 1e-6, guess)
            assert int(result) == BREAKDOWN and np.all(np.isfinite(x))


@_methods
def test_a_matvec_that_turns_bad(method):
    """x stays as it was before that iteration: the fifth, the first to see the fifth unknown."""
    tridiagonal = jnp.asarray(3 * np.eye(N) - np.eye(N, k=1) - np.eye(N, k=-1))
    b = jnp.eye(N)[0]

    @jax.jit
    def solve(poison):
        system = LinearSystem(
            lambda v: tridiagonal @ v * jnp.where(v[4] != 0, poison, 1.0), None, True
        )
        return METHODS[method](max_steps=5).solve(system, b, tolerance=1e-9, workspace=None)

    out = solve(jnp.nan)
    assert int(out.result._value) == BREAKDOWN
    assert int(out.num_steps) == int(out.num_matvecs) == 5
    told = np.linalg.norm(b - tridiagonal @ out.value)
    np.testing.assert_allclose(out.residual_norm, told, rtol=1e-12)
    assert np.all(np.asarray(out.value[:4]) > 0) and not np.any(out.value[4:])  # K_4
    assert int(solve(1.0).result._value) == EXHAUSTED


@_methods
def test_one_unknown_and_none(method):
    x, result, stats = _run(method, [[-2.0]], [3.0], 1e-6)
    assert int(result) == SUCCESS and _counts(stats) == (1, 2, 0) and float(x[0]) == -1.5
    x, result, _ = _run(method, [[0.0]], [3.0], 1e-6)
    assert int(result) in (BREAKDOWN, STAGNATION) and float(x[0]) == 0
    system, solver = LinearSystem(lambda v: v, None, True), METHODS[method]()
    solve = lambda b: solver.solve(system, b, tolerance=0.0, workspace=None, verify=True)
    for vector in ({}, {"a": jnp.zeros(0)}):
        out = jax.jit(solve)(vector)
        assert int(out.result._value) == SUCCESS and int(out.num_matvecs) == 0
        assert jtu.tree_structure(out.value) == jtu.tree_structure(vector)


@_methods
def test_counters_count_and_descent_is_the_slope(method):
    """Executions of A and of M⁻¹ at run time; as Newton calls it, and verified from a guess."""
    matvecs, applications = Counter(), Counter()
    a, scales = jnp.asarray(SPD.matrix), jnp.asarray(SCALES, float)
    system = LinearSystem(
        lambda v: a @ matvecs.tick(v), lambda v: scales * applications.tick(v), True
    )
    solver, b = METHODS[method](), jnp.asarray(SPD.rhs)
    norm = float(np.linalg.norm(b))

    @jax.jit
    def newton(tolerance):
        return solver.solve(system, b, tolerance=tolerance, workspace=None)

    @jax.jit
    def verified(tolerance, guess):
        return solver.solve(
            system, b, tolerance=tolerance, workspace=None, guess=guess, verify=True
        )

    for run, extra in ((lambda: newton(1e-3 * norm), 0), (lambda: newton(np.inf), 0)):
        with matvecs.measure() as done, applications.measure() as applied:
            out = run()
        assert done.primal == int(out.num_matvecs) == int(out.num_steps) + extra
        assert applied.primal == int(out.num_preconditioner_applications)
        assert int(out.num_transposed_matvecs) == 0 == int(out.num_restarts)
        slope = b @ (a @ out.value)
        np.testing.assert_allclose(out.descent, slope, rtol=1e-12, atol=1e-12)
    assert int(out.num_steps) == 0 and not np.any(out.value)
    with matvecs.measure() as done, applications.measure() as applied:
        out = verified(1e-8 * norm, jnp.ones(N))
    assert int(out.result._value) == SUCCESS and out.descent is None
    assert done.primal == int(out.num_matvecs) == int(out.num_steps) + 2
    assert applied.primal == int(out.num_preconditioner_applications)
    assert int(out.num_steps) <= applied.primal <= int(out.num_steps) + 1


@_methods
@pytest.mark.parametrize("preconditioned", [False, True])
def test_lanes_are_as_if_alone(method, preconditioned):
    names = ["zero_rhs", *(name for name in CASES if name != "zero_rhs")]
    matrices, rhs = [GALLERY[k].matrix for k in names], [GALLERY[k].rhs for k in names]
    broken, nan_rhs = SPD.matrix.copy(), SPD.rhs.copy()
    broken[3, 5] = nan_rhs[0] = np.nan
    matrices += [broken, SPD.matrix, np.eye(N)]
    rhs += [SPD.rhs, nan_rhs, 3 * SPD.rhs]
    matrices, rhs = jnp.asarray(np.stack(matrices)), jnp.asarray(np.stack(rhs))
    key = (method, "two leaves", preconditioned, preconditioned, 40)
    guess, rtol = jnp.full(N, 0.1), jnp.asarray(1e-8)
    batch = jax.jit(jax.vmap(_alone(*key), (0, 0, None, None)))
    values, results, stats = batch(matrices, rhs, rtol, guess)
    steps = set()
    for lane in range(len(rhs)):
        value, result, own = _compiled(*key)(matrices[lane], rhs[lane], rtol, guess)
        assert int(results[lane]) == int(result), lane
        for name, counter in own.items():
            if name != "residual_norm":
                assert int(stats[name][lane]) == int(counter), (lane, name)
        assert np.all(np.isfinite(values[lane]))
        if int(result) == SUCCESS:
            np.testing.assert_allclose(values[lane], value, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                stats["residual_norm"][lane], own["residual_norm"], atol=1e-7
            )
        steps.add(int(own["num_steps"]))
    assert len(steps) >= 4


@_methods
def test_derivatives(method):
    """With respect to a symmetric matrix and the right-hand side, on a PyTree."""
    rng = np.random.default_rng(0)
    a, b = jnp.asarray(SPD.matrix), jnp.asarray(SPD.rhs)
    da, db, w = (jnp.asarray(rng.standard_normal(s)) for s in ((N, N), N, N))
    solve = _alone(method, "two leaves", True, False)
    value = lambda m, b: solve((m + m.T) / 2, b, jnp.asarray(1e-11), b)[0]

    @jax.jit
    def both(da, db, w):
        return jax.jvp(value, (a, b), (da, db))[1], jax.vjp(value, a, b)[1](w)

    tangent, (bar_a, bar_b) = both(da, db, w)
    x, adjoint = np.linalg.solve(a, b), np.linalg.solve(a, w)
    expected = np.linalg.solve(a, db - (da + da.T) / 2 @ x)
    np.testing.assert_allclose(tangent, expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(bar_b, adjoint, rtol=1e-7, atol=1e-9)
    outer = -np.outer(adjoint, x)
    np.testing.assert_allclose(bar_a, (outer + outer.T) / 2, rtol=1e-6, atol=1e-9)


@_methods
def test_complex_adjoint(method):
    """Aᵀ = conj(A) is Hermitian again."""
    a, b = (jnp.asarray(x) for x in _data("symmetric_positive_definite", np.complex128))
    solve = lambda b: _run(method, a, b, 1e-12, structure="scalar leaf", preconditioned=True)[0]
    w = b[::-1]
    np.testing.assert_allclose(
        jax.jit(lambda w: jax.vjp(solve, b)[1](w)[0])(w), np.linalg.solve(a.T, w), rtol=1e-8
    )


@_methods
def test_refused(method):
    for keywords in ({"rtol": -1.0}, {"atol": -1e-3}, {"rtol": float("nan")}, {"max_steps": -1}):
        with pytest.raises(ValueError, match=next(iter(keywords))):
            METHODS[method](**keywords)
    with pytest.raises(ValueError, match="square"):
        lx.linear_solve(lx.MatrixLinearOperator(jnp.ones((3, 2))), jnp.ones(3), METHODS[method]())


class _Scripted(AbstractShortRecurrence):
    """Richardson's iteration, told when to break down: A = 2 I, x ← x + r/4 halves r."""

    breaks: tuple[int, ...] = eqx.field(static=True, default=())
    ends: bool = eqx.field(static=True, default=False)
    rtol: float = 1e-6
    atol: float = 0.0
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: AbstractPreconditioner = Identity()

    def begin(self, context: Context, progress: Progress):
        return progress, jnp.zeros_like(progress.num_steps)

    def advance(self, context: Context, progress: Progress, memory):
        r = tree.axpy(-0.25, context.mv(progress.r), progress.r)
        broken = jnp.any(progress.num_steps == jnp.asarray(self.breaks, jnp.int32))
        return progress._replace(
            x=tree.axpy(0.25, progress.r, progress.x),
            r=r,
            residual=context.norm(r),
            broken=broken,
            final=broken & self.ends,
        ).worked(steps=1, matvecs=1), memory + 1


def _scripted(**keywords):
    tolerance, verify = keywords.pop("tolerance", 1e-6), keywords.pop("verify", False)
    b = jnp.asarray([3.0, 4.0])
    solver, system = _Scripted(**keywords), LinearSystem(lambda v: 2 * v, None, True)
    solve = ft.partial(solver.solve, system, tolerance=5 * tolerance, workspace=None, verify=verify)
    return jax.jit(solve)(b)


def test_rounds():
    """A breakdown that gained is followed by a round, one at the start by none, a final one too."""
    plain = _scripted()
    assert int(plain.num_steps) == 20 and int(plain.num_restarts) == 0
    out = _scripted(breaks=(4, 9))
    assert int(out.num_steps) == 20 and int(out.num_restarts) == 2
    assert int(out.result._value) == SUCCESS
    np.testing.assert_allclose(out.value, [1.5, 2.0], rtol=1e-5)
    out = _scripted(breaks=(4,), verify=True)
    assert int(out.num_matvecs) == 22 and int(out.result._value) == SUCCESS
    out = _scripted(breaks=(4,), ends=True)
    assert int(out.num_steps) == 5 and int(out.result._value) == BREAKDOWN
    np.testing.assert_allclose(out.residual_norm, 5 / 32, rtol=1e-12)
    out = _scripted(max_steps=0)
    assert int(out.num_matvecs) == 0 and int(out.result._value) == EXHAUSTED


def test_no_success_below_the_rounding_level_without_a_true_residual():
    """The recurrence halves r for ever; b − A x stops at ε."""
    out = _scripted(tolerance=1e-20, max_steps=100)
    assert int(out.result._value) == STAGNATION and int(out.num_steps) <= 53
    assert float(out.residual_norm) >= 5 * np.finfo(float).eps
