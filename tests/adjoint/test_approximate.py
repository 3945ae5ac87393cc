"""`OneStep`, `Neumann` and `Shared` against dense inverses, explicit series and their estimates."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve.adjoint.approximate import Neumann, OneStep
from nksolve.adjoint.krylov import KrylovAdjoint
from nksolve.adjoint.shared import SecantInverse, Shared
from nksolve.adjoint.splitting import ForwardPreconditioner, NegativeIdentity
from nksolve.krylov.recycling import RecycledSpace
from nksolve.newton.reuse import KeepLinearisation
from tests.adjoint.cells import CELLS, operator, vector
from tests.helpers import Counter, square_values
from tests.test_matrix_free import ARGS as STENCIL, stencil

N = 64
NEWTON = nks.NewtonKrylov(rtol=1e-12, atol=1e-12)
RHOS = (0.5, 0.9, 0.99)


class LowRank(eqx.Module):
    """−I + Σ uᵢ vᵢᵀ, as a quasi-Newton method leaves it."""

    left: jax.Array
    right: jax.Array

    def mv(self, v):
        return -v + self.left.T @ (self.right @ v)

    def transpose_mv(self, w):
        return -w + self.right.T @ (self.left @ w)


def _low_rank(w, rank):
    """The inverse of W − I with the slowest part right: −I − W + the largest of what is missing."""
    missing = np.linalg.inv(w - np.eye(len(w))) + np.eye(len(w))
    u, s, vt = np.linalg.svd(missing)
    return LowRank(jnp.asarray((u[:, :rank] * s[:rank]).T), jnp.asarray(vt[:rank]))


def _space(w, size):
    """A recycled space of the right singular vectors of least singular values."""
    j = w - np.eye(len(w))
    _, _, vt = np.linalg.svd(j)
    search = vt[-size:]
    image, r = np.linalg.qr(j @ search.T)
    search = np.linalg.solve(r.T, search)
    return RecycledSpace(
        jnp.asarray(search), jnp.asarray(image.T), jnp.zeros((size, size)), jnp.ones(size, bool)
    )


def _solve(adjoint, solver=NEWTON, stats=None):
    linear = adjoint.resolved(solver, None, frozenset(), throw=True)
    return linear.continuing({} if stats is None else stats)


@ft.cache
def _compiled(adjoint, leaves=None):
    """(W, b, w, stats) → (B b, Bᵀ w), by `jax.vjp` of the solve."""
    del leaves

    def run(matrix, b, w, stats):
        solve = _solve(adjoint, stats=stats)
        value, pull = jax.vjp(lambda b: solve(operator(matrix), b, b), b)
        return value, pull(w)[0]

    return eqx.filter_jit(run)


def _cast(x, dtype):
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _series(w, b, terms, damping=1.0):
    j, x = w - np.eye(len(w)), np.zeros_like(b)
    for _ in range(terms):
        x = x - damping * (b - j @ x)
    return x


# --- linear maps --------------------------------------------------------------------------

LINEAR = {
    "one": (OneStep(), None),
    "series": (Neumann(7, 0.8), None),
    "shared inverse": (Shared(refine=0), lambda w: {"inverse": _low_rank(w, 4)}),
    "shared space": (Shared(refine=0), lambda w: {"recycled": _space(w, 4)}),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", LINEAR)
def test_transposes(name, dtype):
    adjoint, left = LINEAR[name]
    w = CELLS["disc"](N, 0.9)
    stats = None if left is None else jax.tree.map(lambda x: _cast(x, dtype), left(w))
    b, c = vector(N, 1).astype(dtype), vector(N, 2).astype(dtype)
    x, y = _compiled(adjoint, name)(
        jnp.asarray(w.astype(dtype)), jnp.asarray(b), jnp.asarray(c), stats
    )
    assert x.dtype == y.dtype == dtype
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    scale = np.linalg.norm(x) * np.linalg.norm(c)
    assert abs(np.vdot(x, c) - np.vdot(b, y)) <= 20 * np.finfo(dtype).eps * scale


def test_secants_and_transposes_over_a_complex_tree():
    """B C = U; ⟨Bv, w⟩ = ⟨v, Bᵀw⟩ without conjugation over ℂ, its real part over ℝ²ⁿ."""
    rng = np.random.default_rng(4)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape))
    rows = jnp.asarray(np.linalg.qr(np.asarray(draw(8, 3)))[0].T)
    split = lambda x: {"a": x[..., :6].reshape(*x.shape[:-1], 2, 3), "b": x[..., 6:]}
    flat = lambda x: np.concatenate([np.ravel(x["a"]), np.ravel(x["b"])])
    search, v, w = draw(3, 8), draw(8), draw(8)
    structure = jax.eval_shape(lambda: split(v))
    made = NegativeIdentity()
    square = nks.linearise(
        lambda y, _: jax.tree.map(jnp.sin, y), jax.tree.map(jnp.zeros_like, structure)
    )
    base = made.as_operator(made.init(square.operator, None, None))
    for real in (False, True):
        inverse = SecantInverse(base, split(search), split(rows), real)
        np.testing.assert_allclose(flat(inverse.mv(split(rows[1]))), search[1], atol=1e-13)
        left = np.sum(flat(inverse.mv(split(v))) * np.asarray(w))
        right = np.sum(np.asarray(v) * flat(inverse.transpose_mv(split(w))))
        difference = (left - right).real if real else abs(left - right)
        assert abs(difference) <= 1e-13 * abs(left)


def test_the_series_is_the_series_and_one_term_is_one_step():
    w, b = CELLS["near-symmetric"](N, 0.9), vector(N)
    ask = lambda adjoint: _compiled(adjoint)(jnp.asarray(w), jnp.asarray(b), jnp.asarray(b), None)
    np.testing.assert_array_equal(ask(OneStep())[0], -b)
    np.testing.assert_array_equal(ask(Neumann(1))[0], -b)
    x, y = ask(Neumann(7, 0.8))
    np.testing.assert_allclose(x, _series(w, b, 7, 0.8), rtol=1e-12)
    np.testing.assert_allclose(y, _series(w.T, b, 7, 0.8), rtol=1e-12)


def test_the_series_converges_at_the_rate_of_the_cell():
    w, b = CELLS["near-symmetric"](N, 0.5), vector(N)
    exact = np.linalg.solve(w - np.eye(N), b)
    errors = []
    for terms in (10, 20, 60):
        x = _compiled(Neumann(terms))(jnp.asarray(w), jnp.asarray(b), jnp.asarray(b), None)[0]
        errors.append(np.linalg.norm(x - exact) / np.linalg.norm(exact))
    assert 0.3 * 0.5**10 < errors[1] / errors[0] < 1.1 * 0.5**10
    assert errors[2] < 1e-14


# --- estimates ----------------------------------------------------------------------------

REPORTED = {
    "one": lambda receive: OneStep(report=receive),
    "series": lambda receive: Neumann(20, report=receive),
    "shared inverse": lambda receive: Shared(refine=0, report=receive),
    "shared space": lambda receive: Shared(refine=3, report=receive),
}
MATVECS = {"one": 0, "series": 19, "shared inverse": 0, "shared space": 3}


@pytest.mark.parametrize("name", REPORTED)
def test_errors_against_their_estimates(name):
    """error ≤ estimate ≤ 4 error, and the residual is the true one."""
    reports = []
    run = _compiled(REPORTED[name](reports.append))
    for kind, cell in CELLS.items():
        for rho in RHOS:
            w, b, c = cell(N, rho), vector(N, 1), vector(N, 2)
            stats = {
                "shared inverse": lambda w=w: {"inverse": _low_rank(w, 3)},
                "shared space": lambda w=w: {"recycled": _space(w, 3)},
            }.get(name, lambda: None)()
            x, y = run(jnp.asarray(w), jnp.asarray(b), jnp.asarray(c), stats)
            jax.effects_barrier()
            found = {r.transposed: r for r in reports}
            assert len(reports) == 2
            reports.clear()
            j = w - np.eye(N)
            for transposed, matrix, rhs, value in ((False, j, b, x), (True, j.T, c, y)):
                report, residual = found[transposed], rhs - matrix @ value
                assert report.result == "approximate" and not report.failed
                np.testing.assert_allclose(
                    report.residual_norm, np.linalg.norm(residual), rtol=1e-9
                )
                np.testing.assert_allclose(report.solution_norm, np.linalg.norm(value), rtol=1e-9)
                assert 1 <= report.num_matvecs - MATVECS[name] <= 22
                error = np.linalg.norm(np.linalg.solve(matrix, residual))
                assert error <= report.error_estimate <= 4 * error, (kind, rho, transposed)


@pytest.mark.parametrize("left", ["inverse", "recycled"])
def test_refinement_and_what_is_shared_both_help(left):
    w, b = CELLS["near-symmetric"](N, 0.99), vector(N)
    stats = {left: _low_rank(w, 6) if left == "inverse" else _space(w, 6)}
    exact = np.linalg.solve((w - np.eye(N)).T, b)

    def error(adjoint, stats=None):
        y = _compiled(adjoint, left)(jnp.asarray(w), jnp.asarray(b), jnp.asarray(b), stats)[1]
        return np.linalg.norm(y - exact) / np.linalg.norm(exact)

    plain, shared, refined, much = (
        error(OneStep()),
        error(Shared(refine=0), stats),
        error(Shared(refine=5), stats),
        error(Shared(refine=60), stats),
    )
    assert shared < 0.3 * plain
    assert refined < 0.3 * shared
    assert much < 1e-10


# --- preconditioners ----------------------------------------------------------------------


def test_the_forward_preconditioner():
    jacobi = nks.Jacobi(lambda y, args: jnp.diagonal(args))
    forward = nks.NewtonKrylov(1e-9, 1e-9, linear_solver=nks.GMRES(preconditioner=jacobi))
    named = Neumann(40, preconditioner=ForwardPreconditioner())
    assert named.resolved(forward, None, frozenset(), throw=True).preconditioner == jacobi
    alone = named.resolved(NEWTON, None, frozenset(), throw=True).preconditioner
    assert isinstance(alone, NegativeIdentity)
    scaling = np.linspace(1.0, 500.0, N)
    matrix = np.diag(scaling) @ (np.eye(N) - CELLS["near-symmetric"](N, 0.4))
    fn = lambda y, args: args @ y
    b = jnp.asarray(vector(N))
    linear = named.resolved(forward, jnp.asarray(matrix), frozenset(), throw=True)

    @jax.jit
    def run(matrix, b):
        lin = nks.linearise(fn, jnp.zeros(N), matrix)
        value, pull = jax.vjp(lambda b: linear(lin.operator, jnp.zeros(N), b), b)
        return value, pull(b)[0]

    x, y = run(jnp.asarray(matrix), b)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(y, np.linalg.solve(matrix.T, b), rtol=1e-8, atol=1e-10)


# --- in the verbs -------------------------------------------------------------------------

COUNTER = Counter()
M = 7
ARGS = {"W": jnp.asarray(CELLS["disc"](M, 0.4, 3)), "b": jnp.asarray(vector(M, 5))}
WEIGHTS = jnp.asarray(vector(M, 6))
SOURCE = STENCIL["source"]  # 67 unknowns, more than a Krylov basis has
FULL = nks.NewtonKrylov(1e-12, 1e-12, globalisation=nks.FullStep())
DEFLATED = nks.NewtonKrylov(1e-12, 1e-12, linear_solver=nks.GCRODR(restart=6, recycle=4))
ADJOINTS = {
    "krylov": (KrylovAdjoint(), FULL),
    "one": (OneStep(), FULL),
    "series": (Neumann(60), FULL),
    "shared": (Shared(refine=7), DEFLATED),
}


def cell(z, args):
    """tanh(W z + b) − z."""
    z, args = COUNTER.tick((z, args))
    return jnp.tanh(args["W"] @ z + args["b"]) - z


def _root(name, args, find=nks.root_find):
    adjoint, solver = ADJOINTS[name]
    return find(cell, solver, jnp.zeros(M), args, adjoint=adjoint, throw=False)


def _loss(name, args, find=nks.root_find):
    return jnp.sum(WEIGHTS * jnp.sin(_root(name, args, find).value))


@ft.cache
def _dense(order):
    """Gradient, and the Hessian's product with ARGS, of the loss by dense implicit derivatives."""
    z = jax.jit(lambda a: _root("krylov", a).value)(ARGS)
    fn = lambda y, a: jnp.tanh(a["W"] @ y + a["b"]) - y

    def value(args):
        y = jax.lax.stop_gradient(z)
        for _ in range(order):
            y = y - jnp.linalg.solve(jax.jacfwd(fn)(y, args), fn(y, args))
        return jnp.sum(WEIGHTS * jnp.sin(y))

    if order == 1:
        return jax.jit(jax.grad(value))(ARGS)
    return jax.jit(lambda a: jax.jvp(jax.grad(value), (a,), (a,))[1])(ARGS)


