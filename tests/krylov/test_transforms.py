"""jit, vmap and derivatives of a solve; what `vmap` is lowered to."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve import tree
from tests.helpers import AS_SHIPPED, GALLERY, selects_at_least
from tests.helpers.gallery import N

A = jnp.asarray(GALLERY["nonsymmetric"].matrix)
B = jnp.asarray(GALLERY["nonsymmetric"].rhs)
SCALED = nks.UserPreconditioner(lambda *_: lambda v: tree.scale(0.25, v))
METHODS = {
    "GMRES": nks.GMRES(rtol=1e-11, restart=20, preconditioner=SCALED),
    "GMRES-left": nks.GMRES(rtol=1e-11, restart=20, preconditioner=SCALED, side="left"),
    "FGMRES": nks.FGMRES(rtol=1e-11, restart=20, preconditioner=SCALED),
    "GMRES-MGS": nks.GMRES(rtol=1e-11, restart=20, orthogonalisation=nks.MGS()),
}
_methods = pytest.mark.parametrize("method", list(METHODS))


def _split(v):
    return {"a": v[:20].reshape(4, 5), "b": v[20:]}


def _join(v):
    return jnp.concatenate([v["a"].ravel(), v["b"]])


def _solve(matrix, rhs, solver, throw=True, **options):
    """On a PyTree, by a linearisation of ours."""
    fn = lambda y, matrix: _split(matrix @ _join(y))
    operator = nks.linearise(fn, _split(jnp.zeros_like(rhs)), matrix).operator
    return lx.linear_solve(operator, _split(rhs), solver, throw=throw, options=options)


def _value(method, matrix=A):
    return lambda matrix, rhs: _join(_solve(matrix, rhs, METHODS[method]).value)


@pytest.mark.parametrize("method", ["GMRES", "FGMRES"])
def test_plain_and_jit_agree(method):
    plain = _value(method)(A, B)
    np.testing.assert_allclose(plain, np.linalg.solve(A, B), rtol=1e-9)
    np.testing.assert_allclose(jax.jit(_value(method))(A, B), plain, rtol=1e-9)


@_methods
def test_jvp_and_vjp_also_with_respect_to_the_matrix(method):
    rng = np.random.default_rng(0)
    da, db = jnp.asarray(rng.standard_normal((N, N))), jnp.asarray(rng.standard_normal(N))
    w = jnp.asarray(rng.standard_normal(N))

    @jax.jit
    def both(da, db, w):
        tangent = jax.jvp(_value(method), (A, B), (da, db))[1]
        return tangent, jax.vjp(_value(method), A, B)[1](w)

    tangent, (bar_a, bar_b) = both(da, db, w)
    x = np.linalg.solve(A, B)
    np.testing.assert_allclose(tangent, np.linalg.solve(A, db - da @ x), rtol=1e-8, atol=1e-10)
    adjoint = np.linalg.solve(A.T, w)
    np.testing.assert_allclose(bar_b, adjoint, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(bar_a, -np.outer(adjoint, x), rtol=1e-7, atol=1e-9)


def test_complex_derivatives():
    a = jnp.asarray(np.asarray(A) * (1 + 0.2j) + 1j * np.diag(np.arange(N) / N))
    b = jnp.asarray(np.asarray(B) * (1 - 1j))
    solve = lambda a, b: _join(_solve(a, b, nks.GMRES(rtol=1e-12, restart=N)).value)
    x = np.linalg.solve(a, b)
    np.testing.assert_allclose(jax.jit(solve)(a, b), x, rtol=1e-9)
    w = b[::-1]
    bar_a, bar_b = jax.jit(lambda w: jax.vjp(solve, a, b)[1](w))(w)
    adjoint = np.linalg.solve(np.asarray(a).T, w)  # JAX's transpose, without conjugation
    np.testing.assert_allclose(bar_b, adjoint, rtol=1e-8)
    np.testing.assert_allclose(bar_a, -np.outer(adjoint, x), rtol=1e-7, atol=1e-9)


def _lanes():
    """Lanes that take from none to all of their steps, and two that fail."""
    names = ["zero_rhs", "nonsymmetric", "symmetric_indefinite", "cyclic_shift"]
    names += ["singular_inconsistent", "hilbert", "singular_consistent"]
    matrices = [GALLERY[name].matrix for name in names]
    rhs = [GALLERY[name].rhs for name in names]
    broken = matrices[1].copy()
    broken[3, 5] = np.nan
    nan_rhs = rhs[1].copy()
    nan_rhs[0] = np.nan
    matrices += [broken, matrices[1], np.eye(N)]
    rhs += [rhs[1], nan_rhs, 3 * rhs[1]]
    return jnp.asarray(np.stack(matrices)), jnp.asarray(np.stack(rhs))


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("GMRES", None),
        ("GMRES", 11),
        ("GMRES-left", None),
        ("GMRES-MGS", None),
        ("GMRES-guess", None),
        ("FGMRES", None),
        ("FGMRES", 11),
    ],
)
def test_lanes_are_as_if_alone(kind, limit):
    changes = {"rtol": 1e-8, "restart": 12, "max_steps": limit}
    solver = METHODS[kind.removesuffix("-guess")]
    solver = type(solver)(**{**{k: getattr(solver, k) for k in vars(solver)}, **changes})
    options = {"y0": _split(jnp.ones(N))} if kind.endswith("guess") else {}

    @jax.jit
    def alone(matrix, rhs):
        solution = _solve(matrix, rhs, solver, throw=False, **options)
        return _join(solution.value), solution.result, solution.stats

    matrices, rhs = _lanes()
    values, results, stats = jax.jit(jax.vmap(alone))(matrices, rhs)
    steps = set()
    for lane in range(len(rhs)):
        value, result, own = alone(matrices[lane], rhs[lane])
        assert int(results._value[lane]) == int(result._value), lane
        for name, counter in own.items():
            if name == "arnoldi":
                assert int(stats[name].columns[lane]) == int(counter.columns), lane
            elif name == "residual_norm":
                actual = float(stats[name][lane])
                np.testing.assert_allclose(actual, float(counter), rtol=1e-3, atol=1e-12)
            else:
                assert int(stats[name][lane]) == int(counter), (lane, name)
        assert np.all(np.isfinite(values[lane]))
        # a lane that fails near singularity amplifies rounding; those that succeed do not
        if bool(result == lx.RESULTS.successful):
            np.testing.assert_allclose(values[lane], value, rtol=1e-6, atol=1e-8)
        if limit is not None:
            assert int(own["num_steps"]) <= limit
        steps.add(int(own["num_steps"]))
    assert len(steps) >= 3


@pytest.mark.parametrize("preconditioner", [nks.Identity(), SCALED], ids=["", "preconditioned"])
@pytest.mark.parametrize("method", [nks.GMRES, nks.FGMRES])
def test_vmap_selects_over_no_basis(method, preconditioner):
    solver = method(rtol=1e-6, preconditioner=preconditioner)
    lanes, n = 8, 512
    rows = solver.restart + 1
    d = jnp.linspace(1.0, 3.0, n)

    def solve(scale, b):
        operator = lx.FunctionLinearOperator(
            lambda v: scale * d * v + jnp.roll(v, 1), jax.eval_shape(lambda: b)
        )
        return lx.linear_solve(operator, b, solver, throw=False).value

    lowered = jax.jit(jax.vmap(solve)).lower(jnp.ones(lanes), jnp.ones((lanes, n)))
    text = lowered.as_text()
    assert selects_at_least(text, lanes * n)  # the reader sees the selects of vectors …
    assert selects_at_least(text, rows * n) == []  # … and none of a basis
    # No copy of the basis inside a loop: the compiled program updates it in place.
    compiled = lowered.compile(AS_SHIPPED).as_text()
    basis = rf"f64\[(?:{lanes},)?(?:{rows}|{rows - 1}),(?:{lanes},)?{n}\]"
    assert re.search(basis, compiled)
    copies = [x for x in compiled.splitlines() if re.search(rf"= ({basis})\S* copy\(", x)]
    assert copies == []


def test_transpose_and_conj_of_the_state():
    a = jnp.asarray(np.asarray(A) * (1 + 0.3j))
    b = B.astype(a.dtype)
    operator = nks.linearise(lambda y, m: m @ y, b, a).operator
    inverse = nks.linearise(lambda y, m: m @ y, b, jnp.asarray(np.linalg.inv(a) + 0.01j)).operator
    solver = nks.GMRES(rtol=1e-12, preconditioner=nks.UserPreconditioner(lambda *_: inverse))
    state = solver.init(operator, {})
    for derived, matrix in (
        (solver.transpose(state, {}), np.asarray(a).T),
        (solver.conj(state, {}), np.asarray(a).conj()),
    ):
        new, options = derived
        assert options == {}
        np.testing.assert_allclose(new.operator.as_matrix(), matrix, rtol=1e-14)
        pre = np.linalg.inv(matrix) + np.where(matrix[0, 0].imag < 0, -0.01j, 0.01j)
        np.testing.assert_allclose(new.preconditioner.as_matrix(), pre, rtol=1e-8, atol=1e-12)
        x, result, _ = solver.compute(new, b, {})
        assert bool(result == lx.RESULTS.successful)
        np.testing.assert_allclose(matrix @ x, b, rtol=1e-9, atol=1e-10)


def test_transpose_of_init_is_init_of_the_transpose():
    operator = nks.linearise(lambda y, m: m @ y, B, A).operator
    solver = nks.GMRES(rtol=1e-10)
    one, _ = solver.transpose(solver.init(operator, {}), {})
    other = solver.init(operator.T, {})
    x, _, stats = eqx.filter_jit(solver.compute)(one, B, {})
    y, _, other_stats = eqx.filter_jit(solver.compute)(other, B, {})
    np.testing.assert_allclose(x, y, rtol=1e-12)
    np.testing.assert_allclose(x, np.linalg.solve(A.T, B), rtol=1e-8)
    assert int(stats["num_matvecs"]) == int(other_stats["num_matvecs"])
