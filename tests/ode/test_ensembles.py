"""Many parameter sets: lanes with steps of their own, and one block-diagonal system."""

import functools as ft

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
import nksolve.ode as ode
from nksolve.problems.stiff import STIFF

PROBLEM = STIFF["rober"]()
LANES = 8
# Each rate within a factor of ten of the usual: lanes that want different steps.
SPREAD = 10.0 ** np.random.default_rng(5).uniform(-1.0, 1.0, (LANES, 3))
RATES = PROBLEM.args[None] * jnp.asarray(SPREAD)
STARTS = jnp.tile(PROBLEM.y0, (LANES, 1))
ATOL = PROBLEM.atol_factor
COUNTS = ("num_steps", "num_rejected_steps", *ode.Work._fields)


def _solve(fn, solver, y0, rates, rtol, norm=optx.rms_norm):
    return dfx.diffeqsolve(
        dfx.ODETerm(fn),
        solver,
        0.0,
        1e4,
        1e-4,
        y0,
        rates,
        stepsize_controller=dfx.PIDController(rtol=rtol, atol=rtol * ATOL, norm=norm),
        adjoint=ode.WithStats(dfx.ForwardMode()),
        max_steps=20_000,
        throw=False,
    )


@ft.cache
def _lane(method):
    solver = method(nks.BandedDirect(block=3))
    return lambda rates, rtol: _solve(PROBLEM.fn, solver, PROBLEM.y0, rates, rtol)


@ft.cache
def _alone(method):
    return jax.jit(_lane(method))


@ft.cache
def _vmapped(method):
    return jax.jit(jax.vmap(_lane(method), in_axes=(0, None)))


@ft.cache
def _exact():
    return np.stack([_alone(ode.Rodas5P)(k, 1e-9).ys[-1] for k in RATES])


def _error(ys, rtol):
    """The largest weighted error of each lane."""
    exact = _exact()
    return np.max(np.abs(np.asarray(ys) - exact) / (rtol * (ATOL + np.abs(exact))), axis=1)


METHODS = [ode.Rodas5P, *(pytest.param(m, marks=pytest.mark.slow) for m in (ode.Kvaerno5, ode.BDF))]


@pytest.mark.parametrize("method", METHODS)
def test_lanes_are_as_if_alone(method):
    rtol = 1e-5
    together = _vmapped(method)(RATES, rtol)
    assert np.all(together.result == dfx.RESULTS.successful)
    for i, rates in enumerate(RATES):
        single = _alone(method)(rates, rtol)
        assert single.result == dfx.RESULTS.successful
        for name in COUNTS:
            assert together.stats[name][i] == single.stats[name], name
        np.testing.assert_allclose(together.ys[i], single.ys, rtol=1e-7)
    print(method.__name__, {n: np.asarray(together.stats[n]).tolist() for n in COUNTS})
    assert len(set(np.asarray(together.stats["num_steps"]).tolist())) > LANES // 2
    assert _error(together.ys[:, -1], rtol).max() < 20


def _worst_lane(y):
    return jnp.max(jax.vmap(optx.rms_norm)(y))


BLOCKS = nks.GMRES(preconditioner=nks.BlockJacobi(coupling=0))
STACKED = {
    "blocks": (ode.Kvaerno5(BLOCKS), _worst_lane),
    "blocks, anew": (
        ode.Kvaerno5(nks.GMRES(preconditioner=nks.Lagged(nks.BlockJacobi(coupling=0), max_age=1))),
        _worst_lane,
    ),
    "blocks, mean norm": (ode.Kvaerno5(BLOCKS), optx.rms_norm),
    "none": (ode.Kvaerno5(nks.GMRES()), _worst_lane),
    "direct": (ode.Kvaerno5(nks.BandedDirect(block=3)), _worst_lane),
    "Rodas5P, direct": (ode.Rodas5P(nks.BandedDirect(block=3)), _worst_lane),
}


@ft.cache
def _stacked(name):
    """One system of 24 unknowns with a Jacobian of 8 blocks."""
    solver, norm = STACKED[name]
    fn = jax.vmap(PROBLEM.fn, in_axes=(None, 0, 0))
    return jax.jit(lambda rates, rtol: _solve(fn, solver, STARTS, rates, rtol, norm))


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in STACKED if n not in ("blocks", "none")]


@pytest.mark.parametrize("name", ["blocks", *SLOW])
def test_one_block_diagonal_system(name):
    rtol = 1e-5
    sol = _stacked(name)(RATES, rtol)
    counts = {key: int(sol.stats[key]) for key in COUNTS}
    errors = _error(sol.ys[-1], rtol)
    print(name, counts, "errors", errors.round(2))
    assert sol.result == dfx.RESULTS.successful
    assert errors.max() < 20
    assert counts["num_linearisations"] == counts["num_steps"]
    if name.startswith("blocks"):
        # The blocks are the matrix but for what h γ has changed since they were made.
        assert counts["num_matvecs"] <= 4 * counts["num_newton_steps"]
    if name == "blocks, anew":
        assert counts["num_matvecs"] == counts["num_newton_steps"]


@pytest.mark.slow
def test_the_lanes_set_the_step_of_the_system():
    """The system takes at least about as many steps as its dearest lane."""
    rtol = 1e-5
    stats = _vmapped(ode.Kvaerno5)(RATES, rtol).stats
    print({name: np.asarray(stats[name]).tolist() for name in COUNTS})
    lanes = np.asarray(stats["num_accepted_steps"])
    system = int(_stacked("direct")(RATES, rtol).stats["num_accepted_steps"])
    assert 0.8 * lanes.max() <= system <= 3 * lanes.max()
