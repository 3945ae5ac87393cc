"""The stiff problems are those whose end values they carry: SciPy gets there."""

import jax
import numpy as np
import pytest
import scipy.integrate as spi
import scipy.sparse as sps

from nksolve.problems.stiff import STIFF

_CHEAP = ("rober", "hires", "orego", "van-der-pol", "brusselator-2d")


def _solved(problem, rtol):
    shape = problem.y0.shape
    flat = jax.jit(lambda t, y: problem.fn(t, y.reshape(shape), problem.args).ravel())
    jacobian = jax.jit(jax.jacfwd(flat, argnums=1))
    t, y = problem.span[0], np.asarray(problem.y0).ravel()
    for end in (*problem.jumps, problem.span[1]):
        # Not at the jump itself, where the right-hand side is already the later one.
        early = lambda s, y, end=end: np.asarray(flat(min(s, np.nextafter(end, t)), y))
        out = spi.solve_ivp(
            early if end in problem.jumps else lambda s, y: np.asarray(flat(s, y)),
            (t, end),
            y,
            method="BDF",
            rtol=rtol,
            atol=rtol * problem.atol_factor,
            jac=lambda s, y: sps.csc_matrix(np.asarray(jacobian(s, y))),
        )
        t, y = end, out.y[:, -1]
    return y.reshape(shape)


@pytest.mark.parametrize("name", _CHEAP)
def test_the_end_value(name):
    problem = STIFF[name](8) if name == "brusselator-2d" else STIFF[name]()
    rtol = 1e-7
    error = np.abs(_solved(problem, rtol) - problem.end)
    assert np.max(error / (rtol * (problem.atol_factor + np.abs(problem.end)))) < 200


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [("brusselator-1d", 500), ("gray-scott", 32)])
def test_the_end_value_of_a_grid(name, n):
    problem = STIFF[name](n)
    error = np.abs(_solved(problem, 1e-6) - problem.end)
    assert np.max(error) < 1e-4


def test_only_kept_sizes_have_end_values():
    assert STIFF["brusselator-1d"](20).end is None
    assert STIFF["rober"](1e5).end is None
    assert STIFF["brusselator-2d"](8).end.shape == (2, 8, 8)


def test_a_grid_has_at_least_one_node():
    with pytest.raises(ValueError, match="at least"):
        STIFF["brusselator-1d"](0)
