"""Derivatives of BDF: those of the discrete equations and of the differences, matrix-free."""

import functools as ft

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.ode import SimplifiedNewton
from nksolve.ode.bdf import BDF, BDFController
from tests.helpers.jaxprs import square_values

N = 7  # prime: only an n × n value has two axes of it
TIGHT = SimplifiedNewton.alone(1e-10, 1e-10)
REVERSE = dfx.RecursiveCheckpointAdjoint()
SOLVERS = {
    "krylov": BDF(nks.GMRES(preconditioner=nks.Banded(1, 1)), TIGHT, 1e-12),
    "direct": BDF(nks.BandedDirect(lower=1, upper=1), TIGHT),
}


def _field(t, y, args):
    around = jnp.pad(y, 1)
    flux = 40.0 * args["d"] * (around[2:] - 2 * y + around[:-2])
    return flux - 10 * (y - jnp.cos(args["w"] * t)) * (1 + y**2)


# Runs of equal steps, so that the order rises, and changes of the step size.
TIMES = jnp.cumsum(jnp.array([0.0, *[0.004] * 5, *[0.006] * 6, *[0.01] * 8, 0.013]))
AT = (
    jnp.sin(jnp.linspace(0.0, 3.0, N)),
    {"d": jnp.asarray(1.3), "w": jnp.asarray(2.0)},
    TIMES,
)


def _loss(y0, args, times, *, solver, adjoint=REVERSE):
    sol = dfx.diffeqsolve(
        dfx.ODETerm(_field),
        solver,
        times[0],
        times[-1],
        None,
        y0,
        args,
        stepsize_controller=dfx.StepTo(times),
        max_steps=32,
        adjoint=adjoint,
        saveat=dfx.SaveAt(t1=True, solver_state=True),
    )
    value = jnp.sum(jnp.sin(sol.ys[-1]) * jnp.linspace(1.0, 2.0, N))
    return value, sol.solver_state.order


@ft.cache
def _compiled(name, kind):
    solver = SOLVERS[name]
    if kind == "value":
        return jax.jit(lambda *at: _loss(*at, solver=solver, adjoint=dfx.ForwardMode()))
    if kind == "forward":
        fn = lambda *at: _loss(*at, solver=solver, adjoint=dfx.ForwardMode())[0]
        return jax.jit(lambda at, d: jax.jvp(fn, at, d)[1])
    adjoint = REVERSE if kind == "reverse" else dfx.DirectAdjoint()
    fn = lambda *at: _loss(*at, solver=solver, adjoint=adjoint)[0]
    return jax.jit(jax.grad(fn, argnums=(0, 1, 2)))


def _direction(seed):
    rng = np.random.default_rng(seed)
    random = lambda x: jnp.asarray(rng.standard_normal(x.shape))
    y0, args, _ = AT
    # The times keep their order: they are stretched and moved.
    return random(y0), jax.tree.map(random, args), 0.3 * TIMES + 0.1


def _moved(s, direction):
    return jax.tree.map(lambda x, d: x + s * d, AT, direction)


@pytest.mark.parametrize("name", ["krylov", pytest.param("direct", marks=pytest.mark.slow)])
def test_gradients_on_given_steps_are_those_of_finite_differences(name):
    """With respect to the initial value, parameters and the times of the steps."""
    gradient = _compiled(name, "reverse")(*AT)
    forward, value = _compiled(name, "forward"), _compiled(name, "value")
    assert int(value(*AT)[1]) >= 3
    for seed in range(3):
        direction = _direction(seed)
        step = 1e-5
        ahead, behind = value(*_moved(step, direction))[0], value(*_moved(-step, direction))[0]
        slope = (ahead - behind) / (2 * step)
        dots = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
        found = sum(jax.tree.leaves(dots))
        np.testing.assert_allclose(found, slope, rtol=1e-6)
        np.testing.assert_allclose(forward(AT, direction), found, rtol=1e-9)


@pytest.mark.slow
def test_direct_adjoint_gives_the_same():
    for name in SOLVERS:
        found = _compiled(name, "direct adjoint")(*AT)
        wanted = _compiled(name, "reverse")(*AT)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, wanted
        )


@pytest.mark.slow
def test_second_derivatives_forward_over_reverse_and_over_forward():
    y0, args, times = AT
    solver = SOLVERS["krylov"]
    loss = lambda adjoint: (
        lambda d: _loss(y0, {**args, "d": d}, times, solver=solver, adjoint=adjoint)[0]
    )
    over_reverse = jax.jit(jax.jacfwd(jax.grad(loss(dfx.DirectAdjoint()))))(args["d"])
    over_forward = jax.jit(jax.jacfwd(jax.jacfwd(loss(dfx.ForwardMode()))))(args["d"])
    np.testing.assert_allclose(over_reverse, over_forward, rtol=1e-8)
    first = jax.jit(jax.jacfwd(loss(dfx.ForwardMode())))
    slope = (first(args["d"] + 1e-4) - first(args["d"] - 1e-4)) / 2e-4
    np.testing.assert_allclose(over_forward, slope, rtol=1e-5)


def _adaptive(y0, rate, *, adjoint=REVERSE, field, solver, rtol=1e-5, t1=1.0, dt0=None):
    sol = dfx.diffeqsolve(
        dfx.ODETerm(field),
        solver,
        0.0,
        t1,
        dt0,
        y0,
        rate,
        stepsize_controller=BDFController(rtol, rtol),
        max_steps=256,
        adjoint=adjoint,
    )
    return jnp.sum(sol.ys[-1]), sol.stats


def test_no_square_matrix_with_a_krylov_method():
    n = 97
    solver = BDF(
        nks.GMRES(
            preconditioner=nks.Jacobi(lambda y, stage: 1 + 3 * stage.gamma + 0 * y), restart=10
        )
    )
    field = lambda t, y, rate: rate * (jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1)) - y**3
    y0 = jnp.linspace(0.0, 1.0, n)
    loss = lambda y0, rate: _adaptive(y0, rate, field=field, solver=solver)[0]
    assert not square_values(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(y0, 2.0), n)


def test_a_rejected_step_with_nan_inside_and_lanes():
    """√y of a first step that overshoots to y < 0; y(t) = (1 − rate t/2)²."""

    def field(t, y, rate):
        del t
        return -rate * jnp.sqrt(y)

    solver = BDF(nks.BandedDirect(lower=0, upper=0))
    loss = lambda y0, rate: _adaptive(
        y0, rate, field=field, solver=solver, rtol=1e-7, t1=0.9, dt0=0.85
    )
    y0 = jnp.ones(1)
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    rates = jnp.array([2.0, 1.7])
    (values, stats), (dy, d_rate) = jax.jit(jax.vmap(gradient, (None, 0)))(y0, rates)
    assert np.all(stats["num_rejected_steps"] > 0)
    left = 1 - rates * 0.45
    np.testing.assert_allclose(values, left**2, atol=1e-5)
    np.testing.assert_allclose(d_rate, -0.9 * left, rtol=1e-3)
    np.testing.assert_allclose(dy[:, 0], left, rtol=1e-3)
    (value, _), alone = jax.jit(gradient)(y0, rates[1])
    np.testing.assert_allclose(value, values[1], rtol=1e-12)
    np.testing.assert_allclose(alone[1], d_rate[1], rtol=1e-9)
