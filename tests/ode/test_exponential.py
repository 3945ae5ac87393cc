"""Exponential Rosenbrock methods in Diffrax: order, exactness, stiff problems, derivatives."""

import functools as ft
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate as spi
import scipy.linalg as sla

from nksolve.ode import WithStats
from nksolve.ode.newton import SimplifiedNewton
from nksolve.ode.rosenbrock import Exprb32, Exprb43
from nksolve.ode.rosenbrock.exponential_krylov import propagated
from nksolve.ode.rosenbrock.phi import exponentials, first_columns
from nksolve.problems.stiff import brusselator_1d, hires
from tests.helpers import dense_steps, square_values

slowly = ft.partial(pytest.param, marks=pytest.mark.slow)
ALONE = SimplifiedNewton.alone(1e-11, 1e-11)
BOTH = [Exprb32, Exprb43]


# φ-functions of small matrices


@ft.cache
def _columns():
    return jax.jit(lambda a: (first_columns(a, 4), exponentials(a)))


def _padded(a):
    return jnp.zeros((12, 12)).at[: len(a), : len(a)].set(a)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 3e3])
def test_phi_functions(size):
    """Against SciPy; rows of zeros beyond the matrix change nothing, as of a space not full."""
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.standard_normal((7, 7)))
    a = q @ np.diag(-size * np.linspace(0.02, 1.0, 7)) @ q.T + 0.3 * rng.standard_normal((7, 7))
    table, (half, whole) = _columns()(_padded(a))
    np.testing.assert_allclose(whole[:7, :7], sla.expm(a), atol=1e-12)
    np.testing.assert_allclose(half[:7, :7], sla.expm(a / 2), atol=1e-12)
    for i, c in enumerate((0.5, 1.0)):
        for k in range(5):
            vectors = [np.eye(7)[0] * float(j == k) for j in range(1, 5)]
            value = dense_steps.phi_sum(c * a, vectors) if k else sla.expm(c * a)[:, 0]
            tolerance = 1e-12 * np.abs(value).max()
            np.testing.assert_allclose(table[i, k, :7], c**k * value, atol=tolerance)
    assert not np.any(table[:, :, 7:])


def test_exponentials_that_overflow_are_not_finite():
    for a in (1e4, np.inf, np.nan, -np.inf):
        table, _ = _columns()(_padded(np.array([[a]])))
        assert not np.all(np.isfinite(table))
    table, _ = _columns()(_padded(np.array([[-1e12]])))
    np.testing.assert_allclose(table[1, 1, 0], 1e-12, rtol=1e-4)


# Order and exactness


def _ring(t, y, args):
    """`dense_steps.ring`."""
    i = jnp.arange(6.0)
    ahead = jnp.roll(y, -1)
    return (
        args * (ahead + jnp.roll(y, 1) - 2.0 * y)
        + jnp.cos(t + i) * y * ahead
        + jnp.sin(2.0 * t + i)
        - y**3
    )


@pytest.mark.parametrize("solver_cls", BOTH)
def test_order(solver_cls):
    """At the end, inside the steps, and the same numbers as in dense NumPy."""
    solver, tableau, problem = solver_cls(root_finder=ALONE), solver_cls.tableau, dense_steps.ring()
    ts = jnp.array([0.137, 0.3721, 0.581, 0.7777, 0.93])

    @jax.jit
    def run(h):
        return dfx.diffeqsolve(
            dfx.ODETerm(_ring),
            solver,
            0.0,
            1.0,
            h,
            jnp.asarray(problem.y0),
            jnp.asarray(1.0),
            saveat=dfx.SaveAt(subs=[dfx.SubSaveAt(t1=True), dfx.SubSaveAt(ts=ts)]),
            max_steps=None,
        )

    reference = np.asarray(run(1 / 512).ys[1])
    ends, inside = [], []
    for count in (32, 64):
        end, dense = run(1 / count).ys
        ends.append(np.linalg.norm(np.asarray(end[0]) - problem.solution))
        inside.append(np.abs(np.asarray(dense) - reference).max())
    assert abs(np.log2(ends[0] / ends[1]) - tableau.order) < 0.2
    assert np.log2(inside[0] / inside[1]) > 2.7
    y = problem.y0
    for i in range(32):
        y = dense_steps.exponential_step(tableau, tableau.b, problem, i / 32, y, 1 / 32)
    np.testing.assert_allclose(run(1 / 32).ys[0][0], y, rtol=1e-11)


