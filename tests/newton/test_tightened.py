"""The default forcing term: tight where short steps persist, loose where that harms."""

import jax.numpy as jnp
import numpy as np
import pytest

import nksolve as nks
from nksolve.newton.forcing import Progress
from nksolve.newton.tightened import Tightened
from nksolve.problems.registry import get

from .solving import counters, reason, rows, run


def etas(rule, lengths, *, target=0.0) -> list[float]:
    """η after steps of those lengths, in a slow descent to 0.99 of the norm before each time."""
    one = jnp.ones((), jnp.float64)
    state, found = rule.init(np.dtype(np.float64)), []
    for k, length in enumerate([1.0, *lengths]):
        progress = Progress(
            jnp.asarray(k == 0), 0.99 * one, one, one, 0.5 * one, target * one, length * one
        )
        eta, state = rule.eta(progress, state)
        found.append(float(eta))
    return found[1:]


LOOSE = 0.9 * 0.99**2


def test_tight_from_the_third_short_step_until_a_full_one():
    got = etas(Tightened(), [0.5, 0.9, 0.5, 0.2, 1.0, 0.5, 0.5, 0.5])
    expected = [LOOSE, LOOSE, 1e-3, 1e-3, LOOSE, LOOSE, LOOSE, 1e-3]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_loose_again_where_a_tight_direction_was_hardly_followed():
    # Two short steps of loose directions do not count as such, however short.
    short = [1e-4, 1e-4, 0.5]
    got = etas(Tightened(rest=4), [*short, 0.009, *[0.5] * 7])
    # After the tight one of λ = 0.009: rest at −4, and −3 … 2 are loose, 3 is tight.
    expected = [LOOSE] * 2 + [1e-3] + [LOOSE] * 7 + [1e-3]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert etas(Tightened(rest=4), [*short, 0.011])[-1] == 1e-3
    # A full step ends the rest.
    got = etas(Tightened(rest=4), [*short, 0.009, 1.0, 0.5, 0.5, 0.5])
    assert got[-1] == 1e-3


def test_a_ceiling_that_leaves_tighter_terms_and_the_last_solve_alone():
    many = [0.5] * 5
    assert etas(Tightened(nks.ConstantForcing(1e-6)), many) == [1e-6] * 5
    assert etas(Tightened(nks.ConstantForcing(0.5), tight=0.1, patience=1), many) == [0.1] * 5
    assert etas(Tightened(), many, target=0.2)[-1] == 0.1
    assert etas(Tightened(nks.ConstantForcing(0.05)), many, target=0.2) == [0.05] * 5


@pytest.mark.parametrize(
    "arguments", [{"tight": 1.0}, {"tight": -0.1}, {"patience": 0}, {"rest": -1}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must"):
        Tightened(**arguments)


@pytest.mark.parametrize(
    ("globalisation", "chosen"),
    [
        (nks.Damped(0.5), True),
        (nks.CriticalPoint(), True),
        (nks.Backtracking(), False),
        (nks.Parabolic(), False),
        (nks.NonMonotone(window=1), False),
        (nks.Dogleg(initial_radius=0.1), False),
        (nks.Feasible(nks.Damped(0.5)), True),
        (nks.Feasible(nks.Backtracking()), False),
    ],
)
def test_only_what_trials_refused_counts_as_short(globalisation, chosen):
    """`Damped` chose its λ before any trial; the others were made to take theirs."""
    fn = lambda y, args: jnp.exp(8 * y) - 1e-4 + 1e-3 * jnp.sum(y)
    solver = nks.NewtonKrylov(
        1e-10,
        0.0,
        globalisation=globalisation,
        forcing=Tightened(nks.ConstantForcing(0.5), patience=1, rest=0),
        history_length=301,
    )
    record = rows(run(fn, solver, jnp.array([-1.5, 0.5]), max_steps=300))
    short = record["accepted"] & (record["step_length"] < 1) & np.isfinite(record["eta"])
    short[0] = False
    assert short.any()
    tight = record["eta"][short] <= 1e-3
    assert not tight.any() if chosen else tight.any()


def test_where_steps_are_full_it_is_the_term_inside():
    problem = get("broyden-tridiagonal")
    solve = lambda **kw: run(problem.fn, nks.NewtonKrylov(1e-10, 0.0, **kw), problem.y0)
    assert counters(solve()) == counters(solve(forcing=nks.EisenstatWalker2()))


def test_wood_takes_half_the_work():
    problem = get("wood")
    solve = lambda **kw: run(problem.fn, nks.NewtonKrylov(1e-10, 0.0, **kw), problem.y0)
    ours, papers = solve(), solve(forcing=nks.EisenstatWalker2())
    assert reason(ours) == reason(papers) == "residual_rtol"
    assert 2 * counters(ours)["num_matvecs"] < counters(papers)["num_matvecs"]
    assert 2 * counters(ours)["num_linearisations"] < counters(papers)["num_linearisations"]
