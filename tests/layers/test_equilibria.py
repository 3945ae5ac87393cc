"""Which solver finds the root of which cell: spectra and contractions as stated."""

import functools as ft

import equinox as eqx
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks
from nksolve.accelerate.anderson import Anderson
from nksolve.accelerate.picard import Picard
from nksolve.verbs.fixed_point import fixed_point
from tests.helpers.cells import tanh_cell

D, TOL = 64, 1e-10
CASES = [(s, r) for s in ("near_symmetric", "outliers", "disc") for r in (0.5, 0.9, 0.99)]
CASES += [("ginibre", 0.5), ("monotone", 1.5)]
SOLVERS = {
    "newton": nks.NewtonKrylov(0.0, TOL),
    "picard": Picard(0.0, TOL),
    "anderson": Anderson(0.0, TOL),
}


@ft.cache
def _solve(name):
    return eqx.filter_jit(
        lambda case: fixed_point(
            case.cell, SOLVERS[name], case.z0, case.x, max_steps=3000, throw=False
        )
    )


def _found(case, sol):
    if sol.result != optx.RESULTS.successful:
        return False
    residual = np.linalg.norm(case.cell(sol.value, case.x) - sol.value)
    assert residual <= 1.01 * TOL
    # ‖(I − J)⁻¹‖ of a normal J at distance 1 − ρ from 1, times a little for the non-normal one.
    room = 10 / (1 - case.rho) if case.rho < 1 else 10
    np.testing.assert_allclose(sol.value, case.root, rtol=0, atol=room * TOL)
    return True


@pytest.mark.parametrize(("spectrum", "rho"), CASES)
def test_who_converges(spectrum, rho):
    case = tanh_cell(spectrum, D, rho)
    newton, picard, anderson = (_solve(name)(case) for name in SOLVERS)
    assert _found(case, newton)
    assert int(newton.stats["num_linearisations"]) <= 8
    assert _found(case, picard) == (rho < 1)
    assert _found(case, anderson)
    work = int(newton.stats["num_fn_evals"]) + int(newton.stats["num_matvecs"])
    evaluations = int(picard.stats["num_fn_evals"])
    if rho < 1:
        # Once the slowest mode is left each step gains a factor ρ.
        expected = np.log(TOL) / np.log(rho)
        assert 0.6 * expected < evaluations < 1.4 * expected
        assert int(anderson.stats["num_fn_evals"]) < evaluations
    if rho == 0.99:
        assert 10 * work < evaluations
    if rho == 0.5:
        assert work > int(anderson.stats["num_fn_evals"])