def _heat(t, u, args):
    """`dense_steps.heat`, whose solution is x(1 − x)eᵗ."""
    del args
    n = u.size
    x = jnp.arange(1.0, n + 1) / (n + 1)
    wide = jnp.concatenate([jnp.zeros(1), u, jnp.zeros(1)])
    exact = x * (1 - x) * jnp.exp(t)
    source = exact + 2 * jnp.exp(t) - 1 / (1 + exact**2)
    return (wide[2:] - 2 * u + wide[:-2]) * (n + 1) ** 2 + 1 / (1 + u**2) + source


@ft.cache
def _on_heat(solver):
    n = 40

    @jax.jit
    def run(h):
        y0 = jnp.arange(1.0, n + 1) / (n + 1)
        return dfx.diffeqsolve(
            dfx.ODETerm(_heat),
            solver,
            0.0,
            1.0,
            h,
            y0 * (1 - y0),
            saveat=dfx.SaveAt(t1=True, solver_state=True),
            max_steps=64,
            throw=False,
        )

    return run


@pytest.mark.parametrize("solver_cls", [slowly(Exprb32), Exprb43])
def test_order_where_it_is_stiff(solver_cls):
    """h‖J‖ = 420 and 210: no reduction, in spaces that are not full."""
    run = _on_heat(solver_cls(root_finder=SimplifiedNewton.alone(1e-10, 1e-10)))
    exact, errors = dense_steps.heat().solution, []
    for count in (16, 32):
        sol = run(1 / count)
        assert sol.result == dfx.RESULTS.successful
        assert sol.solver_state.work.num_matvecs < 39 * solver_cls.tableau.stages * count
        errors.append(np.linalg.norm(sol.ys[0] - exact))
    assert abs(np.log2(errors[0] / errors[1]) - solver_cls.tableau.order) < 0.2


def test_a_full_space_is_reported():
    """Twelve vectors for h‖J‖ = 6,700: constant steps fail; with a controller they get shorter."""
    finder = SimplifiedNewton.alone(1e-6, 1e-6)
    sol = _on_heat(Exprb43(max_dimension=12, root_finder=finder))(1.0)
    assert sol.result == dfx.RESULTS.nonlinear_divergence
    assert np.all(np.isfinite(sol.ys[0]))
    assert sol.solver_state.work.num_convergence_failures == 1


# Problems


@ft.cache
def _brusselator():
    problem = brusselator_1d(11)
    slope = jax.jit(lambda t, y: problem.fn(t, y.reshape(11, 2), problem.args).reshape(-1))
    done = spi.solve_ivp(
        slope, problem.span, problem.y0.reshape(-1), method="DOP853", rtol=1e-11, atol=1e-11
    )

    def run(solver, rtol):
        return dfx.diffeqsolve(
            dfx.ODETerm(problem.fn),
            solver,
            *problem.span,
            None,
            problem.y0,
            problem.args,
            stepsize_controller=dfx.PIDController(rtol=rtol, atol=rtol),
            adjoint=WithStats(),
            max_steps=2000,
        )

    return run, done.y[:, -1].reshape(11, 2)


@pytest.mark.parametrize("max_dimension", [40, 6])
def test_brusselator(max_dimension):
    """With as many vectors as there are unknowns, and with six, which hold the steps down."""
    run, reference = _brusselator()
    solver = Exprb43(max_dimension=max_dimension)
    solve = jax.jit(ft.partial(run, solver))
    for rtol in (1e-4, 1e-6):
        sol = solve(rtol)
        assert np.max(np.abs(sol.ys[0] - reference) / (rtol + rtol * np.abs(reference))) < 5
        stats = sol.stats
        assert stats["num_linearisations"] == stats["num_steps"]
        assert stats["num_fn_evals"] == 4 * stats["num_steps"]
        assert stats["num_rejected_steps"] < 0.3 * stats["num_steps"]
        if max_dimension == 6:
            assert stats["num_matvecs"] <= (1 + 3 * (6 + 1)) * stats["num_steps"]


@pytest.mark.slow
@pytest.mark.parametrize("solver_cls", BOTH)
def test_hires(solver_cls):
    problem = hires()

    @jax.jit
    def run(rtol):
        return dfx.diffeqsolve(
            dfx.ODETerm(problem.fn),
            solver_cls(),
            *problem.span,
            None,
            problem.y0,
            problem.args,
            stepsize_controller=dfx.PIDController(rtol=rtol, atol=1e-4 * rtol),
            max_steps=4000,
        )

    for rtol in (1e-4, 1e-6):
        weights = 1e-4 * rtol + rtol * np.abs(problem.end)
        assert np.max(np.abs(run(rtol).ys[0] - problem.end) / weights) < 20


