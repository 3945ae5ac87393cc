"""The residual test: which of the two tolerances held, and when to give up."""

import jax.numpy as jnp
import pytest

import nksolve as nks
from nksolve.newton.convergence import Standing

from .solving import reason, run

DEFAULT = nks.ResidualTest()


def verdict(test=DEFAULT, *, norm, initial=1.0, atol=0.0, rtol=0.0, since_best=0):
    numbers = {"norm": norm, "initial_norm": initial, "atol": atol, "target": atol + rtol * initial}
    numbers = {name: jnp.asarray(x, jnp.float64) for name, x in numbers.items()}
    stop, why = test(Standing(**numbers, steps_since_best=jnp.asarray(since_best, jnp.int32)))
    assert bool(stop) == (nks.reason_name(why) != "iterating")
    return nks.reason_name(why)


@pytest.mark.parametrize(
    ("tolerances", "norm", "expected"),
    [
        ({"atol": 1e-3}, 1e-3, "residual_atol"),
        ({"atol": 1e-3}, 1.001e-3, "iterating"),
        ({"rtol": 1e-3, "initial": 10.0}, 1e-2, "residual_rtol"),
        ({"rtol": 1e-3, "initial": 10.0}, 1.001e-2, "iterating"),
        ({"atol": 1e-3, "rtol": 1e-3}, 0.9e-3, "residual_atol"),
        ({"atol": 1e-3, "rtol": 1e-3}, 1.9e-3, "residual_rtol"),
        ({"atol": 1e-3, "rtol": 1e-3}, 2.1e-3, "iterating"),
        ({}, 0.0, "residual_atol"),
        ({}, 1e-300, "iterating"),
        ({}, float("nan"), "iterating"),
    ],
)
def test_which_tolerance(tolerances, norm, expected):
    assert verdict(norm=norm, **tolerances) == expected


def test_diverged_and_stagnated():
    assert verdict(norm=0.99e4) == "iterating"
    assert verdict(norm=1.01e4) == "diverged"
    assert verdict(norm=1.01e4, initial=2.0) == "iterating"
    assert verdict(nks.ResidualTest(divergence=2.0), norm=2.5) == "diverged"
    assert verdict(norm=1.0, since_best=49) == "iterating"
    assert verdict(norm=1.0, since_best=50) == "stagnated"
    assert verdict(nks.ResidualTest(patience=3), norm=1.0, since_best=3) == "stagnated"
    # Convergence goes before giving up, divergence before stagnation.
    assert verdict(norm=0.5, rtol=0.5, since_best=50) == "residual_rtol"
    assert verdict(norm=1e5, since_best=50) == "diverged"


@pytest.mark.parametrize("bad", [{"divergence": 1.0}, {"divergence": -1.0}, {"patience": 0}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="must exceed 1"):
        nks.ResidualTest(**bad)


def _squares(y, args):
    return y**2 - args


@pytest.mark.parametrize(
    ("rtol", "atol", "expected"),
    [(1e-6, 0.0, "residual_rtol"), (0.0, 1e-6, "residual_atol"), (1e-6, 1e-6, None)],
)
def test_in_a_solve(rtol, atol, expected):
    solver = nks.NewtonKrylov(jnp.asarray(rtol), jnp.asarray(atol))
    y0, args = jnp.asarray([3.0, 4.0]), jnp.asarray([2.0, 3.0])
    solution = run(_squares, solver, y0, args)
    norm = float(jnp.linalg.norm(_squares(solution.value, args)))
    start = float(jnp.linalg.norm(_squares(y0, args)))
    expected = expected or ("residual_atol" if norm <= atol else "residual_rtol")
    assert reason(solution) == expected
    assert norm <= atol + rtol * start