@pytest.mark.parametrize("name", ["series", "shared"])
def test_enough_terms_are_exact_to_second_order(name):
    def both(args):
        return jax.jvp(jax.grad(ft.partial(_loss, name)), (args,), (args,))

    gradient, product = jax.jit(both)(ARGS)
    tangent = jax.jit(lambda a: jax.jvp(ft.partial(_loss, name), (a,), (a,))[1])(ARGS)
    for key in ARGS:
        np.testing.assert_allclose(gradient[key], _dense(1)[key], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(product[key], _dense(2)[key], rtol=1e-7, atol=1e-8)
    along = sum(np.vdot(_dense(1)[key], ARGS[key]) for key in ARGS)
    np.testing.assert_allclose(tangent, along, rtol=1e-9)


def test_one_step_is_the_gradient_of_one_more_step():
    z = jax.lax.stop_gradient(jax.jit(lambda a: _root("krylov", a).value)(ARGS))
    more = lambda a: jnp.sum(WEIGHTS * jnp.sin(jnp.tanh(a["W"] @ z + a["b"])))
    expected, found = jax.grad(more)(ARGS), jax.jit(jax.grad(ft.partial(_loss, "one")))(ARGS)
    for key in ARGS:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ADJOINTS)
def test_work(name):
    """K full steps: K + 1 evaluations forward and backward."""
    forward = eqx.filter_jit(lambda a: _root(name, a).stats)
    with COUNTER.measure() as plain:
        stats = forward(ARGS)
    compiled = jax.jit(jax.grad(ft.partial(_loss, name)))
    with COUNTER.measure() as count:
        compiled(ARGS)
    steps = int(stats["num_steps"])
    assert int(stats["num_rejected_steps"]) == 0
    assert count.primal == plain.primal == steps + 1
    # Products with Jᵀ: none, k − 1, at most `refine`; one more with ∂F/∂θᵀ.
    products = {"one": 0, "series": 59, "shared": 7}
    if name == "shared":
        assert 1 <= count.transposed <= 7 + 1
    elif name in products:
        assert count.transposed == products[name] + 1


