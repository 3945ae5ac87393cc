"""BDF with other linear solvers and preconditioners, events, statistics, restarts, small states."""

import functools as ft

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
import scipy.integrate as spi

import nksolve as nks
from nksolve.ode.bdf import BDF, BDFController
from nksolve.ode.newton import SimplifiedNewton
from nksolve.ode.stats import WithStats
from nksolve.ode.work import Work
from nksolve.precondition.base import AbstractPreconditioner
from tests.helpers.counting import Counter

COUNTER = Counter()
TIGHT = SimplifiedNewton.alone(1e-10, 1e-10)


# --- linear solvers and preconditioners ---------------------------------------------------------

N = 11
ROUND = jnp.arange(float(N))


def _ring(t, y, rate):
    """Diffusion and a reaction on a ring, which is no band."""
    flux = rate * (jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1))
    return flux + jnp.cos(t + ROUND) - 3 * y**3


def _counted(t, y, rate):
    return _ring(t, COUNTER.tick(y), rate)


START = jnp.sin(1.0 + ROUND)


@ft.cache
def _solved_ring(linear_solver, field=_ring):
    """y(2), the accepted steps' work and what was kept, by rate."""

    @jax.jit
    def run(rate):
        return dfx.diffeqsolve(
            dfx.ODETerm(field),
            BDF(linear_solver),
            0.0,
            2.0,
            0.5,  # too long
            START,
            rate,
            stepsize_controller=BDFController(1e-6, 1e-6),
            adjoint=WithStats(dfx.ForwardMode()),
            saveat=dfx.SaveAt(t1=True, solver_state=True),
            max_steps=400,
        )

    return run


@ft.cache
def _exact_ring(rate):
    field = lambda t, y: (
        rate * (np.roll(y, 1) - 2 * y + np.roll(y, -1)) + np.cos(t + np.arange(N)) - 3 * y**3
    )
    done = spi.solve_ivp(field, (0.0, 2.0), np.asarray(START), "Radau", rtol=1e-10, atol=1e-11)
    return done.y[:, -1]


RATES = (20.0, 300.0)


def _diagonal(y, stage):
    """W's diagonal."""
    return 1 + stage.gamma * (2 * stage.args + 9 * y**2)


class Counted(AbstractPreconditioner):
    """W's diagonal, and how often it was updated."""

    def init(self, operator, y, args):
        return _diagonal(y, args), jnp.zeros((), jnp.int32)

    def update(self, state, operator, y, args):
        return _diagonal(y, args), state[1] + 1

    def as_operator(self, state):
        return lx.DiagonalLinearOperator(1 / state[0])


def _krylov(preconditioner):
    return nks.GMRES(restart=N, preconditioner=preconditioner)


JACOBI = nks.Jacobi(_diagonal)
LINEAR = {
    "SparseDirect": nks.SparseDirect(),
    "Jacobi": _krylov(JACOBI),
    "every third": _krylov(nks.Lagged(JACOBI, max_age=3)),
    "for ever": _krylov(nks.Lagged(JACOBI)),
    "by growth": _krylov(nks.Lagged(JACOBI, growth=1.2)),
    "own update": _krylov(Counted()),
}