# Derivatives


N = 7
ARGS = (jnp.asarray(0.7), jnp.linspace(0.5, 1.5, N))
Y0 = jnp.sin(jnp.pi * jnp.arange(1.0, N + 1) / (N + 1))  # an eigenvector of the diffusion
DIRECTION = ((jnp.asarray(0.3), jnp.cos(jnp.arange(float(N)))), jnp.cos(2.0 * jnp.arange(float(N))))
FINE = SimplifiedNewton.alone(1e-9, 1e-9)
CHECKPOINTS = dfx.RecursiveCheckpointAdjoint(checkpoints=8)


def _diffusion(t, y, args):
    k, w = args
    wide = jnp.concatenate([jnp.zeros(1), y, jnp.zeros(1)])
    flux = k * (wide[2:] - 2 * y + wide[:-2]) * (y.size + 1) ** 2
    return flux + jnp.tanh(w * y * jnp.sin(3 * t)) + w * y**2 + jnp.cos(5 * t)


def _loss(solver, adjoint, args, y0):
    sol = dfx.diffeqsolve(
        dfx.ODETerm(_diffusion),
        solver,
        0.0,
        0.5,
        0.125,
        y0,
        args,
        adjoint=adjoint,
        saveat=dfx.SaveAt(ts=jnp.array([0.3, 0.5])),
        max_steps=8,
    )
    assert sol.ys is not None
    return jnp.sum(sol.ys**2 * jnp.arange(1.0, N + 1)[None])


@ft.cache
def _traced(solver):
    program = jax.jit(jax.grad(ft.partial(_loss, solver, CHECKPOINTS), argnums=(0, 1)))
    return program.trace(ARGS, Y0)


@ft.cache
def _gradient(solver):
    return _traced(solver).lower().compile()


def _dot(a, b):
    return sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _moved(e):
    return jax.tree.map(lambda x, d: x + e * d, (ARGS, Y0), DIRECTION)


@pytest.mark.parametrize("solver_cls", [slowly(Exprb32), Exprb43])
def test_gradient(solver_cls):
    """Against differences and forward mode, at a step that begins in a space of few vectors."""
    solver = solver_cls(root_finder=FINE)
    forward = jax.jit(
        lambda x: jax.jvp(lambda x: _loss(solver, dfx.ForwardMode(), *x), (x,), (DIRECTION,))
    )
    found, e = _dot(_gradient(solver)(ARGS, Y0), DIRECTION), 1e-5
    difference = (forward(_moved(e))[0] - forward(_moved(-e))[0]) / (2 * e)
    np.testing.assert_allclose(found, difference, rtol=1e-8)
    np.testing.assert_allclose(forward(_moved(0.0))[1], difference, rtol=1e-8)
    assert not square_values(_traced(solver).jaxpr, N)


def test_exponential_in_parts():
    """exp(A) v where five vectors do not reach over the interval, in lanes, one of them zero."""
    a = np.array(dense_steps.heat(7).jacobian(0.0, np.zeros(7)))
    visit = lambda carry, space, left: carry + space.span

    def run(v):
        mv = lambda x: jnp.asarray(a) @ x
        return propagated(
            mv, v, jnp.asarray(0.5), visit, jnp.zeros(()), size=5, rtol=jnp.asarray(1e-7)
        )

    vs = np.stack([np.ones(7), np.zeros(7), np.eye(7)[2]])
    found, covered = jax.jit(jax.vmap(run))(jnp.asarray(vs))
    np.testing.assert_allclose(found, vs @ sla.expm(0.5 * a).T, atol=1e-6)
    np.testing.assert_allclose(covered, [0.5, 0.0, 0.5])


