"""End values against references: w = max |y − ref| / (atol + rtol |ref|) ≤ 20, and the counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.references import (
    CASES,
    METHODS,
    RTOLS,
    fourier,
    pattern,
    scipy_bdf,
    solved,
    weighted_error,
)
from nksolve import ode
from nksolve.problems.stiff import STIFF

# Of low order under a controller of the step's error: w grows as the tolerance shrinks.
LOW_ORDER = ("ImplicitEuler", "Rosenbrock23")
# Where the published error estimate is smaller than the error; an exact Newton gives the same.
# (problem, method): most w at any tolerance.
OPTIMISTIC = {
    ("orego", "Kvaerno4"): 40,
    ("orego", "Kvaerno5"): 65,
    ("orego", "KenCarp3"): 320,
    ("orego", "KenCarp4"): 170,
    ("orego", "KenCarp5"): 400,
    ("van-der-pol", "KenCarp3"): 110,
    ("van-der-pol", "KenCarp4"): 35,
    ("van-der-pol", "KenCarp5"): 40,
    ("brusselator-1d", "KenCarp5"): 75,
    ("brusselator-2d-8", "KenCarp5"): 80,
    ("gray-scott", "Kvaerno5"): 90,
    ("gray-scott", "KenCarp3"): 300,
    ("gray-scott", "KenCarp4"): 50,
    ("gray-scott", "KenCarp5"): 150,
    # This one magnifies errors: SciPy's BDF ends with w = 208, 444 and 703.
    ("brusselator-2d-32", "Kvaerno3"): 70,
    ("brusselator-2d-32", "Kvaerno4"): 75,
    ("brusselator-2d-32", "Kvaerno5"): 530,
    ("brusselator-2d-32", "KenCarp3"): 290,
    ("brusselator-2d-32", "KenCarp4"): 270,
    ("brusselator-2d-32", "KenCarp5"): 3100,
    ("brusselator-2d-32", "Rodas4"): 40,
    ("brusselator-2d-32", "Rodas5P"): 230,
}
# Explicit outside a space of four vectors: not for these.
TOO_STIFF = {
    (name, "ROK4") for name in ("rober", "brusselator-1d", "brusselator-2d-8", "brusselator-2d-32")
}


def _check(name, method, rtol):
    result = solved(name, method, rtol)
    print(name, method, rtol, result)
    assert result.reason == ""
    assert result.w <= OPTIMISTIC.get((name, method), 20)
    attempts = result.accepted + result.rejected
    assert result.failures <= result.rejected
    assert result.linearisations == attempts


@pytest.mark.parametrize(
    ("name", "method", "rtols"),
    [
        ("van-der-pol", "Kvaerno4", (1e-4, 1e-6)),
        ("hires", "KenCarp4", (1e-4, 1e-6)),
        ("brusselator-2d-8", "Kvaerno5", (1e-4,)),
    ],
)
def test_end_values(name, method, rtols):
    for rtol in rtols:
        _check(name, method, rtol)


SLOW = [
    (name, method)
    for name in CASES
    for method in METHODS
    if hasattr(ode, method)
    and method != "BDF"
    and method not in LOW_ORDER
    and (name, method) not in TOO_STIFF
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), SLOW)
def test_end_values_in_full(name, method):
    for rtol in RTOLS:
        _check(name, method, rtol)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["brusselator-2d-8", "brusselator-2d-32", "gray-scott"])
def test_bdf_is_as_accurate_as_scipys(name):
    """The other problems are in `test_bdf.py`."""
    for rtol in RTOLS:
        result = solved(name, "BDF", rtol)
        w, steps = scipy_bdf(name, rtol)
        print(name, rtol, result, "SciPy", w, steps)
        assert result.reason == ""
        assert result.w <= max(2 * w, 1.0)


def test_the_pattern_and_the_preconditioner_are_of_the_problem():
    """What SciPy and GMRES are given holds: no entry outside, and (I − γ D Δ)⁻¹ inverts."""
    problem = STIFF["brusselator-2d"](4)
    y = problem.y0 + 0.1 * jnp.cos(jnp.arange(32.0)).reshape(2, 4, 4)
    flat = lambda v: problem.fn(2.0, v.reshape(y.shape), problem.args).ravel()
    jacobian = np.asarray(jax.jacfwd(flat)(y.ravel()))
    inside = pattern(4, 4).toarray() != 0
    assert not np.any((jacobian != 0) & ~inside)
    assert inside.sum() == 32 * 6
    rates = jnp.array([0.3, 2.0])
    preconditioner: Any = fourier(lambda args: args, 4).preconditioner
    build = preconditioner.build
    around = lambda v: sum(jnp.roll(v, s, a) for a in (1, 2) for s in (1, -1)) - 4 * v
    v = y - 0.7 * rates[:, None, None] * around(y)
    np.testing.assert_allclose(build(0.0, y, 0.7, rates)(v), y, rtol=1e-12)


def test_the_weighted_error():
    problem = STIFF["orego"]()
    assert problem.end is not None
    y = problem.end * np.array([1.0, 1.0, 1.0 + 5e-4])
    expected = 5e-4 * problem.end[2] / (1e-4 + 1e-4 * problem.end[2])
    np.testing.assert_allclose(weighted_error(problem, y, 1e-4), expected, rtol=1e-9)
