"""BDF with mass matrices, and for differential-algebraic equations of index 1."""

import functools as ft

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import nksolve as nks
from nksolve.ode.bdf import BDF, BDFController
from nksolve.ode.bdf.rows import row_weights, undone, with_rows
from nksolve.ode.mass import consistent
from nksolve.ode.newton import SimplifiedNewton
from tests.helpers import dense_steps
from tests.helpers.jaxprs import square_values

TIGHT = SimplifiedNewton.alone(1e-11, 1e-11)
SEMI = np.array([1.0, 1.0, 0.0])
DIRECT = nks.BandedDirect(lower=2, upper=2)
KRYLOV = nks.GMRES(restart=3)
slowly = ft.partial(pytest.param, marks=pytest.mark.slow)


# --- order --------------------------------------------------------------------------------------


def _exact(t):
    return jnp.stack([jnp.cos(t), jnp.exp(-t), 1 / (1 + t)])


def _field(t, y, args):
    """2 a' and b' with an algebraic z, whose solution is `_exact`."""
    del args
    (a, b, z), (u, v, w) = y, _exact(t)
    cubic = lambda z: z + z**3 / 3
    return jnp.stack(
        [
            2 * (-jnp.sin(t) - 3 * (a - u) + (z - w) * b),
            -v - 50 * (b - v) * z + (z - w),
            a * b - u * v - cubic(z) + cubic(w),
        ]
    )


TERM = dfx.ODETerm(_field)
MASS = np.array([2.0, 1.0, 0.0])
SOLVERS = {
    "diagonal, direct": BDF(DIRECT, TIGHT, mass=MASS),
    "diagonal, GMRES": BDF(KRYLOV, TIGHT, mass=MASS),
    "operator, GMRES": BDF(KRYLOV, TIGHT, mass=lx.DiagonalLinearOperator(jnp.asarray(MASS))),
}


@ft.cache
def _error_at_order(name):
    """The error at t = 1 of steps of one size and order from exact differences."""
    solver = SOLVERS[name]

    def run(order, num_steps):
        h = 1.0 / num_steps
        past = jax.vmap(_exact)(-h * jnp.arange(6.0))
        rows = [past]
        for _ in range(5):
            rows.append(rows[-1][:-1] - rows[-1][1:])
        differences = jnp.stack([row[0] for row in rows[1:]])
        state = solver.init(TERM, 0.0, h, past[0], None)
        state = state._replace(h=jnp.asarray(h), order=order, differences=differences)

        def body(i, carry):
            y, state = carry
            t0 = i * h
            y, _, _, state, _ = solver.step(TERM, t0, t0 + h, y, None, state, False)
            return y, state._replace(order=order)

        y, _ = jax.lax.fori_loop(0, num_steps, body, (past[0], state))
        return jnp.abs(y - _exact(1.0))

    return jax.jit(run)


@pytest.mark.parametrize("order", range(1, 6))
@pytest.mark.parametrize(
    "name", ["diagonal, GMRES", slowly("diagonal, direct"), slowly("operator, GMRES")]
)
def test_order_for_index_one(name, order):
    """The full order in the differential and in the algebraic unknowns."""
    coarse = 40 if order < 5 else 24
    run, order = _error_at_order(name), jnp.asarray(order, jnp.int32)
    errors = [np.asarray(run(order, n)) for n in (coarse, 2 * coarse)]
    for i in (0, 2):
        assert abs(np.log2(errors[0][i] / errors[1][i]) - int(order)) < 0.4
    # The algebraic row holds at every step.
    assert errors[1][1] < errors[0][1]


# --- in diffeqsolve -----------------------------------------------------------------------------


def _robertson(t, y, args):
    del t, args
    r1, r2, r3 = 0.04 * y[0], 3e7 * y[1] ** 2, 1e4 * y[1] * y[2]
    return jnp.stack([r3 - r1, r1 - r3 - r2, y[0] + y[1] + y[2] - 1.0])


@pytest.mark.parametrize("solver", [BDF(DIRECT, mass=SEMI), BDF(KRYLOV, mass=SEMI)])
def test_rober_as_a_dae(solver):
    """The conserved sum in the place of the third equation; the end of the published solution."""
    rtol = 1e-6
    sol = jax.jit(
        lambda y0: dfx.diffeqsolve(
            dfx.ODETerm(_robertson),
            solver,
            0.0,
            1e11,
            None,
            y0,
            stepsize_controller=BDFController(rtol=rtol, atol=1e-6 * rtol),
            adjoint=dfx.ForwardMode(),
            max_steps=3000,
        )
    )(jnp.array([1.0, 0.0, 0.0]))
    assert sol.ys is not None
    ref = np.array([2.083340149701255e-08, 8.333360770334713e-14, 0.999999979166505])
    y = np.asarray(sol.ys[0])
    assert np.max(np.abs(y - ref) / (1e-6 * rtol + rtol * np.abs(ref))) < 20
    # To rounding, or to what a Krylov method leaves.
    assert abs(y.sum() - 1) < (1e-12 if solver.linear_solver is DIRECT else 1e-2 * rtol)
    # As the ordinary differential equation takes: 801 with SciPy's BDF.
    assert int(sol.stats["num_accepted_steps"]) <= 1.1 * 801