def test_gradient_in_parts():
    """Where four vectors do not reach over a step for derivatives, they take it in parts; against
    differences of the dense step."""
    solver = Exprb32(
        max_dimension=4, root_finder=SimplifiedNewton.alone(1e-5, 1e-5), adjoint_rtol=1e-10
    )
    problem, h, e = dense_steps.ring(), 0.05, 1e-5
    step = ft.partial(
        dense_steps.exponential_step, solver.tableau, solver.tableau.b, problem, 0.0, h=h
    )
    run = lambda y: _step(solver, _ring, y, h, jnp.asarray(1.0))[0]
    direction = np.cos(np.arange(6.0))
    program = jax.jit(lambda y, d: (jax.jvp(run, (y,), (d,)), jax.vjp(run, y)[1](d)[0]))
    (y1, forward), reverse = program(jnp.asarray(problem.y0), jnp.asarray(direction))
    np.testing.assert_allclose(y1, step(problem.y0), rtol=1e-6)
    column = lambda d: (step(problem.y0 + e * d) - step(problem.y0 - e * d)) / (2 * e)
    jacobian = np.stack([column(d) for d in np.eye(6)], axis=1)
    np.testing.assert_allclose(forward, jacobian @ direction, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reverse, jacobian.T @ direction, rtol=1e-5, atol=1e-6)


def test_second_derivatives_are_refused():
    run = lambda y: jnp.sum(_step(Exprb32(root_finder=FINE), _ring, y, 0.1, jnp.asarray(1.0))[0])
    hessian = lambda y: jax.jvp(jax.grad(run), (y,), (y,))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.eval_shape(hessian, jnp.ones(6))


@pytest.mark.slow
def test_direct_adjoint_and_vmap():
    solver = Exprb43(root_finder=FINE)
    direct = jax.jit(jax.grad(ft.partial(_loss, solver, dfx.DirectAdjoint())))(ARGS, Y0)
    alone = [_gradient(solver)(ARGS, y0) for y0 in (Y0, 0.3 * Y0 + 0.1)]
    gradient = jax.grad(ft.partial(_loss, solver, CHECKPOINTS), argnums=(0, 1))
    batched = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))
    lanes = batched(ARGS, jnp.stack([Y0, 0.3 * Y0 + 0.1]))
    close = ft.partial(np.testing.assert_allclose, rtol=1e-9)
    jax.tree.map(close, direct, alone[0][0])
    for i in range(2):
        jax.tree.map(close, jax.tree.map(lambda x, i=i: x[i], lanes), alone[i])


# Rejections, batches, states


def _drain(t, y, k):
    """y' = −k √y, whose steps that are too long meet the root of a negative number."""
    return jax.tree.map(lambda x: -k * jnp.sqrt(x), y)


@ft.cache
def _drained():
    def end(k, y0):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(_drain),
            Exprb43(),
            0.0,
            1.0,
            8.0,
            y0,
            k,
            stepsize_controller=dfx.PIDController(rtol=1e-8, atol=1e-10),
            saveat=dfx.SaveAt(t1=True, solver_state=True),
            max_steps=256,
        )
        assert sol.ys is not None
        return sol.ys[-1][0], (sol.stats, sol.solver_state)

    lane = jax.value_and_grad(end, argnums=(0, 1), has_aux=True)
    return jax.jit(lane), jax.jit(jax.vmap(end))


def test_rejected_steps_with_nan_and_lanes():
    """√y = √y0 − kt/2, and its derivatives, after rejected steps that were no numbers; n = 1. Lanes
    are as if alone."""
    alone, batched = _drained()
    ks, y0s = jnp.array([1.6, 0.3]), jnp.array([[1.0], [2.0]])
    values, (stats, state) = batched(ks, y0s)
    for i in range(2):
        (value, (one, its)), (dk, dy0) = alone(ks[i], y0s[i])
        root = np.sqrt(y0s[i, 0]) - ks[i] / 2
        np.testing.assert_allclose(value, root**2, rtol=1e-5)
        np.testing.assert_allclose(dk, -root, rtol=1e-5)
        np.testing.assert_allclose(dy0[0], root / np.sqrt(y0s[i, 0]), rtol=1e-5)
        np.testing.assert_allclose(values[i], value, rtol=1e-12)
        assert one["num_rejected_steps"] > 0
        assert stats["num_accepted_steps"][i] == one["num_accepted_steps"]
        assert its.work.num_linearisations == one["num_accepted_steps"]
        assert its.work.num_fn_evals == 4 * one["num_accepted_steps"]
        assert its.work.num_convergence_failures == 0  # the state of a rejected step is gone
        assert state.work.num_matvecs[i] == its.work.num_matvecs


def _step(solver, f, y0, h: Any = 0.1, args=None):
    terms = dfx.ODETerm(f)
    dtype = jax.tree.leaves(y0)[0].real.dtype
    t0, t1 = jnp.zeros((), dtype), jnp.asarray(h, dtype)
    state = solver.init(terms, t0, t1, y0, args)
    return solver.step(terms, t0, t1, y0, args, state, jnp.array(False))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex128, slowly(jnp.float64)])
