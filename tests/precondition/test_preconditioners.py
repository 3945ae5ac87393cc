"""Preconditioners: counted, transposed in the adjoint, refused where they do not fit."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from tests.helpers import Counter

N = 61
_rng = np.random.default_rng(8)
# Far from symmetric, and all but inverted by its own bidiagonal part: M⁻¹ and M⁻ᵀ are no substitute
# for one another.
_DIAGONAL = np.linspace(1.0, 30.0, N)
_BAND = np.diag(_DIAGONAL) + np.diag(0.9 * _DIAGONAL[:-1], 1)
A = jnp.asarray(_BAND + 0.02 * _rng.standard_normal((N, N)))
B = jnp.asarray(_rng.standard_normal(N))
BAND_INVERSE = jnp.asarray(np.linalg.inv(_BAND))


def _operator(matrix=A, counter=None):
    fn = lambda y, m: m @ (y if counter is None else counter.tick(y))
    return nks.linearise(fn, jnp.zeros(matrix.shape[0]), matrix).operator


def _counted(counter):
    return nks.UserPreconditioner(lambda *_: lambda v: BAND_INVERSE @ counter.tick(v))


@pytest.mark.parametrize("guess", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    "solver",
    [
        nks.GMRES(rtol=1e-9, restart=30),
        nks.GMRES(rtol=1e-9, restart=3),
        nks.GMRES(rtol=1e-9, restart=3, side="left"),
        nks.FGMRES(rtol=1e-9, restart=3),
    ],
    ids=["GMRES-30", "GMRES-3", "left-3", "FGMRES-3"],
)
def test_counts_are_the_real_ones(solver, guess):
    matvecs, applications = Counter(), Counter()
    keywords = {k: getattr(solver, k) for k in vars(solver)} | {
        "preconditioner": _counted(applications)
    }
    solver = type(solver)(**keywords)

    @jax.jit
    def solve(b, y0):
        operator = lx.FunctionLinearOperator(
            lambda v: A @ matvecs.tick(v), jax.eval_shape(lambda: b)
        )
        options = {"y0": y0} if guess else {}
        solution = lx.linear_solve(operator, b, solver, options=options)
        return solution.value, solution.stats

    exact = jnp.asarray(np.linalg.solve(A, B))
    for y0 in (jnp.ones(N), exact):
        with matvecs.measure() as count, applications.measure() as applied:
            value, stats = solve(B, y0)
        assert len(count.executions) == int(stats["num_matvecs"])
        assert len(applied.executions) == int(stats["num_preconditioner_applications"])
        np.testing.assert_allclose(value, exact, rtol=1e-6, atol=1e-8)
        if guess and y0 is exact and getattr(solver, "side", "") != "left":
            assert int(stats["num_preconditioner_applications"]) == 0


@pytest.mark.parametrize("method", [nks.GMRES, nks.FGMRES])
def test_adjoint_is_preconditioned_by_the_transpose(method):
    """M⁻ᵀ on Aᵀ takes as few matvecs as M⁻¹ on A; M⁻¹ on Aᵀ would take many times more."""
    counter = Counter()
    solver = method(rtol=1e-9, restart=N, preconditioner=nks.UserPreconditioner(_build))

    @jax.jit
    def both(b, w):
        operator = _operator(counter=counter)
        solve = lambda b: lx.linear_solve(operator, b, solver).value
        value, pull = jax.vjp(solve, b)
        return value, pull(w)[0]

    with counter.measure() as count:
        value, cotangent = both(B, B)
    np.testing.assert_allclose(value, np.linalg.solve(A, B), rtol=1e-6)
    np.testing.assert_allclose(cotangent, np.linalg.solve(A.T, B), rtol=1e-6, atol=1e-9)
    forward, backward = count.tangent, count.transposed
    assert 4 < forward < 20 and backward <= forward + 3
    unsuited = nks.UserPreconditioner(lambda *_: lambda v: BAND_INVERSE @ v)
    wrong = lx.linear_solve(
        _operator(A.T), B, method(rtol=1e-9, restart=N, preconditioner=unsuited), throw=False
    )
    assert int(wrong.stats["num_matvecs"]) > 2 * backward


def _build(operator, y, args):
    return lambda v: BAND_INVERSE @ v


def _dot_test(operator, rng):
    def draw(structure):
        def leaf(s):
            x = rng.standard_normal(s.shape)
            if np.issubdtype(s.dtype, np.complexfloating):
                x = x + 1j * rng.standard_normal(s.shape)
            return jnp.asarray(x.astype(s.dtype))

        return jax.tree.map(leaf, structure)

    def dot(a, b):  # without conjugation, as JAX transposes
        return sum(
            jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )

    v, w = draw(operator.in_structure()), draw(operator.out_structure())
    np.testing.assert_allclose(dot(operator.mv(v), w), dot(v, operator.T.mv(w)), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_dot_tests(dtype):
    y = {"a": jnp.ones((2, 3), dtype), "b": jnp.ones((), dtype)}
    jacobian = nks.linearise(lambda y, _: jax.tree.map(lambda x: x * x, y), y).operator
    matrix = jnp.asarray(np.random.default_rng(1).standard_normal((6, 6)).astype(dtype))

    def build(operator, y, args):
        return lambda v: {"a": (matrix @ v["a"].ravel()).reshape(2, 3), "b": v["b"] + v["a"][0, 1]}

    diagonal = jax.tree.map(lambda x: x * 2, y)
    for preconditioner in (
        nks.Identity(),
        nks.Jacobi(lambda y, args: diagonal),
        nks.UserPreconditioner(build),
        nks.UserPreconditioner(lambda operator, y, args: operator),
    ):
        assert preconditioner.is_rebuilt
        state = preconditioner.update(preconditioner.init(jacobian, y, None), jacobian, y, None)
        _dot_test(preconditioner.as_operator(state), np.random.default_rng(2))


def test_jacobi():
    d = jnp.array([2.0, 0.0, -4.0])
    operator = nks.linearise(lambda y, _: d * y, jnp.ones(3)).operator
    jacobi = nks.Jacobi(lambda y, args: args * y)
    state = jacobi.init(operator, jnp.ones(3), d)
    inverse = jacobi.as_operator(state)
    np.testing.assert_allclose(inverse.mv(jnp.ones(3)), [0.5, 1.0, -0.25])  # zero: unscaled
    assert lx.is_diagonal(inverse) and inverse.T is inverse
    with pytest.raises(ValueError, match=r"shapes .*\(2,\)"):
        nks.Jacobi(lambda y, args: jnp.ones(2)).init(operator, jnp.ones(3), d)
    with pytest.raises(ValueError, match="shapes"):
        nks.Jacobi(lambda y, args: {"a": jnp.ones(3)}).init(operator, jnp.ones(3), d)


def test_jacobi_pays():
    d = jnp.asarray(np.logspace(0, 5, N))
    operator = nks.linearise(lambda y, _: d * y + jnp.roll(y, 1) * 0.1, jnp.zeros(N)).operator
    plain = lx.linear_solve(operator, B, nks.GMRES(rtol=1e-8, restart=N), throw=False)
    jacobi = nks.GMRES(rtol=1e-8, restart=N, preconditioner=nks.Jacobi(lambda y, args: d))
    scaled = lx.linear_solve(operator, B, jacobi)
    assert 4 * int(scaled.stats["num_matvecs"]) < int(plain.stats["num_matvecs"])


def test_user_preconditioner_is_checked():
    operator = _operator()
    for build, error, text in (
        (lambda *_: 3.0, TypeError, "must return"),
        (lambda *_: lambda v: v[:2], ValueError, "must map"),
        (lambda *_: lx.IdentityLinearOperator(jax.eval_shape(lambda: B[:4])), ValueError, "maps"),
    ):
        with pytest.raises(error, match=text):
            nks.UserPreconditioner(build).init(operator, None, None)
    seen = []
    build = lambda operator, y, args: seen.append((operator, y, args)) or (lambda v: v)
    nks.UserPreconditioner(build).init(operator, 1, 2)
    assert seen == [(operator, 1, 2)]


def test_the_option_replaces_the_field():
    wrong = nks.UserPreconditioner(lambda *_: lambda v: v * jnp.nan)
    solver = nks.GMRES(rtol=1e-9, preconditioner=wrong)
    inverse = lx.MatrixLinearOperator(BAND_INVERSE)

    def solve(b):
        options = {"preconditioner": inverse}
        solution = lx.linear_solve(_operator(), b, solver, options=options, throw=False)
        return solution.value, solution.stats["num_matvecs"]

    value, pull, matvecs = jax.vjp(solve, B, has_aux=True)
    assert int(matvecs) < 20
    np.testing.assert_allclose(value, np.linalg.solve(A, B), rtol=1e-6)
    np.testing.assert_allclose(pull(B)[0], np.linalg.solve(A.T, B), rtol=1e-6, atol=1e-9)