def _index_one(t, y, k):
    """`dense_steps.index_one`, with a parameter that is 1 there."""
    a, b, z = y
    return jnp.stack(
        [-k * a + z * b + jnp.sin(t), a * z - b**2 * jnp.cos(t), a * b + jnp.cos(t) - z - z**3 / 3]
    )


# Runs of equal steps, so that the order rises, and changes of the step size.
TIMES = jnp.cumsum(jnp.array([0.0, *[0.01] * 5, *[0.02] * 6, *[0.04] * 8, 0.05]))
GUESS = jnp.asarray(dense_steps.index_one().y0).at[2].set(0.1)


@ft.cache
def _compiled(krylov, kind):
    def loss(k, first, times, adjoint):
        """Through a consistent start, with the first entry of M."""
        mass = jnp.stack([first, jnp.ones_like(first), jnp.zeros_like(first)])
        y0 = consistent(_index_one, times[0], GUESS, k, mass=mass)
        sol = dfx.diffeqsolve(
            dfx.ODETerm(_index_one),
            BDF(KRYLOV if krylov else DIRECT, TIGHT, 1e-12, mass=mass),
            times[0],
            times[-1],
            None,
            y0,
            k,
            stepsize_controller=dfx.StepTo(times),
            max_steps=32,
            adjoint=adjoint,
        )
        assert sol.ys is not None
        return sol.ys[-1] @ jnp.arange(1.0, 4.0)

    if kind == "value":
        return jax.jit(lambda *at: loss(*at, dfx.ForwardMode()))
    if kind == "forward":
        fn = lambda *at: loss(*at, dfx.ForwardMode())
        return jax.jit(lambda at, d: jax.jvp(fn, at, d)[1])
    reverse = lambda *at: loss(*at, dfx.RecursiveCheckpointAdjoint())
    return jax.jit(jax.grad(reverse, argnums=(0, 1, 2)))


@pytest.mark.parametrize("krylov", [True, slowly(False)])
def test_gradient(krylov):
    """With respect to a parameter, an entry of M and the times, against differences."""
    at = jnp.asarray(1.0), jnp.asarray(1.2), TIMES
    found = _compiled(krylov, "reverse")(*at)
    value, forward = _compiled(krylov, "value"), _compiled(krylov, "forward")
    for direction in (
        (1.0, 0.0, 0.0 * TIMES),
        (0.0, 1.0, 0.0 * TIMES),
        (0.0, 0.0, 0.3 * TIMES + 0.1),
    ):
        direction = jax.tree.map(jnp.asarray, direction)
        moved = lambda s, d=direction: value(*(x + s * e for x, e in zip(at, d, strict=True)))
        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        dot = sum(jnp.sum(g * d) for g, d in zip(found, direction, strict=True))
        np.testing.assert_allclose(dot, slope, rtol=2e-7)
        np.testing.assert_allclose(forward(at, direction), dot, rtol=1e-9)


def test_a_regular_mass_matrix_is_its_inverse_on_the_right():
    """M y' = f and y' = M⁻¹ f on a tree, to the tolerance."""
    dense = jnp.array([[2.0, 0.3, 0.0], [0.1, 1.0, 0.2], [0.0, -0.4, 0.5]])
    packed = lambda v: {"a": v[:2], "b": v[2]}
    flat = lambda y: jnp.append(y["a"], y["b"])

    def f(t, y, args):
        v = flat(y)
        return packed(jnp.stack([-v[0] * v[1] + jnp.cos(t), v[0] - v[2] ** 2, -3 * v[2] + v[1]]))

    solved = lambda t, y, args: packed(jnp.linalg.solve(dense, flat(f(t, y, args))))
    y0 = {"a": jnp.array([0.3, 0.8]), "b": jnp.asarray(0.5)}
    structure = jax.eval_shape(lambda: y0)
    mass = lx.FunctionLinearOperator(lambda y: packed(dense @ flat(y)), structure)
    ends = []
    for g, m in ((f, mass), (solved, None)):
        sol = jax.jit(
            lambda y0, g=g, m=m: dfx.diffeqsolve(
                dfx.ODETerm(g),
                BDF(KRYLOV, mass=m),
                0.0,
                1.0,
                None,
                y0,
                stepsize_controller=BDFController(1e-7, 1e-7),
                adjoint=dfx.ForwardMode(),
                max_steps=500,
            )
        )(y0)
        ends.append(flat(jax.tree.map(lambda x: x[0], sol.ys)))
        assert int(sol.stats["num_accepted_steps"]) < 150
    np.testing.assert_allclose(*ends, rtol=3e-6)


