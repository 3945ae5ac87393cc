"""Every reason for which a solve stops, each provoked, and what is returned then."""

import re

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import nksolve as nks

from .solving import SUCCESS, assert_honest, reason, rows, run, trials, two_norm


def _squares(y):
    return y**2 - 2


def _singular(y):
    return jnp.stack([y[0] ** 2 + 1, 0 * y[1] + 1])


def _wrong_jacobian(y):  # 3 − y with the Jacobian +1
    return 3 - y + 2 * (y - lax.stop_gradient(y))


def _cycling(y):  # full Newton steps from 0 go to 1 and back
    return y**3 - 2 * y + 2


def _logarithm(y):
    return jnp.log(y)


def _double_root(y):
    return y**2


def _tangent(y):
    return jnp.arctan(y)


# One program for all of them: compiled once for each solver.
KINDS = (_squares, _singular, _wrong_jacobian, _cycling, _logarithm, _double_root, _tangent)


def _any_of(y, kind):
    return lax.switch(kind, KINDS, y)


SEARCHES = {
    "bt": (nks.Backtracking(), nks.ResidualTest()),
    "full": (nks.FullStep(), nks.ResidualTest(patience=20)),
    "region": (nks.Dogleg(), nks.ResidualTest()),
}

#: reason: globalisation, residual, start, rtol, atol
CASES = {
    "residual_atol": ("bt", _squares, (1.0, 3.0), 0.0, 1e-8),
    "residual_rtol": ("bt", _squares, (1.0, 3.0), 1e-8, 0.0),
    "max_steps": ("bt", _double_root, (1.0, 1.0), 0.0, 1e-300),
    "step_small": ("bt", _squares, (1.0, 3.0), 0.0, 0.0),
    "line_search_failed": ("bt", _wrong_jacobian, (1.0, 1.0), 1e-8, 0.0),
    "trust_region_failed": ("region", _wrong_jacobian, (1.0, 1.0), 1e-8, 0.0),
    "linear_solve_failed": ("bt", _singular, (1.0, 1.0), 1e-8, 0.0),
    "linear_solve_failed-at-once": ("bt", _singular, (0.0, 1.0), 1e-8, 0.0),
    "linear_solve_failed-full": ("full", _singular, (1.0, 1.0), 1e-8, 0.0),
    "diverged": ("full", _wrong_jacobian, (1.0, 1.0), 1e-8, 0.0),
    "stagnated": ("full", _cycling, (0.0, 0.0), 1e-8, 0.0),
    "nonfinite": ("bt", _logarithm, (-3.0, 3.0), 1e-8, 0.0),
    "nonfinite-full": ("full", _logarithm, (3.0, 3.0), 1e-8, 0.0),
    "residual_rtol-past-nan": ("bt", _logarithm, (3.0, 3.0), 1e-8, 0.0),
    "diverged-arctan": ("full", _tangent, (3.0, 3.0), 1e-8, 0.0),
}


def solve(name, throw):
    search, residual, y0, rtol, atol = CASES[name]
    globalisation, convergence = SEARCHES[search]
    solver = nks.NewtonKrylov(
        jnp.asarray(rtol),
        jnp.asarray(atol),
        globalisation=globalisation,
        convergence=convergence,
        history_length=64,
    )
    args = jnp.asarray(KINDS.index(residual), jnp.int32)
    y0 = jnp.asarray(y0)
    return nks.root_find(_any_of, solver, y0, args, max_steps=60, throw=throw), y0, args


#: Those whose residual cannot end as the name says are checked for honesty only.
EXPECTED = {name: name.split("-")[0] for name in CASES if name != "diverged-arctan"}


@pytest.mark.parametrize("name", CASES)
def test_without_throw(name):
    solution, y0, args = solve(name, throw=False)
    _, _, _, rtol, atol = CASES[name]
    if name in EXPECTED:
        assert reason(solution) == EXPECTED[name]
    succeeded = reason(solution) in SUCCESS
    assert bool(solution.result == optx.RESULTS.successful) == succeeded
    why = rows(solution)["reason"]
    if reason(solution) != "max_steps":  # which is not known at the last trial
        assert nks.reason_name(int(why[-1])) == reason(solution)
    assert all(nks.reason_name(int(code)) == "iterating" for code in why[:-1])
    if name == "nonfinite":
        np.testing.assert_array_equal(solution.value, y0)
        assert not np.isfinite(solution.stats["residual_norm"])
        assert trials(solution) == 1
    else:
        assert_honest(solution, _any_of, y0, args, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", EXPECTED)
def test_with_throw(name):
    if EXPECTED[name] in SUCCESS:
        assert reason(solve(name, throw=True)[0]) == EXPECTED[name]
        return
    text = nks.REASONS[getattr(nks.REASONS, EXPECTED[name])]
    with pytest.raises(eqx.EquinoxRuntimeError, match=re.escape(text)):
        solve(name, throw=True)


ADVICE = {
    "max_steps": "`max_steps`",
    "step_small": "float64",
    "line_search_failed": "start",
    "linear_solve_failed": "precondition",
    "diverged": "nks.Backtracking()",
    "stagnated": "Start elsewhere",
    "nonfinite": "nks.Backtracking()",
}


@pytest.mark.parametrize("name", ADVICE)
def test_text_is_advice(name):
    text = nks.REASONS[getattr(nks.REASONS, name)]
    assert ADVICE[name] in text
    assert text.endswith(".") and text.count(".") >= 2  # what happened, and what to do


def test_every_reason_is_provoked():
    names = set(nks.REASONS._name_to_item)
    assert set(EXPECTED.values()) == names - {"iterating"}


def test_best_point_of_a_cycle():
    """The better of its two points, which is not the last."""
    solution, _, _ = solve("stagnated", throw=False)
    np.testing.assert_allclose(solution.value, [1.0, 1.0])
    assert rows(solution)["norm"][-2] > 1.9 * float(solution.stats["residual_norm"])
    # The best point is the first step's; then patience runs out (once more where rounding helps).
    assert trials(solution) in (22, 23)


def test_best_point_of_a_divergence_is_the_start():
    solution, y0, args = solve("diverged", throw=False)
    np.testing.assert_array_equal(solution.value, y0)
    assert rows(solution)["norm"][-1] > 1e4 * two_norm(_any_of(y0, args))


def test_max_steps_bounds_trials():
    solver = nks.NewtonKrylov(1e-12, 0.0, history_length=4)
    for max_steps, expected in ((0, "max_steps"), (1, "max_steps")):
        args = jnp.asarray(0, jnp.int32)
        solution = run(_any_of, solver, jnp.asarray([1.0, 3.0]), args, max_steps=max_steps)
        assert reason(solution) == expected
        assert trials(solution) == 1 + max_steps
        assert int(solution.stats["max_steps"]) == max_steps
        assert bool(solution.result == optx.RESULTS.nonlinear_max_steps_reached)


def test_root_at_the_start_needs_no_step():
    args = jnp.asarray(0, jnp.int32)
    solver = nks.NewtonKrylov(0.0, 1e-12, history_length=4)
    solution = run(_any_of, solver, jnp.full(2, 2.0**0.5), args, max_steps=0)
    assert reason(solution) == "residual_atol"
    assert bool(solution.result == optx.RESULTS.successful)