@pytest.mark.parametrize("name", ADJOINTS)
def test_no_square_value(name):
    adjoint, solver = ADJOINTS[name]
    size = SOURCE.size

    def value(source):
        find = ft.partial(nks.root_find, stencil, solver, jnp.zeros(size), adjoint=adjoint)
        return jnp.sum(jnp.sin(find(args={**STENCIL, "source": source}).value))

    assert square_values(jax.make_jaxpr(jax.grad(value))(SOURCE), size) == []


def test_the_solver_says_what_is_kept():
    adjoint = Neumann(3)
    assert isinstance(adjoint.reuse_in(FULL), KeepLinearisation)
    again = Neumann(3, reuse=nks.Relinearise())
    value = lambda a: jnp.sum(
        nks.root_find(cell, FULL, jnp.zeros(M), a, adjoint=again, throw=False).value
    )
    with COUNTER.measure() as plain:
        steps = int(nks.root_find(cell, FULL, jnp.zeros(M), ARGS, throw=False).stats["num_steps"])
    with COUNTER.measure() as count:
        jax.block_until_ready(jax.jit(jax.grad(value))(ARGS))
    assert (plain.primal, count.primal) == (steps + 1, steps + 2)


@pytest.mark.parametrize("name", ["series", "shared"])
def test_in_optimistix(name):
    find = lambda fn, solver, y0, args, **kwargs: optx.root_find(fn, solver, y0, args, **kwargs)
    gradient = jax.jit(jax.grad(lambda a: _loss(name, a, find)))(ARGS)
    for key in ARGS:
        np.testing.assert_allclose(gradient[key], _dense(1)[key], rtol=1e-9, atol=1e-9)