def test_single_precision_lanes_and_an_inconsistent_start():
    """Each lane as if alone; where the algebraic equation does not hold it is no success."""
    single = lambda x: jnp.asarray(x, jnp.float32)

    def run(y0):
        return dfx.diffeqsolve(
            dfx.ODETerm(_index_one),
            BDF(KRYLOV, mass=SEMI.astype(np.float32)),
            single(0.0),
            single(1.0),
            single(0.01),
            y0,
            single(1.0),
            stepsize_controller=BDFController(1e-4, 1e-4, dtmin=1e-6),
            adjoint=dfx.ForwardMode(),
            max_steps=200,
            throw=False,
        )

    start = single(dense_steps.index_one().y0)
    starts = jnp.stack([start, start.at[2].add(0.5)])
    alone, together = jax.jit(run), jax.jit(jax.vmap(run))(starts)
    for i in range(2):
        sol = alone(starts[i])
        assert int(sol.stats["num_steps"]) == int(together.stats["num_steps"][i])
        np.testing.assert_allclose(sol.ys, together.ys[i], rtol=1e-5)
    np.testing.assert_allclose(together.ys[0, 0], dense_steps.index_one().solution, atol=2e-3)
    results = dfx.RESULTS.successful, dfx.RESULTS.dt_min_reached
    assert alone(starts[0]).result == results[0] and alone(starts[1]).result == results[1]
    assert together.ys.dtype == jnp.float32


# --- structure ----------------------------------------------------------------------------------


def test_rows_and_what_undoes_them():
    matrix = np.array([[2.0, 0.3, 0.0], [0.1, 1.0, 0.2], [0.0, -0.4, 0.5]])
    rows = row_weights(jnp.asarray(SEMI), jnp.ones(3), jnp.asarray(-0.25))
    assert rows is not None
    np.testing.assert_array_equal(rows, [1.0, 1.0, 4.0])
    full = np.diag([1.0, 1.0, 4.0])
    op = with_rows(lx.MatrixLinearOperator(jnp.asarray(matrix)), rows)
    inv = undone(lx.MatrixLinearOperator(jnp.asarray(np.linalg.inv(matrix))), rows)
    for found, wanted in ((op, full @ matrix), (inv, np.linalg.inv(full @ matrix))):
        for i, e in enumerate(jnp.eye(3)):
            np.testing.assert_allclose(found.mv(e), wanted[:, i], atol=1e-14)
            np.testing.assert_allclose(found.transpose().mv(e), wanted[i], atol=1e-14)
    identity = lx.IdentityLinearOperator(jax.ShapeDtypeStruct((3,), jnp.float64))
    assert undone(identity, rows) is identity
    assert row_weights(None, jnp.ones(3), jnp.asarray(1.0)) is None
    # No step, no division by zero.
    weights = row_weights(jnp.asarray(SEMI), jnp.ones(3), jnp.asarray(0.0))
    np.testing.assert_array_equal(weights, [1.0, 1.0, 1.0])


def test_no_square_matrix_with_a_krylov_method():
    n = 97
    mass = jnp.ones(n).at[-1].set(0.0)
    solver = BDF(nks.GMRES(restart=10), mass=mass)

    def field(t, y, rate):
        inner = rate * (jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1)) - y**3
        return inner.at[-1].set(jnp.sum(y) - jnp.cos(t))

    def loss(y0, rate):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            solver,
            0.0,
            1.0,
            None,
            y0,
            rate,
            stepsize_controller=BDFController(1e-5, 1e-5),
            max_steps=64,
        )
        return jnp.sum(sol.ys[-1])

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.linspace(0.0, 1.0, n), 2.0)
    assert not square_values(jaxpr, n)


def test_bad_masses():
    init = lambda mass, y: BDF(KRYLOV, TIGHT, mass=mass).init(TERM, 0.0, 1.0, y, None)
    with pytest.raises(ValueError, match="shape"):
        init(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="tree like the state"):
        init({"a": jnp.ones(3)}, jnp.ones(3))
    with pytest.raises(TypeError, match="`mass` is a constant matrix"):
        BDF(mass=lambda t, y: jnp.ones(3))
    with pytest.raises(ValueError, match="vectors like the state"):
        init(lx.IdentityLinearOperator(jax.ShapeDtypeStruct((2,), jnp.float64)), jnp.ones(3))