def test_linear_problems_are_solved_exactly(dtype):
    """y' = Ay + b + ct for a tree: y1 by dense algebra, the error estimate zero; a stiff A, and the
    derivative with respect to y0, which is exp(hA)."""
    single = dtype == jnp.float32
    solver = Exprb43(root_finder=SimplifiedNewton.alone(*((1e-5,) * 2 if single else (1e-10,) * 2)))
    y0 = {"a": jnp.asarray([1.0, -0.5], dtype), "b": jnp.asarray([[0.25]], dtype)}
    factor = 1.0 + 2.0j if dtype == jnp.complex128 else 1.0
    matrix = factor * np.array([[-200.0, 1.0, 3.0], [2.0, -1.0, 0.5], [0.0, 0.4, -7.0]])
    b, c = factor * np.array([1.0, 2.0, -1.0]), factor * np.array([0.5, -1.0, 2.0])

    def flat(y):
        return jnp.append(y["a"], y["b"].reshape(-1))

    def like(v):
        return {"a": v[:2], "b": v[2:].reshape(1, 1)}

    def f(t, y, args):
        del args
        return like(
            jnp.asarray(matrix, dtype) @ flat(y)
            + jnp.asarray(b, dtype)
            + t.astype(dtype) * jnp.asarray(c, dtype)
        )

    d = {"a": jnp.asarray([0.0, 1.0], dtype), "b": jnp.asarray([[0.5]], dtype)}

    run = lambda y0: _step(solver, f, y0)
    (y1, error, dense, _, result), (dy1, *_) = eqx.filter_jit(
        lambda y0: eqx.filter_jvp(run, (y0,), (d,))
    )(y0)
    assert result == dfx.RESULTS.successful
    assert y1["a"].dtype == dtype
    big = np.zeros((5, 5), complex)
    big[:3, :3], big[:3, 3], big[:3, 4], big[4, 3] = matrix, b, c, 1.0
    exact = sla.expm(0.1 * big) @ np.concatenate([np.asarray(flat(y0)), [1.0, 0.0]])
    tolerance = 2e-5 if single else 1e-11
    np.testing.assert_allclose(flat(y1), exact[:3], atol=tolerance)
    np.testing.assert_allclose(flat(error), np.zeros(3), atol=tolerance)
    exponential = sla.expm(0.1 * matrix) @ np.asarray(flat(d))
    np.testing.assert_allclose(flat(dy1), exponential, atol=10 * tolerance)
    t0, t1 = jnp.asarray([0.0, 0.1], y0["a"].real.dtype)
    path = solver.interpolation_cls(t0=t0, t1=t1, **dense)
    middle = sla.expm(0.05 * big) @ np.concatenate([np.asarray(flat(y0)), [1.0, 0.0]])
    times = ((t0, np.asarray(flat(y0))), (t0 + (t1 - t0) / 2, middle[:3]), (t1, exact[:3]))
    for t, expected in times:
        np.testing.assert_allclose(flat(path.evaluate(t)), expected, atol=tolerance)


def test_failures_and_steps_of_no_length():
    run = eqx.filter_jit(ft.partial(_step, Exprb32(root_finder=ALONE)))
    f = lambda t, y, args: jnp.where(y > args, jnp.nan, 1.0 + y)
    y0 = jnp.array([1.0, 2.0])
    y1, error, dense, state, result = run(f, y0, 0.1, 2.05)
    assert result == dfx.RESULTS.nonlinear_divergence
    assert np.all(np.isinf(error))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((y1, dense)))
    assert state.work.num_convergence_failures == 1
    y1, error, _, _, result = run(f, y0, 0.0, 9.0)
    assert result == dfx.RESULTS.successful
    np.testing.assert_array_equal(y1, y0)
    np.testing.assert_array_equal(error, jnp.zeros(2))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="max_dimension"):
        Exprb32(max_dimension=0)
    with pytest.raises(ValueError, match=r"SimplifiedNewton\.alone"):
        _step(Exprb32(), _drain, jnp.ones(2), 0.1, 1.0)
    with pytest.raises(TypeError, match="floating-point"):
        _step(Exprb32(root_finder=ALONE), _drain, jnp.ones(2, int), 0.1, 1.0)
    assert Exprb32().order(None) == 3
    assert Exprb43().error_order(None) == 4.0