def test_lanes_are_as_if_alone():
    starts = jnp.stack([ARGS["b"], jnp.zeros(M), ARGS["b"].at[0].set(jnp.nan)])
    gradient = jax.grad(lambda b: _loss("shared", {**ARGS, "b": b}))
    together, alone = jax.jit(jax.vmap(gradient))(starts), jax.jit(gradient)
    for lane in range(2):
        np.testing.assert_allclose(together[lane], alone(starts[lane]), rtol=1e-10, atol=1e-12)
    assert not np.any(np.abs(together[2]) > 0)  # NaN or nothing, of a lane that has no root


def test_a_jacobian_that_is_not_finite_has_no_approximation():
    """GMRES returns zero there, which would pass for a gradient."""
    w, b = jnp.full((N, N), jnp.nan), jnp.asarray(vector(N))
    x, y = _compiled(Shared(refine=5), "inverse")(
        w, b, b, {"inverse": _low_rank(CELLS["disc"](N, 0.5), 6)}
    )
    assert np.all(np.isnan(x)) and np.all(np.isnan(y))


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Neumann(0), "num_terms"),
        (lambda: Neumann(2, damping=0.0), "positive"),
        (lambda: Neumann(2, estimate_steps=0), "estimate_steps"),
        (lambda: Shared(refine=-1), "refine"),
        (lambda: OneStep(preconditioner=nks.InnerKrylov(nks.GMRES(max_steps=3))), "linear precond"),
    ],
)
def test_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_nothing_to_share_and_nothing_to_take_over():
    with pytest.raises(TypeError, match="NegativeIdentity"):
        OneStep(preconditioner=None)
    value = lambda a: jnp.sum(
        nks.root_find(cell, FULL, jnp.zeros(M), a, adjoint=Shared(), throw=False).value
    )
    assert np.isfinite(value(ARGS))
    with pytest.raises(ValueError, match=r"NewtonKrylov left none.*KrylovAdjoint"):
        jax.grad(value)(ARGS)
    newton = optx.Newton(1e-8, 1e-8)
    with pytest.raises(ValueError, match="Newton has none"):
        Neumann(3, preconditioner=ForwardPreconditioner()).resolved(
            newton, None, frozenset(), throw=True
        )
    with pytest.raises(TypeError, match="stands for another"):
        ForwardPreconditioner().init(operator(jnp.eye(2)), None, None)