SLOW = ("for ever", "by growth")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LINEAR]
)
def test_linear_solvers_and_what_is_kept(name):
    rate = RATES[1]
    sol = _solved_ring(LINEAR[name])(rate)
    np.testing.assert_allclose(sol.ys[0], _exact_ring(rate), atol=3e-5)
    stats = {key: int(count) for key, count in sol.stats.items()}
    taken, work = stats["num_accepted_steps"], sol.solver_state.work
    attempts = taken + stats["num_rejected_steps"]
    updates = int(work.num_preconditioner_updates)
    assert stats["num_rejected_steps"] > 0 and taken < 150
    if name == "SparseDirect":
        assert stats["num_linearisations"] == stats["num_preconditioner_updates"] < 0.6 * taken
        return
    assert stats["num_linearisations"] == attempts
    if name == "Jacobi":
        assert 1 < updates < 0.35 * taken
    elif name == "every third":
        assert updates == -(-taken // 3)
    elif name == "for ever":
        assert updates == 1
    elif name == "by growth":
        assert 1 < updates < taken
    elif name == "own update":
        assert updates == taken
        (count,) = [x for x in sol.solver_state.kept if x.dtype == jnp.int32]
        assert int(count) == taken - 1


FULL_BAND = nks.BandedDirect(lower=N - 1, upper=N - 1)


@pytest.mark.parametrize("direct", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_statistics_are_what_ran(direct):
    run = _solved_ring(FULL_BAND if direct else LINEAR["Jacobi"], _counted)
    run(RATES[1])
    with COUNTER.measure() as count:
        sol = run(RATES[1])
    stats = {name: int(number) for name, number in sol.stats.items()}
    assert count.primal == stats["num_fn_evals"]
    # Of accepted steps there is less.
    assert int(sol.solver_state.work.num_newton_steps) < stats["num_newton_steps"]
    if direct:
        return
    assert count.tangent == stats["num_matvecs"]
    # An evaluation a step and little more: the linearisation is at the first iterate.
    attempts = stats["num_accepted_steps"] + stats["num_rejected_steps"]
    assert attempts < stats["num_fn_evals"] <= 1.3 * attempts


def test_lanes_with_a_krylov_method_as_if_alone():
    run = _solved_ring(LINEAR["Jacobi"])
    together = jax.jit(jax.vmap(run))(jnp.array(RATES))
    for i, rate in enumerate(RATES):
        sol = run(rate)
        np.testing.assert_allclose(together.ys[i], sol.ys, rtol=1e-11)
        for name in (*Work._fields, "num_accepted_steps", "num_rejected_steps"):
            assert int(together.stats[name][i]) == int(sol.stats[name]), name


# --- events -------------------------------------------------------------------------------------


def _towards(t, y, level):
    """u goes to the level in times of 1, v follows it at once."""
    del t
    return jnp.stack([level - y[0], 1e4 * (y[0] - y[1])])


def _until(u0, level):
    crossing = lambda t, y, args, **_: y[0] - 0.5
    sol = dfx.diffeqsolve(
        dfx.ODETerm(_towards),
        BDF(nks.BandedDirect(lower=1, upper=1)),
        0.0,
        100.0,
        None,
        jnp.stack([u0, u0]),
        level,
        stepsize_controller=BDFController(1e-8, 1e-8),
        event=dfx.Event(
            [dfx.steady_state_event(rtol=1e-4, atol=1e-4), crossing], optx.Newton(1e-10, 1e-10)
        ),
        max_steps=500,
    )
    assert sol.ts is not None and sol.ys is not None
    return sol.ts[-1], (sol.ys[-1], sol.event_mask, sol.result == dfx.RESULTS.event_occurred)


def test_events_and_the_gradient_of_their_time():
    run = jax.jit(jax.value_and_grad(_until, argnums=(0, 1), has_aux=True))
    (time, (y, mask, occurred)), slope = run(1.0, 0.0)
    assert bool(occurred) and [bool(m) for m in mask] == [False, True]
    np.testing.assert_allclose(time, np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(y, 0.5, rtol=1e-3)
    np.testing.assert_allclose(y[0], 0.5, rtol=1e-7)
    # t = log((u0 − level)/(1/2 − level))
    np.testing.assert_allclose(slope, (1.0, 1.0), rtol=1e-4)
    # Never at 1/2, but at rest in the end: |f| < 1e-4 (1 + |y|).
    (time, (y, mask, occurred)), _ = run(1.0, 0.8)
    assert bool(occurred) and [bool(m) for m in mask] == [True, False]
    assert 4.0 < float(time) < 10.0
    np.testing.assert_allclose(y, 0.8, atol=1e-3)


# --- restarts, lengths and sizes ----------------------------------------------------------------


def _leg(y0, times, state, jump):
    return dfx.diffeqsolve(
        dfx.ODETerm(_ring),
        BDF(LINEAR["Jacobi"], TIGHT),
        times[0],
        times[-1],
        None,
        y0,
        jnp.asarray(20.0),
        stepsize_controller=dfx.StepTo(times),
        adjoint=dfx.ForwardMode(),
        saveat=dfx.SaveAt(t1=True, solver_state=True, made_jump=True),
        max_steps=32,
        solver_state=state,
        made_jump=jump,
    )


def test_a_solve_goes_on_from_a_saved_state():
    """As if it had never been interrupted; after a jump, as if nothing were known."""
    times = 0.01 * jnp.arange(25.0)
    leg = eqx.filter_jit(_leg)
    whole = leg(START, times, None, None)
    first = leg(START, times[:13], None, None)
    assert int(first.solver_state.order) > 1
    second = leg(first.ys[-1], times[12:], first.solver_state, first.made_jump)
    np.testing.assert_allclose(second.ys, whole.ys, rtol=1e-12)
    for a, b in zip(second.solver_state.work, whole.solver_state.work, strict=True):
        assert int(a) == int(b)
    jumped = leg(first.ys[-1], times[12:], first.solver_state, jnp.array(True))
    fresh = leg(first.ys[-1], times[12:], None, None)
    np.testing.assert_allclose(jumped.ys, fresh.ys, rtol=1e-12)
    assert np.abs(jumped.ys - whole.ys).max() > 1e-9


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_unknown_and_no_time(shape):
    """The default linear solver; where the ends of the span agree nothing happens."""

    @jax.jit
    def run(t1):
        return dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -50.0 * (y - jnp.cos(t))),
            BDF(),
            0.0,
            t1,
            None,
            jnp.ones(shape),
            stepsize_controller=BDFController(1e-6, 1e-6),
            adjoint=WithStats(dfx.ForwardMode()),
            saveat=dfx.SaveAt(t0=True, t1=True),
            max_steps=200,
        )

    sol = run(1.0)
    # y' = −50 (y − cos t) from 1: slow part (2500 cos t + 50 sin t)/2501.
    exact = (2500 * np.cos(1.0) + 50 * np.sin(1.0)) / 2501
    np.testing.assert_allclose(sol.ys[-1], np.full(shape, exact), rtol=1e-5)
    still = run(0.0)
    assert still.result == dfx.RESULTS.successful
    np.testing.assert_array_equal(still.ys, np.ones((2, *shape)))
    assert all(int(still.stats[name]) == 0 for name in ("num_steps", "num_newton_steps"))
